"""The report in a real browser, without a window: it runs under its own policy, filters, sorts and compares."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryFile, mkdtemp
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image
from report_run import Run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _needs_chromium() -> None:
    if CHROMIUM is None:
        warnings.warn("chromium is not installed: the report was NOT tried in a browser", stacklevel=1)
        pytest.skip("no chromium: apt-get install --no-install-recommends chromium")


def browse(page: Path, *flags: str) -> str:
    """Opens a page with a fresh profile and gives what `--dump-dom` or the like prints."""
    command = _chromium(page, "--virtual-time-budget=3000", *flags)
    return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout


def _chromium(page: Path, *flags: str) -> list[str]:
    return [str(CHROMIUM), *FLAGS, f"--user-data-dir={mkdtemp(dir=page.parent)}", *flags, page.as_uri()]


def drive(run: Run, script: str, *flags: str) -> Any:
    """Runs a script in the page after its own, and gives what its `answer` holds.

    The page's policy runs no script but its own, so the page that is driven is a copy without the policy.
    """
    text = (run.outputs.root / "report.html").read_text(encoding="utf-8")
    helpers = """
      const $ = (s) => document.querySelector(s), all = (s) => [...document.querySelectorAll(s)];
      const seen = (s) => all(s).filter((e) => e.checkVisibility());
      const change = (s, value) => { $(s).value = value; $(s).dispatchEvent(new Event("change", {bubbles: true})); };
      const choose = (s) => { $(s).checked = true; $(s).dispatchEvent(new Event("change", {bubbles: true})); };
      const wait = (ms) => new Promise((done) => setTimeout(done, ms));
      const loaded = new Promise((done) => addEventListener("load", done));
      const until = async (holds) => { for (let i = 0; i < 600 && !holds(); i++) await wait(50); };
    """
    with _Listener() as listener:
        driver = f"""<script>(async () => {{ let answer; {helpers}
          try {{ await loaded; {script} }} catch (e) {{ answer = String(e); }}
          fetch("{listener.url}", {{method: "POST", mode: "no-cors", body: JSON.stringify(answer ?? null)}}); }})();</script>"""
        copy = run.outputs.root / "driven.html"
        without_policy = re.sub(r"<meta http-equiv[^>]*>", "", text, count=1)
        copy.write_text(without_policy.replace("</body>", f"{driver}</body>"), encoding="utf-8")
        return listener.heard(_chromium(copy, "--remote-debugging-port=0", *flags))  # else it would leave at once


class _Listener(ThreadingHTTPServer):
    """Hears what one page answers, whenever that is: a page under virtual time does not wait for its frames."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def heard(self, command: list[str], seconds: int = 120) -> Any:
        """What a page answers that a browser opens."""
        with TemporaryFile("w+") as said, _running(command, said) as browser:
            for _ in range(seconds):
                with suppress(Empty):
                    return self.answers.get(timeout=1)
                if browser.poll() is not None:
                    break
            said.seek(0)
            pytest.fail(f"the page's script did not run to its end; the browser said: {said.read()}")

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        super().__exit__(*args)


