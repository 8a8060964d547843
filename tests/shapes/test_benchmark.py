"""The benchmark: its cases, its arithmetic on made-up outcomes, and the whole of it once at few steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from typer.testing import CliRunner

from pnp_batch.cli import app
from pnp_batch.shapes import plots
from pnp_batch.shapes.ablations import plain_cases, site_settings, threshold_settings
from pnp_batch.shapes.benchmark import (
    CURVES,
    EDITS,
    FIRST,
    METHODS,
    Bench,
    Case,
    Outcome,
    Setting,
    cases,
    hull,
    margins,
    p2p,
    wilson95,
)
from pnp_batch.shapes.judge import WEIGHTS
from pnp_batch.shapes.scenes import VOCABULARY

BLACK = np.zeros((64, 64, 3), np.uint8)


def test_cases_change_what_they_say_and_nothing_else() -> None:
    found = cases(8)
    assert [case.number for case in found] == [n for n in range(8) for _ in range(2)]
    assert {case.edit for case in found} == set(EDITS)
    for case in found:
        assert case.source.seed >= FIRST
        assert case.source.style == "photo"
        changed = {part for part in VOCABULARY if getattr(case.source, part) != getattr(case.target, part)}
        assert changed == ({"material", "background"} if case.edit == EDITS[0] else {case.edit})
        assert replace(case.target, **{part: getattr(case.source, part) for part in VOCABULARY}) == case.source
    assert {case.target.style for case in found} == {"photo", "painting", "sketch"}


def test_a_sketch_need_not_show_colours() -> None:
    source = cases(1)[0].source
    target = replace(source, style="sketch", material="red" if source.material != "red" else "blue")
    assert Case(0, "style", source, target).new_words == {"style": "sketch"}


def test_plain_scenes_are_plain() -> None:
    assert all(case.source.material not in ("striped", "checkered", "dotted", "gold") for case in plain_cases(5))
    assert len({case.source.seed for case in plain_cases(5)}) == 5


def test_settings_are_told_apart() -> None:
    for settings in (METHODS, threshold_settings(), site_settings(range(3, 12), range(3, 12))):
        assert len({(setting.method, setting.name) for setting in settings}) == len(settings)


PNP, SWAP, HALF = Setting("pnp", "0.8 / 0.5"), Setting("p2p", "word swap"), Setting("sdedit", "strength 0.5")


def bench(structure: dict[Setting, float], text: dict[Setting, float], scenes: int = 40) -> Bench:
    """Outcomes around given means: structure alternates by 0.1, text is right in the first scenes."""

    def outcomes() -> Iterator[Outcome]:
        for case in [case for case in cases(scenes) if case.edit == EDITS[0]]:
            for setting, mean in structure.items():
                value = mean + (0.05 if case.number % 2 else -0.05)
                yield Outcome(case, setting, value, case.number < text[setting] * scenes, True, BLACK, {})

    return Bench(list(structure), list(outcomes()), {"picture": 0.95, "reconstruction": 0.9}, {"mask_iou": 0.95})


def test_rows_hold_means_and_intervals_over_scenes() -> None:
    rows = bench({PNP: 0.8, HALF: 0.4}, {PNP: 1.0, HALF: 0.5}).rows()
    assert [(row["method"], row["setting"]) for row in rows] == [("pnp", "0.8 / 0.5"), ("sdedit", "strength 0.5")]
    assert rows[0]["structure_iou"] == pytest.approx(0.8)
    assert rows[0]["ci95"] == pytest.approx(0.05 * (40 / 39) ** 0.5 / 40**0.5 * 2.0227, rel=1e-3)
    assert (rows[0]["text_accuracy"], rows[1]["text_accuracy"]) == (1.0, 0.5)
    assert rows[0]["n"] == 40
    assert (rows[0]["model"], rows[0]["steps"], rows[0]["scenes"]) == ("builtin:shapes", 50, 40)
    json.dumps(rows)


def test_the_interval_of_a_share_has_a_width_and_stays_within_0_and_1() -> None:
    row = bench({PNP: 0.8, HALF: 0.4}, {PNP: 1.0, HALF: 0.5}, scenes=18).rows()[0]
    assert row["text_high"] == 1.0
    assert row["text_low"] == pytest.approx(18 / (18 + 1.96**2), abs=1e-3)  # Wilson's closed form where all are right
    assert wilson95(0.0, 18) == pytest.approx((0.0, 1 - row["text_low"]))
    assert wilson95(0.3, 10) == pytest.approx((0.1078, 0.6032), abs=1e-4)  # as in Newcombe's tables
    for n in range(2, 200):  # however it is rounded
        assert wilson95(1.0, n)[1] == 1.0 and wilson95(0.0, n)[0] == 0.0


def test_one_scene_has_no_intervals() -> None:
    one = bench({PNP: 0.8, HALF: 0.4}, {PNP: 1.0, HALF: 1.0}, scenes=1)
    row = one.rows()[0]
    assert row["n"] == 1
    assert [row[key] for key in ("ci95", "text_low", "text_high", "shape_low", "shape_high")] == [None] * 5
    assert {(margin.low, margin.high) for margin in margins(one)} == {(None, None)}
    assert plots.trade_off(one)[:4] == b"\x89PNG"


def test_bars_end_at_1() -> None:
    row = {"structure_iou": 0.95, "ci95": 0.2, "text_accuracy": 1.0, "text_low": 0.8, "text_high": 1.0}
    assert plots._bars_of(row)["yerr"] == [[0.2], [pytest.approx(0.05)]]
    assert plots._bars_of(row)["xerr"] == [[pytest.approx(0.2)], [0.0]]


def test_labels_are_moved_apart_and_no_further() -> None:
    placed = plots._apart([0.9, 0.5, 0.5, 0.49, 0.1], 0.03)
    assert (placed[0], placed[-1]) == (0.9, 0.1)
    assert placed[1:4] == pytest.approx([0.5267, 0.4967, 0.4667], abs=1e-4)
    assert plots._apart([0.97, 0.97, 0.96, 0.5], 0.03) == pytest.approx([0.985, 0.955, 0.925, 0.5])  # below the title


def test_no_label_lies_over_another_though_all_points_lie_at_one_place() -> None:
    one = bench({setting: 0.5 for setting in METHODS}, {setting: n % 2 for n, setting in enumerate(METHODS)}, scenes=1)
    figure = Figure(figsize=(10, 7))
    axes = figure.subplots()
    axes.set(xlim=(-0.03, 1.45), ylim=(0, 1))
    plots._label(axes, list(zip(one.settings, one.rows(), strict=True)))
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [Text.get_window_extent(label, renderer) for label in axes.texts]
    assert len(boxes) == len(METHODS) and not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_both_methods_are_swept_alike() -> None:
    sweep = {(s.values["pnp_f_t"], s.values["pnp_attn_t"]) for s in METHODS if s.method == "pnp"}
    assert {(0.5, 0.5), (0.8, 0.5), (0.8, 0.8), (1.0, 0.5), (1.0, 1.0)} <= sweep
    swept = {(s.values["p2p_cross_replace"], s.values["p2p_self_replace"]) for s in METHODS if s.method == "p2p"}
    assert {(0.8, 0.4), (0.8, 0.6), (0.8, 0.8), (0.8, 1.0), (1.0, 1.0)} <= swept


def test_each_curve_is_of_its_own_baselines() -> None:
    wide, narrow = p2p(0.8, 0.8), p2p(0.8, 0.8, ", 4x4 cells", p2p_self_cells=16)
    structure, text = {PNP: 0.8, wide: 0.9, narrow: 0.6, HALF: 0.5}, dict.fromkeys((PNP, wide, narrow, HALF), 1.0)
    above = {margin.curve: margin.structure for margin in margins(bench(structure, text))}
    assert list(above) == list(CURVES)
    assert list(above.values()) == pytest.approx([-0.1, 0.2, 0.3])


def test_a_margin_is_measured_from_the_line_between_two_baselines() -> None:
    structure, text = {PNP: 0.8, SWAP: 0.3, HALF: 0.7}, {PNP: 0.75, SWAP: 1.0, HALF: 0.5}
    margin = margins(bench(structure, text))[0]
    assert margin.structure == pytest.approx(0.8 - 0.5)  # halfway between .7 at .5 and .3 at 1
    assert margin.low is not None
    assert margin.high is not None
    assert margin.low < margin.structure < margin.high


def test_a_baseline_that_is_better_makes_the_margin_negative() -> None:
    margin = margins(bench({PNP: 0.6, SWAP: 0.8, HALF: 0.1}, {PNP: 1.0, SWAP: 1.0, HALF: 1.0}))[0]
    assert margin.structure == pytest.approx(-0.2)
    assert margin.high is not None
    assert margin.high < 0


def test_the_hull_falls_and_bends_outwards() -> None:
    points = [(0.0, 0.9), (0.5, 0.5), (0.5, 0.8), (1.0, 0.3), (0.9, 0.2), (0.75, 0.4)]
    assert hull(points) == [(0.0, 0.9), (0.5, 0.8), (1.0, 0.3)]


def said_by(*arguments: str, code: int = 0) -> str:
    outcome = CliRunner().invoke(app, ["bench", "shapes", *arguments])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == code, outcome.output
    return outcome.output


def run(folder: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    rows = folder / "rows.json"
    said = said_by("--output", str(folder), "--json", str(rows), "--steps", "4", *options)
    return said, json.loads(rows.read_text())


TINY_SD = Path(__file__).parents[1] / "conformance/tiny-sd"


@pytest.mark.parametrize("ablations", [(), ("--ablations",)])
def test_a_model_of_another_size_is_refused_before_anything_is_computed(
    tmp_path: Path, ablations: tuple[str, ...]
) -> None:
    said = said_by("--output", str(tmp_path), "--model", str(TINY_SD), *ablations, code=2)
    assert "paints pictures of 128x128 pixels; scenes have 64x64" in said
    assert not list(tmp_path.glob("*/results"))


def test_a_relative_model_is_relative_to_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that is refused, so that nothing is computed: what matters is that it is found."""
    monkeypatch.chdir(TINY_SD.parent)
    for ablations in ((), ("--ablations",)):
        said = said_by("--output", str(tmp_path), "--model", TINY_SD.name, *ablations, code=2)
        assert "paints pictures of 128x128" in said
    said = said_by("--output", str(tmp_path / "o"), "--model", "nowhere", code=2)
    assert f"there is no such folder or file ({Path.cwd() / 'nowhere'})" in said and not (tmp_path / "o").exists()


