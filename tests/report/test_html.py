from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from report_run import Run, picture

from pnp_batch.manifest import PromptSpec
from pnp_batch.media.images import encode_png
from pnp_batch.report import html, write_report
from pnp_batch.report.html import verdict
from pnp_batch.report.thumbnails import MAX_SIDE, thumbnail_of

HOSTILE = '</script></style><img src=x onerror=\'alert(1)\'>"><svg onload="alert(2)">{{ 7*7 }}<!--'


class Page(HTMLParser):
    """The elements of a page, as a browser's tokenizer sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All text, every run of white space as one space."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a name."""
        return [attrs for name, attrs in self.elements if name == tag]

    def of_class(self, name: str) -> list[dict[str, str]]:
        """The attributes of every element of a class."""
        return [attrs for _, attrs in self.elements if name in attrs.get("class", "").split()]


def test_a_page_shows_counts_sources_results_and_settings(run: Run) -> None:
    for source in ("photos/horse.jpg", "photos/cat.jpg"):
        trajectory = run.trajectory(source)
        for prompt in ("a bronze statue", "a zebra in the snow", "a lego toy"):
            run.result(source, prompt, trajectory)
    text = run.report()
    page = Page(text)
    assert len(page.of_class("card")) == 2
    assert len(page.of_class("tile")) == 6
    assert len(page.all("img")) == 2 * 2 + 6 + 2  # sources, reconstructions, results, and two for the comparison
    for expected in ("horses.yaml", "a zebra in the snow", "builtin:shapes", "num_inference_steps", "Inverted well"):
        assert expected in page.text
    assert "Results 6 Sources 2 Failures 0" in page.text
    assert "pnp-batch 0.1.0, torch 2.9.0" in page.text


def test_every_picture_has_an_alternative_text_and_every_control_a_name(run: Run) -> None:
    run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"))
    page = Page(run.report())
    alts = [attrs["alt"] for attrs in page.all("img") if "src" in attrs]
    assert alts == ["Source: horse.jpg", "Reconstruction of horse.jpg", "Result: a zebra"]
    assert all("aria-label" in attrs for attrs in page.all("input") if attrs["type"] == "range")
    assert page.all("html") == [{"lang": "en"}]


def test_prompts_and_names_are_text_and_never_markup(run: Run) -> None:
    trajectory = run.trajectory(HOSTILE)
    run.result(HOSTILE, HOSTILE, trajectory, negative_prompt=HOSTILE, model=HOSTILE, **{HOSTILE: HOSTILE})
    run.result(
        HOSTILE, "javascript:alert(1)", trajectory, file_name="images/<img src=x onerror=\"alert('3')\">#?%41.png"
    )
    failure = dict.fromkeys(("source", "prompt", "stage", "error"), HOSTILE)
    text = run.report([failure | {"traceback": HOSTILE}, failure | {"traceback": f"{HOSTILE}\n{HOSTILE}"}], HOSTILE)

    page = Page(text)
    names = {name for _, attrs in page.elements for name in attrs}
    assert not {name for name in names if name.startswith("on")}
    assert not page.all("svg")
    assert len(page.all("script")) == 1
    assert text.count("<script") == text.count("</script>") == 1
    assert text.count("</style>") == 1
    assert "<!--" not in text
    copies = [attrs["data-copy"] for attrs in page.of_class("copy")]
    assert yaml.safe_load(next(text for text in copies if text.startswith("- ")))[0]["prompt"] == HOSTILE
    command = shlex.split(next(text for text in copies if "--prompt" in text))
    assert command == ["pnp-batch", "run", HOSTILE, "--source", HOSTILE, "--prompt", HOSTILE]
    assert all(attrs["src"].startswith("data:image/") for attrs in page.all("img") if "src" in attrs)


def test_a_long_video_says_that_its_beginning_is_shown(run: Run) -> None:
    run.video("wolf.mp4", "a robotic wolf", frames=241, duration=10.0)
    run.video("cat.mp4", "a robotic cat", frames=240, duration=10.0)
    assert Page(run.report()).text.count("the first 240 frames are shown") == 1


def test_a_command_for_a_result_that_is_there_says_what_it_does(run: Run) -> None:
    row = run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"))
    assert "computes nothing until the store has lost it" in Page(run.report()).text
    (run.outputs.root / row["file_name"]).unlink()
    assert "computes nothing" not in Page(run.report()).text