@contextmanager
def _running(command: list[str], said: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Answer(BaseHTTPRequestHandler):
    server: _Listener

    def do_POST(self) -> None:
        self.server.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def gallery(run: Run) -> Run:
    """Three sources of different reconstruction, six results, two failures."""
    for source, psnr in (("cat.jpg", 29.5), ("horse.jpg", 20.0), ("wolf.jpg", 28.0)):
        trajectory = run.trajectory(source, size=64)
        for prompt in (f"the zebra of {source}", "a bronze statue"):
            run.result(source, prompt, trajectory, size=64, reconstruction_psnr=psnr)
    run.report(
        [{"source": name, "prompt": "p", "stage": "read", "error": "no such file"} for name in ("cat.jpg", "x.jpg")]
    )
    return run


def test_the_script_runs_under_the_pages_policy_and_nobody_elses_does(run: Run) -> None:
    run.result(HOSTILE, HOSTILE, run.trajectory(HOSTILE), negative_prompt=HOSTILE)
    run.report(
        [{"source": HOSTILE, "prompt": HOSTILE, "stage": "read", "error": HOSTILE, "traceback": HOSTILE}], "mine.yaml"
    )
    dom = browse(run.outputs.root / "report.html", "--dump-dom")
    assert re.search(r'<form id="tools"[^>]*aria-label="Filter and sort">', dom), "the tools are still hidden"
    assert "1 result · 1 failure" in dom
    assert "<title>mine.yaml" in dom


def test_filters_by_text_status_and_inversion(gallery: Run) -> None:
    assert drive(
        gallery,
        """
        const state = () => [seen(".card").length, seen(".tile").length, seen(".failure").length, $("#count").textContent];
        answer = {before: state()};
        $("#text").value = "ZEBRA horse"; $("#text").dispatchEvent(new Event("input")); await wait(300);
        answer.text = state();
        $("#clear").click(); answer.clear = state();
        choose("input[value=failed]"); answer.failed = state();
        choose("input[value=done]"); answer.done = state();
        change("#level", "poor"); answer.poor = state();
        change("#text", "nowhere"); answer.nothing = [...state(), seen("#nothing").length];
        """,
    ) == {
        "before": [3, 6, 2, "6 results · 2 failures"],
        "text": [1, 1, 0, "1 of 6 results · 0 failures"],
        "clear": [3, 6, 2, "6 results · 2 failures"],
        "failed": [0, 0, 2, "2 failures"],
        "done": [3, 6, 0, "6 results"],
        "poor": [1, 2, 0, "2 of 6 results"],
        "nothing": [0, 0, 0, "0 of 6 results", 1],
    }


def test_sorts_by_reconstruction_and_prompt_and_back(gallery: Run) -> None:
    names = '() => all(".card h2").map((e) => e.textContent.split(".")[0]).join(" ")'
    assert drive(
        gallery,
        f"""
        const names = {names}; answer = [];
        for (const order of ["worst", "best", "prompt", "order"]) {{ change("#sort", order); answer.push(names()); }}
        change("#sort", "prompt"); answer.push($(".tile .prompt").textContent);
        """,
    ) == ["horse wolf cat", "cat wolf horse", "cat horse wolf", "cat horse wolf", "a bronze statue"]


def test_filters_by_what_is_still_in_the_manifest(run: Run) -> None:
    for number in range(3):
        run.result("a.jpg", f"prompt {number}", run.trajectory("a.jpg", size=64), 64)
    run.report(
        [{"source": "x.jpg", "prompt": "p", "stage": "read", "error": "gone"}],
        is_leftover=lambda row: "1" in row["prompt"],
    )
    answer = drive(
        run,
        """
        const shown = () => seen(".tile").map((e) => e.querySelector(".prompt").textContent.slice(-1)).join("");
        const state = () => [shown(), seen(".failure").length];
        answer = ["", "asked", "leftover"].map((word) => { change("#manifest", word); return state(); });
        answer.push(all(".tile").map((e) => e.querySelectorAll(".leftover, .command").length));
        """,
    )
    assert answer == [["012", 1], ["02", 0], ["1", 0], [1, 1, 1]]  # what is no longer in it cannot be run again


def test_filters_by_quality_and_metric_and_sorts_by_metric(run: Run) -> None:
    rows = []
    for number, (source, quality, attempt) in enumerate(
        [("a.jpg", "passed", 0), ("a.jpg", "passed", 2), ("b.jpg", "flagged", 1), ("b.jpg", "not judged", 0)]
    ):
        row = run.result(
            source, f"prompt {number}", run.trajectory(source, size=64), 64, quality=quality, quality_attempt=attempt
        )
        figures = {"structure_distance": [0.3, 0.1, 0.2, None][number], "clip_similarity": 0.2 + number / 100}
        rows.append({"key": row["key"], "source": source, **figures})
    run.outputs.write_file("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    run.report([{"source": "x.jpg", "prompt": "p", "stage": "read", "error": "no such file"}])
    answer = drive(
        run,
        """
        const state = () => seen(".tile").map((e) => e.querySelector(".prompt").textContent.slice(-1)).join("");
        answer = {all: state(), figure: $(".figure").textContent};
        for (const word of ["passed", "retried", "flagged", "not judged"]) {
          change("#quality", word); answer[word] = [state(), seen(".failure").length];
        }
        change("#quality", "");
        change("#metric", "structure_distance"); answer.other = all(".figure").map((e) => e.textContent);
        change("#high", "0.2"); answer.high = state(); change("#low", "0.15"); answer.low = state();
        change("#low", ""); change("#high", "");
        change("#sort", "metric-best"); answer.best = state();
        change("#sort", "metric-worst"); answer.worst = state();
        $(".plots details").open = true;
        const bar = all(".bar").filter((e) => e.dataset.metric === "clip_similarity")[0];
        bar.dispatchEvent(new MouseEvent("click", {bubbles: true})); answer.bar = state();
        all(".scatter a")[1].dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true})); answer.point = state();
        """,
    )
    assert answer == {
        "all": "0123",
        "figure": "structure_distance 0.3",
        "passed": ["01", 0],
        "retried": ["1", 0],
        "flagged": ["2", 0],
        "not judged": ["3", 0],
        "other": [
            "structure_distance 0.3",
            "structure_distance 0.1",
            "structure_distance 0.2",
            "no structure_distance",
        ],
        "high": "12",
        "low": "2",
        "best": "1023",
        "worst": "0123",
        "bar": "0",
        "point": "0123",
    }


def with_figures(run: Run, values: list[float]) -> None:
    """One source with a result for each figure."""
    rows = []
    for number, value in enumerate(values):
        row = run.result("a.jpg", f"prompt {number}", run.trajectory("a.jpg", size=64), 64)
        figures = {"structure_distance": value, "clip_similarity": 0.2 + number / 100}
        rows.append({"key": row["key"], "source": "a.jpg", **figures})
    run.outputs.write_file("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    run.report()


def test_results_of_one_prompt_are_told_apart_wherever_they_are_named(run: Run) -> None:
    """Also where they are on two cards: what is not inverted has another trajectory than what is."""
    one, other = run.trajectory("a.jpg", size=64), run.trajectory("a.jpg", size=64, method="none")
    for guidance_scale in (7.5, 12):
        run.result("a.jpg", "a zebra", one, 64, guidance_scale=guidance_scale, pnp_f_t=0.8)
    run.result("a.jpg", "a zebra", one, 64, pnp_f_t=0.8, negative_prompt="ugly")
    run.result("a.jpg", "a zebra", one, 64, method="p2p")
    run.result("a.jpg", "a zebra", other, 64, method="sdedit", sdedit_strength=0.6)
    run.result(
        "a.jpg", "a zebra", other, 64, method="sdedit", sdedit_strength=0.6
    )  # as from other weights of the model
    run.result("a.jpg", "a horse", one, 64)
    run.result("b.jpg", "a zebra", run.trajectory("b.jpg", size=64), 64, guidance_scale=3)
    run.report()
    keys = [row["key"][:10] for row in run.outputs.rows()]
    answer = drive(
        run,
        """
        const of = (tile) => tile.querySelector(".difference")?.textContent ?? "";
        answer = {captions: all(".tile").map(of), compared: []};
        answer.alt = $(".tile img").alt;
        all(".compare")[0].click();
        for (let i = 0; i < 4; i++) {
          answer.compared.push($("#compare h2").textContent.trim()); $("#next").click();
        }
        $("#close").click();
        const search = async (words) => { $("#text").value = words; $("#text").dispatchEvent(new Event("input"));
          await wait(300); return seen(".tile").length; };
        answer.found = [];
        for (const words of ["sdedit", "zebra guidance_scale 12", "p2p", "pnp"]) answer.found.push(await search(words));
        """,
    )
    captions = [
        "method pnp, guidance_scale 7.5",
        "method pnp, guidance_scale 12",
        "method pnp, guidance_scale 7.5, negative_prompt ugly",
        "method p2p, guidance_scale 7.5",
        "",  # the horse, the only one of its prompt
        f"method sdedit, guidance_scale 7.5, key {keys[4]}",
        f"method sdedit, guidance_scale 7.5, key {keys[5]}",
        "",  # another source
    ]
    assert answer == {
        "captions": captions,
        "compared": [f"a zebra {caption}" for caption in captions[:4]],
        "alt": f"Result: a zebra ({captions[0]})",
        "found": [2, 1, 1, 5],
    }


def test_a_bar_shows_just_the_results_that_it_counts(run: Run) -> None:
    with_figures(run, [0.0333333333, 0.0333333334, 0.1, 0.1 + 1e-9, 0.2, 0.29999999999999993])
    assert drive(
        run,
        """
        answer = [];
        for (const bar of all(".bar").filter((e) => e.dataset.metric === "structure_distance")) {
          bar.dispatchEvent(new MouseEvent("click", {bubbles: true}));
          answer.push([bar.querySelector("title").textContent.split(": ")[1], seen(".tile").length]);
        }
        """,
    ) == [["2 results", 2], ["2 results", 2], ["1 result", 1], ["1 result", 1]]


def test_plots_work_by_keyboard(run: Run) -> None:
    with_figures(run, [0.1, 0.2, 0.3])
    answer = drive(
        run,
        """
        $(".plots details").open = true;
        const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        const stops = () => all(".plots [tabindex='0']").length;
        answer = {stops: stops(), roles: [...new Set(all(".bar").map((e) => e.getAttribute("role")))]};
        all(".bar")[0].focus(); press("End"); press("Enter");
        answer.bar = seen(".tile .prompt").map((e) => e.textContent);
        press("ArrowLeft"); press(" "); answer.space = seen(".tile .prompt").map((e) => e.textContent);
        $(".point").focus(); press("ArrowRight"); press("ArrowRight"); press("ArrowRight");
        answer.point = [document.activeElement.getAttribute("href"), document.activeElement.querySelector("title").textContent];
        answer.after = stops();
        """,
    )
    assert answer == {
        "stops": 3,  # the scatter plot and two histograms: the reconstruction's PSNR is the same for all
        "roles": ["button"],
        "bar": ["prompt 2"],
        "space": ["prompt 1"],
        "point": ["#r3", "prompt 2 (a.jpg)"],
        "after": 3,
    }


def test_compares_a_result_with_its_source(gallery: Run) -> None:
    answer = drive(
        gallery,
        """
        const button = all(".compare")[2]; button.click();
        const source = all(".source img")[1].src, cut = $("#cut");
        answer = {
          open: $("#compare").open, focus: document.activeElement.id,
          pictures: [$("#before").src === source, $("#after").src === button.querySelector("img").src],
          place: $("#place").textContent, prompt: $("#compare-prompt").textContent,
        };
        cut.value = 20; cut.dispatchEvent(new Event("input"));
        answer.clip = getComputedStyle($("#before")).clipPath;
        answer.says = cut.getAttribute("aria-valuetext");
        choose("input[value=reconstruction]");
        answer.reconstruction = $("#before").src === all(".reconstruction img")[1].src;
        $("#next").click(); answer.next = $("#place").textContent;
        $("#close").click();
        await until(() => document.activeElement === all(".compare")[3]);
        answer.after = [$("#compare").open, document.activeElement === all(".compare")[3]];
        """,
    )
    assert answer == {
        "open": True,
        "focus": "cut",
        "pictures": [True, True],
        "place": "3 of 6",
        "prompt": "the zebra of horse.jpg",
        "clip": "inset(0px 80% 0px 0px)",
        "says": "20% source, the rest result",
        "reconstruction": True,
        "next": "4 of 6",
        "after": [False, True],
    }


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 800)])
def test_nothing_sticks_out_at_any_width(gallery: Run, width: int, height: int) -> None:
    folder = gallery.outputs.root
    shot = folder / "shot.png"
    size = f"--window-size={width},{height}"
    browse(folder / "report.html", size, f"--screenshot={shot}")
    with Image.open(shot) as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 1000  # the pictures are noise
    script = """
        const unseen = () => seen(".frame img").filter((e) => !e.naturalWidth);
        await until(() => { unseen()[0]?.scrollIntoView(); return !unseen().length; });  // they are loaded when near
        answer = [document.documentElement.scrollWidth - innerWidth, unseen().length];
    """
    assert drive(gallery, script, size) == [0, 0]