def test_targets_of_the_wrong_kind_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for json_file in (tmp_path, tmp_path / "file/rows.json"):
        assert "cannot be a file" in said_by("--output", str(tmp_path / "o"), "--json", str(json_file), code=2)
    assert "is a file" in said_by("--output", str(tmp_path / "file"), code=2)
    assert "is no judge" in said_by("--output", str(tmp_path / "o"), "--judge", str(tmp_path / "file"), code=2)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.slow
def test_the_whole_benchmark_and_again(tmp_path: Path) -> None:
    said, rows = run(tmp_path, "--scenes", "2")
    assert len(rows) == len(METHODS)
    assert all({"method", "setting", "structure_iou", "text_accuracy", "n", "ci95"} <= row.keys() for row in rows)
    assert "mask IoU" in said
    assert str(tmp_path / "benchmark.html") in said.replace("\n", "")
    assert (tmp_path / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "benchmark.html").read_text()
    assert "data:image/png;base64" in page
    assert '<a href="methods/results/report.html">' in page
    assert (tmp_path / "methods/results/report.html").exists()
    results = tmp_path / "methods/results"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}
    assert run(tmp_path, "--scenes", "2", "--judge", str(WEIGHTS))[1] == rows
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}


@pytest.mark.slow
def test_all_ablations_on_one_page(tmp_path: Path) -> None:
    said, rows = run(tmp_path, "--scenes", "1", "--ablations")
    assert {row["ablation"] for row in rows} == {"thresholds", "sites", "negative prompting", "inversion"}
    assert all({"structure_iou", "text_accuracy", "n", "model", "steps", "scenes"} <= row.keys() for row in rows)
    assert "reconstruction PSNR" in said
    assert said.count("The judge on 512 held-out scenes") == 4  # with every table
    assert (tmp_path / "ablations.png").exists()
    page = (tmp_path / "ablations.html").read_text()
    assert "Negative prompting" in page
    assert "the VAE alone" in page
