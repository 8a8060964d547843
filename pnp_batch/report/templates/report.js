"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const text = (selector, root) => $(selector, root)?.textContent.toLowerCase() ?? "";
  const alphabet = new Intl.Collator(undefined, { numeric: true });

  const cards = all(".card").map((element, order) => ({
    element,
    order,
    level: element.dataset.level,
    psnr: element.dataset.psnr === undefined ? null : Number(element.dataset.psnr),
    list: $(".tiles", element),
    tiles: all(".tile", element).map((tile, order) => ({
      element: tile,
      order,
      prompt: text(".prompt", tile),
      figures: JSON.parse(tile.dataset.figures ?? "{}"),
      figure: $(".figure", tile),
      quality: tile.dataset.quality ?? "",
      attempt: tile.dataset.attempt ?? "",
      manifest: tile.dataset.leftover === undefined ? "asked" : "leftover",
      words: [text(".prompt", tile), text(".difference", tile), text(".name", element), tile.dataset.method ?? ""].join(" "),
    })),
  }));
  const failures = all(".failure").map((element) => ({ element, words: element.textContent.toLowerCase() }));
  const results = cards.reduce((sum, card) => sum + card.tiles.length, 0);

  // Filter ---------------------------------------------------------------------------------------------------------

  const tools = $("#tools");
  const number = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  function show(items, matches) {
    let shown = 0;
    for (const item of items) {
      item.element.hidden = !matches(item);
      if (!item.element.hidden) shown += 1;
    }
    return shown;
  }

  function bound(selector, otherwise) {
    const value = $(selector)?.value ?? "";
    return value === "" ? otherwise : Number(value);
  }

  function showMetric() {
    const metric = $("#metric")?.value;
    for (const tile of cards.flatMap((card) => card.tiles)) {
      if (!tile.figure) continue;
      const value = tile.figures[metric];
      tile.figure.textContent = value === undefined ? `no ${metric}` : `${metric} ${Number(value.toPrecision(4))}`;
    }
  }

  function filter() {
    const wanted = $("#text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const level = $("#level").value;
    const status = $("input[name=status]:checked", tools).value;
    const matches = (item) => wanted.every((word) => item.words.includes(word));
    const quality = $("#quality")?.value ?? "";
    const manifest = $("#manifest")?.value ?? "";
    const metric = $("#metric")?.value;
    const low = bound("#low", -Infinity);
    const high = bound("#high", Infinity);
    const isBound = low !== -Infinity || high !== Infinity;
    const picked = (tile) =>
      matches(tile) &&
      (!quality || (quality === "retried" ? tile.quality === "passed" && tile.attempt : tile.quality === quality)) &&
      (!manifest || tile.manifest === manifest) &&
      (!isBound || (tile.figures[metric] >= low && tile.figures[metric] <= high));

    let done = 0;
    show(cards, (card) => {
      if (status === "failed" || (level && card.level !== level)) return false;
      const shown = show(card.tiles, picked);
      done += shown;
      return shown > 0;
    });
    const onlyResults = status === "done" || level || quality || manifest || isBound;
    const failed = show(failures, (failure) => !onlyResults && matches(failure));
    const section = $("#failures");
    if (section) {
      section.hidden = failed === 0;
      if (status === "failed") $("details", section).open = true;
    }
    const parts = [];
    if (status !== "failed") {
      parts.push(done === results ? number(done, "result") : `${done.toLocaleString("en")} of ${number(results, "result")}`);
    }
    if (failures.length && !onlyResults) parts.push(number(failed, "failure"));
    $("#count").textContent = parts.join(" · ");
    $("#nothing").hidden = done + failed > 0 || results + failures.length === 0;
  }

  // Sort -----------------------------------------------------------------------------------------------------------

  const byOrder = (a, b) => a.order - b.order;
  const byPrompt = (a, b) => alphabet.compare(a.prompt, b.prompt) || byOrder(a, b);
  // What was not inverted has no figure and comes last either way.
  const byPsnr = (sign) => (a, b) =>
    (a.psnr === null) - (b.psnr === null) || sign * (a.psnr - b.psnr) || byOrder(a, b);
  const orders = {
    order: byOrder,
    worst: byPsnr(1),
    best: byPsnr(-1),
    prompt: (a, b) => alphabet.compare(a.tiles[0]?.prompt, b.tiles[0]?.prompt) || byOrder(a, b),
  };

  // How good a figure is: larger is better. What has none is undefined, and comes last either way.
  function goodness(tile) {
    const option = $("#metric")?.selectedOptions[0];
    const value = tile.figures[option?.value];
    if (value === undefined) return undefined;
    const better = option.dataset.better;
    if (better === "\u2191") return value;
    if (better === "\u2193") return -value;
    return better.endsWith("1") ? -Math.abs(Math.log(value)) : -Math.abs(value);
  }

  const byGoodness = (sign) => (a, b) =>
    (a.goodness === undefined) - (b.goodness === undefined) || sign * (b.goodness - a.goodness) || byOrder(a, b);

  // Cards go by their foremost tile that is shown.
  function sortByMetric(sign) {
    const order = byGoodness(sign);
    for (const card of cards) {
      for (const tile of card.tiles) tile.goodness = goodness(tile);
      card.tiles.sort(order);
      card.goodness = card.tiles.find((tile) => !tile.element.hidden)?.goodness;
      arrange(card.list, card.tiles);
    }
    cards.sort(order);
    arrange($("#cards"), cards);
  }

  // Emptied first: moving 2,000 cards one by one takes Chromium four seconds, emptying and filling a tenth of one.
  function arrange(list, items) {
    if (items.length < 2) return;
    list.replaceChildren();
    list.append(...items.map((item) => item.element));
  }

  function sort() {
    const wanted = $("#sort").value;
    if (wanted.startsWith("metric")) return sortByMetric(wanted === "metric-best" ? 1 : -1);
    for (const card of cards) {
      card.tiles.sort(wanted === "prompt" ? byPrompt : byOrder);
      arrange(card.list, card.tiles);
    }
    cards.sort(orders[wanted]);
    arrange($("#cards"), cards);
  }

  // By a metric, a card goes by what is shown of it.
  function update() {
    filter();
    if ($("#sort").value.startsWith("metric")) sort();
  }

  let timer;
  $("#text").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(update, 120);
  });
  tools.addEventListener("change", (event) => {
    if (event.target.id === "metric") showMetric();
    if (event.target.id === "sort") sort();
    else update();
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  $("#clear").addEventListener("click", () => {
    const [order, metric] = [$("#sort").value, $("#metric")?.value];
    tools.reset();
    $("#sort").value = order;
    if (metric) $("#metric").value = metric;
    filter();
    $("#text").focus();
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest("a[href='#failures']")) return;
    tools.reset();
    $("#sort").dispatchEvent(new Event("change", { bubbles: true }));
    filter();
    $("#failures details").open = true;
  });

  // Plots ----------------------------------------------------------------------------------------------------------

  document.addEventListener("click", (event) => {
    const bar = event.target.closest(".bar");
    if (bar) {
      $("#metric").value = bar.dataset.metric;
      $("#low").value = bar.dataset.low;
      $("#high").value = bar.dataset.high;
      $("#metric").dispatchEvent(new Event("change", { bubbles: true }));
    }
    const point = event.target.closest(".scatter a");
    if (point && $(point.getAttribute("href"))?.checkVisibility() === false) $("#clear").click(); // it was filtered out
  });

  // One stop of the Tab key for each plot: two thousand points would be two thousand stops.
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -Infinity, End: Infinity };
  document.addEventListener("keydown", (event) => {
    const item = event.target.closest(".bar, .point");
    if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in steps) {
      const items = all(".bar, .point", item.closest("svg"));
      const next = items[Math.min(Math.max(items.indexOf(item) + steps[event.key], 0), items.length - 1)];
      item.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
    } else if (item.matches(".bar") && (event.key === "Enter" || event.key === " ")) {
      item.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    } else return;
    event.preventDefault();
  });

  // Videos ---------------------------------------------------------------------------------------------------------

  // Hundreds of them cannot all be decoded: one plays while it is in view.
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    const inView = new WeakSet();
    const observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting) {
          inView.add(target);
          target.play().catch(() => {}); // where a browser plays nothing unasked, there are the controls
        } else if (inView.delete(target)) target.pause();
      }
    });
    for (const video of all("video")) observer.observe(video);
  }

  // Compare --------------------------------------------------------------------------------------------------------

  const dialog = $("#compare");
  const stage = $(".stage", dialog);
  const cut = $("#cut");
  let current = null;

  const comparable = () =>
    cards.flatMap((card) => (card.element.hidden ? [] : card.tiles))
      .filter((tile) => !tile.element.hidden && $(".compare", tile.element))
      .map((tile) => tile.element);

  function copy(from, to) {
    to.src = from.src;
    to.className = from.className;
    to.alt = from.alt;
  }

  function slide() {
    stage.style.setProperty("--cut", `${cut.value}%`);
    cut.setAttribute("aria-valuetext", `${cut.value}% ${$("#before-tag").textContent.toLowerCase()}, the rest result`);
  }

  function compare(tile) {
    current = tile;
    const card = tile.closest(".card");
    const result = $(".frame img", tile);
    const reconstruction = $(".reconstruction img", card);
    const choices = all("input", $("#against"));
    choices[1].disabled = !reconstruction;
    if (!reconstruction) choices[0].checked = true;
    const against = choices[1].checked ? reconstruction : $(".source img", card);
    copy(result, $("#after"));
    copy(against, $("#before"));
    $("#before-tag").textContent = choices[1].checked ? "Reconstruction" : "Source";
    stage.style.setProperty("--aspect", result.getAttribute("width") / result.getAttribute("height"));
    $("#compare-prompt").textContent = $(".prompt", tile).textContent;
    $("#compare-difference").textContent = $(".difference", tile)?.textContent ?? "";
    $("#compare-source").textContent = $(".name", card).textContent;
    const tiles = comparable();
    const index = tiles.indexOf(tile);
    $("#place").textContent = `${index + 1} of ${tiles.length}`;
    slide();
  }

  function move(step) {
    const tiles = comparable();
    compare(tiles[(tiles.indexOf(current) + step + tiles.length) % tiles.length]);
  }

  $("#cards").addEventListener("click", (event) => {
    const button = event.target.closest(".compare");
    if (!button) return;
    cut.value = 50;
    compare(button.closest(".tile"));
    dialog.showModal();
    cut.focus({ preventScroll: true });
  });
  cut.addEventListener("input", slide);
  $("#against").addEventListener("change", () => compare(current));
  $("#previous").addEventListener("click", () => move(-1));
  $("#next").addEventListener("click", () => move(1));
  $("#close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  dialog.addEventListener("close", () => {
    $(".compare", current)?.focus(); // where the person got to, not where they began
    for (const image of all("img", stage)) image.removeAttribute("src");
  });

  // Copy settings --------------------------------------------------------------------------------------------------

  async function toClipboard(value) {
    try {
      await navigator.clipboard.writeText(value);
    } catch {
      const area = document.createElement("textarea"); // browsers that keep the clipboard from file: pages
      area.value = value;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  for (const button of all(".copy")) button.hidden = false;
  $("#results").addEventListener("click", async (event) => {
    const button = event.target.closest(".copy");
    if (!button) return;
    await toClipboard(button.dataset.copy);
    const words = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = words), 1500);
  });

  // What is scrolled to, and what sticks, stays below the tools, which take two lines in a narrow window.
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--tools", `${tools.offsetHeight}px`);
  }).observe(tools);

  showMetric();
  filter();
  if ($("#sort").value !== "order") sort(); // a browser may keep the choices over a reload
  tools.hidden = false;
})();