def test_what_is_scrolled_to_is_not_hidden_by_the_tools(gallery: Run) -> None:
    """They take two lines in a window of this width."""
    script = """
        const places = () => [$("#tools"), $("#r5")].map((e) => e.getBoundingClientRect());
        const below = () => { $("#r5").scrollIntoView(); const [tools, tile] = places(); return tile.top >= tools.bottom; };
        await until(below);
        answer = [places()[0].height > 96, below(), places()[1].top < innerHeight];
    """
    assert drive(gallery, script, "--window-size=900,500") == [True, True, True]


def test_two_thousand_results_stay_usable(run: Run) -> None:
    for number in range(1000):
        source = f"photos/{number}.jpg"
        trajectory = run.trajectory(source)
        for prompt in ("a zebra", "a statue"):
            run.result(source, prompt, trajectory, reconstruction_psnr=20 + number / 100)
    size = len(run.report())
    assert size < 20_000_000
    assert drive(
        run,
        """
        change("#sort", "worst"); change("#text", "zebra");
        all(".compare").at(-1).click();
        answer = [$("#count").textContent, $(".card h2").textContent, document.querySelector("#compare").open];
        """,
    ) == ["1,000 of 2,000 results", "photos/0.jpg", True]


def test_videos_play(run: Run) -> None:
    run.video("wolf.mp4", "a shiny silver robotic wolf")
    run.result("cat.jpg", "a marble cat", run.trajectory("cat.jpg"))
    run.report()
    played = drive(
        run,
        """
        const videos = all("video");
        for (const video of videos) { video.muted = true; await video.play(); }
        await until(() => videos.every((v) => v.currentTime >= 0.2));
        answer = videos.map((v) => [v.getAttribute("aria-label"), v.videoWidth, v.readyState >= 2, v.currentTime > 0, v.error]);
        """,
        "--autoplay-policy=no-user-gesture-required",
    )
    assert played == [
        ["Source: wolf.mp4", 32, True, True, None],
        ["Reconstruction of wolf.mp4", 32, True, True, None],
        ["Result: a shiny silver robotic wolf", 32, True, True, None],
    ]