def test_links_lead_to_the_pictures_and_nowhere_else(run: Run) -> None:
    name = 'images/ü/50% of "a" <b>#1?x=1&amp;.png'
    run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"), file_name=name)
    page = Page(run.report([{"source": "a", "prompt": "b", "stage": "c", "error": "d", "traceback": "logs/e.txt"}]))
    (link,) = (attrs["href"] for attrs in page.all("a") if not attrs["href"].startswith("#"))
    parts = urlsplit(link)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
    assert unquote(parts.path) == f"./{name}"


def test_the_page_needs_nothing_from_outside(run: Run) -> None:
    run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"))
    text = run.report()
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert not Page(text).all("link")
    policy = next(attrs["content"] for attrs in Page(text).all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    pages = []
    for folder in ("a", "b"):
        run = Run(tmp_path / folder)
        for source in ("horse.jpg", "cat.jpg"):
            run.result(source, "a zebra", run.trajectory(source, size=200), size=200)
        pages += [run.report(), run.report()]
    assert len(set(pages)) == 1


def test_a_source_is_embedded_once_however_many_results_it_has(run: Run) -> None:
    trajectory = run.trajectory("horse.jpg", size=40)
    for number in range(5):
        run.result("horse.jpg", f"prompt {number}", trajectory)
    text = run.report()
    assert text.count(thumbnail_of(picture("horse.jpg", 40)).uri) == 1
    assert text.count(thumbnail_of(picture("horse.jpg", 40)[::-1]).uri) == 1


def test_a_source_inverted_in_two_ways_gets_two_cards(run: Run) -> None:
    for steps in (50, 999):
        trajectory = run.trajectory("horse.jpg", steps=steps)
        own = {"inverted_by": "ddim", "inversion_rows": steps, "num_inversion_steps": steps}
        run.result("horse.jpg", "a zebra", trajectory, **own)
    page = Page(run.report())
    assert "inverted by ddim in 50 UNet rows · num_inversion_steps 50" in page.text
    assert "inverted by ddim in 999 UNet rows · num_inversion_steps 999" in page.text


def test_a_generated_source_is_not_said_to_be_badly_inverted(run: Run) -> None:
    missing = {"reconstruction_psnr": None, "vae_psnr": None}
    run.result("generate: a horse (seed 3)", "a zebra", run.trajectory("g"), **missing)
    page = Page(run.report())
    assert len([attrs for attrs in page.all("img") if "src" in attrs]) == 2
    assert "Not inverted" in page.text
    assert [attrs["data-level"] for attrs in page.of_class("card")] == ["none"]


@pytest.mark.parametrize(
    ("psnr", "vae", "level"),
    [(29.6, 30.0, "good"), (31.0, 30.0, "good"), (28.0, 30.0, "fair"), (20.0, 30.0, "poor"), (9.4, 9.5, "good")],
)
def test_an_inversion_is_judged_against_the_vae_alone(psnr: float, vae: float, level: str) -> None:
    assert verdict(psnr, vae).level == level
    assert f"{psnr:.1f} dB" in verdict(psnr, vae).reason


def test_what_is_missing_is_said(run: Run) -> None:
    run.result("lost-result.jpg", "a", None)
    run.result("lost-inversion.jpg", "b", "0" * 64)
    gone = run.result("lost-picture.jpg", "c", run.trajectory("lost-picture.jpg"))
    (run.outputs.root / gone["file_name"]).unlink()
    broken = run.result("broken-picture.jpg", "d", run.trajectory("broken-picture.jpg"))
    (run.outputs.root / broken["file_name"]).write_bytes(b"\x89PNG no more")
    page = Page(run.report())
    assert page.text.count("so source and reconstruction cannot be shown") == 2
    assert page.text.count("Picture missing or unreadable") == 2
    assert len(page.of_class("full")) == 2


def test_a_damaged_inversion_is_said(run: Run) -> None:
    key = run.trajectory("horse.jpg")
    run.result("horse.jpg", "a zebra", key)
    shard = run.store.folder("invert", key) / "preview.safetensors"
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "The stored inversion is damaged" in run.report()


def test_a_picture_outside_the_folder_is_not_shown(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode_png(picture("secret", 16)))
    for name in ("../secret.png", str(secret), "images/../../secret.png"):
        run.outputs.add_row({"file_name": name, "source": "a", "prompt": "b", "key": "0" * 64})
    text = run.report()
    assert text.count("Picture missing or unreadable") == 3
    assert thumbnail_of(picture("secret", 16)).uri not in text


def test_failures_are_shown_with_their_errors(run: Run) -> None:
    run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"))
    error = {"source": "horse.jpg", "prompt": "a cat", "stage": "translate", "error": "the result holds NaN"}
    vanished = {
        "source": "caf\udce9.png",
        "prompt": None,
        "stage": "read",
        "error": "no such file",
        "traceback": "Trace\n  back",
    }
    page = Page(run.report([error, vanished]))
    assert "Results 1 Sources 2 Failures 2" in page.text
    assert "translate horse.jpg a cat the result holds NaN" in page.text
    assert "1 failed" in page.text
    assert "caf\\udce9.png no such file" in page.text
    assert "Trace back" in page.text


def test_a_traceback_file_is_shown_unless_it_lies_elsewhere(run: Run, tmp_path: Path) -> None:
    run.outputs.write_file("tracebacks/a b.txt", b"Traceback:\n  it broke here")
    (tmp_path / "secret.txt").write_text("secret")
    places = (
        "tracebacks/a b.txt",
        "tracebacks/gone.txt",
        "../secret.txt",
        str(tmp_path / "secret.txt"),
        "javascript:alert(1)",
    )
    page = Page(run.report([{"source": "a", "error": "b", "traceback": place} for place in places]))
    assert len(page.all("pre")) == 1
    assert "it broke here" in page.text
    assert "../secret.txt" in page.text and "Traceback: secret" not in page.text


def test_an_empty_run_has_a_page_too(run: Run) -> None:
    assert "No results yet" in run.report()


@pytest.mark.parametrize(
    ("converged", "scheme", "said"),
    [
        (None, "fixed-point", "yes"),
        (False, "ddim", "no"),
        (False, "fixed-point", "no"),
        (None, "ddim", "does not apply"),
        (None, None, "does not apply"),
    ],
)
def test_whether_the_inversion_converged_is_said_in_words(
    run: Run, converged: bool | None, scheme: str | None, said: str
) -> None:
    trajectory = run.trajectory("horse.jpg")
    run.result("horse.jpg", "a zebra", trajectory, inversion_converged=converged, inverted_by=scheme, inversion_rows=28)
    assert f"inversion_converged {said} " in Page(run.report()).text


def test_settings_can_be_pasted_into_a_manifest(run: Run) -> None:
    run.result("horse.jpg", 'a "zebra": {in} [the] snow # 1', run.trajectory("horse.jpg"))
    _, button = Page(run.report()).of_class("copy")
    (entry,) = yaml.safe_load(button["data-copy"])
    spec = PromptSpec.model_validate(entry)
    assert (spec.prompt, spec.pnp_f_layers, spec.width) == ('a "zebra": {in} [the] snow # 1', (4,), 16)


def test_every_result_says_how_to_make_it_again(run: Run) -> None:
    row = run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"))
    button, _ = Page(run.report(name="my runs/horses.yaml")).of_class("copy")
    assert shlex.split(button["data-copy"]) == ["pnp-batch", "run", "my runs/horses.yaml", "--key", row["key"][:16]]


def test_figures_of_the_evaluation_and_of_the_gate_stand_with_their_result(run: Run) -> None:
    trajectory = run.trajectory("horse.jpg")
    first = run.result(
        "horse.jpg", "a zebra", trajectory, quality="flagged", quality_attempt=0, quality_reason="too <dark>"
    )
    second = run.result(
        "horse.jpg", "a statue", trajectory, quality="passed", quality_figures={"clip_similarity": 0.25}
    )
    evaluated = {"source": "horse.jpg", "psnr": 12.34567, "lpips": None, "seconds": 3.0, "nan": []}
    lines = [evaluated | {"key": first["key"]}, evaluated | {"key": "a result that is no more", "psnr": 99.0}]
    run.outputs.write_file("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    page = Page(run.report())
    figures = [json.loads(attrs["data-figures"]) for attrs in page.of_class("tile")]
    assert figures == [
        {"psnr": 12.34567, "reconstruction_psnr": 29.5},
        {"clip_similarity": 0.25, "reconstruction_psnr": 29.5},
    ]
    assert [attrs["data-quality"] for attrs in page.of_class("tile")] == ["flagged", "passed"]
    assert "too <dark>" in page.text and "1 flagged" in page.text and "12.35" in page.text
    options = [attrs["value"] for attrs in page.all("option") if "data-better" in attrs]
    assert options == ["psnr", "reconstruction_psnr", "clip_similarity"]
    assert second["key"][:16] in page.text


def test_plots_show_every_result_once(run: Run) -> None:
    rows = []
    for number in range(40):
        row = run.result("horse.jpg", f"prompt {number}", run.trajectory("horse.jpg"))
        figures = {"structure_distance": number / 100, "clip_similarity": 0.2 + number / 1000, "psnr": 20.0}
        rows.append({"key": row["key"], "source": "horse.jpg", **figures})
    run.outputs.write_file("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    page = Page(run.report())
    points = page.all("circle")
    assert len(points) == 40
    assert (points[0]["cx"], points[-1]["cx"]) == ("66.0", "426.0")
    assert (points[0]["cy"], points[-1]["cy"]) == ("256.0", "14.0")
    counts = re.findall(r"to [\d.]+: (\d+) results?", page.text)
    assert sum(map(int, counts)) == 2 * 40  # structure and text; what is the same for all has no plot
    assert "Histogram of psnr" not in str(page.elements)


def test_a_second_report_makes_no_thumbnail_again(run: Run) -> None:
    for number in range(3):
        run.result(f"{number}.jpg", "a zebra", run.trajectory(f"{number}.jpg", size=400), size=400)
    text = run.report()
    kept = {path: path.stat().st_mtime_ns for path in run.store.root.glob("thumbnails/*/*")}
    assert len(kept) == 3 * 3  # source, reconstruction and result
    assert run.report() == text
    assert {path: path.stat().st_mtime_ns for path in run.store.root.glob("thumbnails/*/*")} == kept
    next(iter(kept)).write_text("no thumbnail")
    assert run.report() == text
    run.outputs.write_file("images/1.png", encode_png(picture("another", 400)))
    assert run.report() != text


def test_large_pictures_become_thumbnails_and_small_ones_stay_as_they_are() -> None:
    large, small = thumbnail_of(picture("a", 700)[:350]), thumbnail_of(picture("a", 64))
    assert (large.width, large.height, large.is_pixel_art) == (MAX_SIDE, MAX_SIDE // 2, False)
    assert (small.width, small.height, small.is_pixel_art) == (64, 64, True)
    assert small.uri.startswith("data:image/png;base64,")


def test_what_is_too_much_for_one_page_is_counted_and_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MAX_RESULTS", 3)
    trajectory = run.trajectory("horse.jpg")
    for number in range(5):
        run.result("horse.jpg", f"prompt {number}", trajectory)
    page = Page(run.report())
    assert len(page.of_class("tile")) == 3
    assert "first 3 of 5 results" in page.text


def test_the_writer_holds_no_more_than_a_few_pictures(run: Run) -> None:
    trajectory = run.trajectory("horse.jpg", size=96)
    for number in range(120):
        run.result("horse.jpg", f"prompt {number}", trajectory, size=96)
    run.report()
    tracemalloc.start()
    try:
        size = write_report("horses.yaml", run.outputs, run.store, ()).stat().st_size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 4_000_000
    assert peak < 1_500_000


def test_nothing_half_written_stays_behind(run: Run) -> None:
    run.result("horse.jpg", "a zebra", run.trajectory("horse.jpg"))
    (run.outputs.root / "report.html").mkdir()
    before = sorted(path.name for path in run.outputs.root.iterdir())
    with pytest.raises(OSError):
        run.report()
    assert sorted(path.name for path in run.outputs.root.iterdir()) == before


def test_writing_a_report_does_not_import_torch() -> None:
    code = (
        "import sys, json, pnp_batch.report; print(json.dumps([m for m in ('torch', 'diffusers') if m in sys.modules]))"
    )
    answer: Any = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    assert answer == []
