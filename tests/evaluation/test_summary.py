"""Means, intervals and tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from scipy import stats

from pnp_batch.evaluation.scores import Score
from pnp_batch.evaluation.summary import method_table, pie_table, reasons, student_t95, summarised


def score(method: str = "pnp", **values: float | str) -> Score:
    return Score("images/a.png", "a.png", "a star", method, values, "k", "cpu", 2.0)


def text_of(table: Table) -> str:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 10, 30, 699])
def test_student_quantile(degrees: int) -> None:
    assert student_t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.003)


def test_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).normal(3, 2, 40).tolist()
    found = summarised(values)
    low, high = stats.t.interval(0.95, 39, np.mean(values), stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))


def test_nan_and_missing_are_counted_and_never_averaged() -> None:
    found = summarised([1.0, math.nan, "no weights", 3.0, math.inf])
    assert (found.mean, found.n, found.nan, found.none) == (2.0, 2, 2, 1)


def test_one_number_has_no_interval_and_none_has_no_mean() -> None:
    assert math.isnan(summarised([1.0]).half)
    assert str(summarised([1.0])) == "1"
    assert str(summarised(["no"])) == "-"


def test_a_reason_is_said_once_for_all_columns_and_results_it_concerns() -> None:
    said = reasons([score(psnr=1.0, clip_similarity="no weights", text_gain="no weights") for _ in range(3)])
    assert said == ["clip_similarity, text_gain: not computed for 3 results: no weights"]


def test_method_table_shows_counts() -> None:
    text = text_of(method_table("pnp", [score(psnr=20.0, ssim=math.nan), score(psnr=22.0, ssim="small")]))
    row = next(line for line in text.splitlines() if "psnr" in line).split()
    assert row == ["psnr", "↑", "21", "8.294", "to", "33.71", "2", "0", "0"]
    assert next(line for line in text.splitlines() if "ssim" in line).split() == ["ssim", "↑", "-", "-", "0", "1", "1"]


def test_pie_table_has_one_row_per_method_and_prefers_masked_columns() -> None:
    rows = [
        score("pnp", structure_distance=0.0282, psnr=10.0, psnr_pie=22.28, mse_pie=0.00836, clip_similarity=0.2541),
        score("sdedit", structure_distance=0.05, psnr=11.0, mse=0.02, clip_similarity=0.26),
    ]
    head, _, pnp, sdedit, *notes = cells_of(pie_table(rows))
    assert head[:5] == ["Method", "Structure distance x10³ ↓", "PSNR ↑", "LPIPS x10³ ↓", "MSE x10⁴ ↓"]
    assert pnp == ["pnp", "28.2†", "22.28", "-", "83.6", "-", "25.41", "-", "1", "0", "cpu", "2"]
    assert sdedit[:5] == ["sdedit", "50†", "11†", "-", "200†"]
    note = " ".join(word for (line,) in notes for word in line.split())
    assert note.startswith("† not PIE-Bench's: structure_distance in place of structure_distance_pie, psnr in place of")


def cells_of(table: Table) -> list[list[str]]:
    lines = text_of(table).strip().splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def test_pie_table_says_n_in_a_cell_where_it_is_not_that_of_the_row() -> None:
    rows = [score(psnr_pie=20.0, mse_pie=0.01), score(psnr_pie="the pictures are equal there", mse_pie=0.0)]
    _, _, pnp, *notes = cells_of(pie_table(rows))
    assert pnp[2] == "20 (n=1)" and "(n=" not in pnp[4] and pnp[-4] == "2"
    assert not notes