def test_a_video_plays_by_itself_in_view_and_waits_out_of_it(run: Run) -> None:
    run.video("wolf.mp4", "a shiny silver robotic wolf")
    for number in range(30):
        run.result(f"{number}.jpg", "a marble cat", run.trajectory(f"{number}.jpg", size=200), 200)
    run.video("last.mp4", "a bronze wolf")
    run.report()
    answer = drive(
        run,
        """
        const [first, last] = [all("video")[0], all("video").at(-1)];
        await until(() => !first.paused);
        answer = {first: first.paused, last: [last.paused, last.readyState]};
        last.scrollIntoView();
        await until(() => first.paused && !last.paused);
        answer.scrolled = [first.paused, last.paused];
        """,
        "--autoplay-policy=no-user-gesture-required",
        "--window-size=1000,700",
    )
    assert answer == {"first": False, "last": [True, 0], "scrolled": [True, False]}


def test_videos_are_allowed_by_the_policy(run: Run, tmp_path: Path) -> None:
    run.video("wolf.mp4", "a shiny silver robotic wolf")
    run.report()
    shot = tmp_path / "shot.png"
    browse(run.outputs.root / "report.html", f"--screenshot={shot}", "--window-size=1000,900")
    assert np.asarray(Image.open(shot).convert("L")).std() > 5
    assert "media-src data:" in (run.outputs.root / "report.html").read_text()
