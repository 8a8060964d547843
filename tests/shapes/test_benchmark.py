"""The benchmark: its cases, its arithmetic on made-up outcomes, and the whole of it once at few steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pnp_batch.cli import app
from pnp_batch.shapes import benchmark
from pnp_batch.shapes.ablations import plain_cases, site_settings, threshold_settings
from pnp_batch.shapes.benchmark import EDITS, FIRST, METHODS, Bench, Case, Outcome, Setting, cases, margins
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
    json.dumps(rows)


def test_a_margin_is_measured_from_the_line_between_two_baselines() -> None:
    structure, text = {PNP: 0.8, SWAP: 0.3, HALF: 0.7}, {PNP: 0.75, SWAP: 1.0, HALF: 0.5}
    (margin,) = margins(bench(structure, text))
    assert margin.structure == pytest.approx(0.8 - 0.5)  # halfway between .7 at .5 and .3 at 1
    assert margin.low < margin.structure < margin.high


def test_a_baseline_that_is_better_makes_the_margin_negative() -> None:
    (margin,) = margins(bench({PNP: 0.6, SWAP: 0.8, HALF: 0.1}, {PNP: 1.0, SWAP: 1.0, HALF: 1.0}))
    assert margin.structure == pytest.approx(-0.2)
    assert margin.high < 0


def test_the_hull_falls_and_bends_outwards() -> None:
    points = [(0.0, 0.9), (0.5, 0.5), (0.5, 0.8), (1.0, 0.3), (0.9, 0.2), (0.75, 0.4)]
    assert benchmark._hull(points) == [(0.0, 0.9), (0.5, 0.8), (1.0, 0.3)]


def run(folder: Path, *options: str) -> tuple[str, list[dict[str, Any]]]:
    rows = folder / "rows.json"
    arguments = ["bench", "shapes", "--output", str(folder), "--json", str(rows), "--steps", "4", *options]
    outcome = CliRunner().invoke(app, arguments)
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return outcome.output, json.loads(rows.read_text())


@pytest.mark.slow
def test_the_whole_benchmark_and_again(tmp_path: Path) -> None:
    said, rows = run(tmp_path, "--scenes", "2")
    assert len(rows) == len(METHODS)
    assert all({"method", "setting", "structure_iou", "text_accuracy", "n", "ci95"} <= row.keys() for row in rows)
    assert "mask IoU" in said
    assert (tmp_path / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png;base64" in (tmp_path / "benchmark.html").read_text()
    results = tmp_path / "methods/results"
    before = {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}
    assert run(tmp_path, "--scenes", "2")[1] == rows
    assert before == {path: path.stat().st_mtime_ns for path in results.rglob("*.safetensors")}


@pytest.mark.slow
def test_all_ablations_on_one_page(tmp_path: Path) -> None:
    said, rows = run(tmp_path, "--scenes", "1", "--ablations")
    assert {row["ablation"] for row in rows} == {"thresholds", "sites", "negative prompting", "inversion"}
    assert "reconstruction PSNR" in said
    assert (tmp_path / "ablations.png").exists()
    assert "Negative prompting" in (tmp_path / "ablations.html").read_text()
