"""Means with confidence intervals, and the tables that show them: one per method, or all in the layout of PIE-Bench's paper."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from pnp_batch.evaluation.columns import better
from pnp_batch.evaluation.measures import is_nan, is_number
from pnp_batch.evaluation.scores import Score
from pnp_batch.evaluation.values import Value
from pnp_batch.names import counted

# PIE-Bench's columns: their head, ours with masks and without, and the factor its tables show. PSNR, LPIPS, MSE and SSIM are of
# the background, with the edited part black; structure and "whole" are of the whole picture.
PIE_COLUMNS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("Structure distance x10³ ↓", ("structure_distance_pie", "structure_distance"), 1e3),
    ("PSNR ↑", ("psnr_pie", "psnr"), 1),
    ("LPIPS x10³ ↓", ("lpips_pie", "lpips"), 1e3),
    ("MSE x10⁴ ↓", ("mse_pie", "mse"), 1e4),
    ("SSIM x10² ↑", ("ssim_pie", "ssim"), 1e2),
    ("CLIP whole ↑", ("clip_similarity",), 1e2),
    ("CLIP edited ↑", ("clip_similarity_inside",), 1e2),
)


@dataclass(frozen=True)
class Summary:
    """A column of some results.

    Attributes:
        mean: Of the finite numbers; NaN where there is none.
        half: Half of the 95% confidence interval of the mean (Student's t); NaN for fewer than two numbers.
        n: Finite numbers.
        nan: Computations that gave no finite number; never averaged.
        none: Results it could not be computed for.
    """

    mean: float
    half: float
    n: int
    nan: int
    none: int

    def __str__(self) -> str:
        if not self.n:
            return "-"
        return f"{self.mean:.4g}" + (f" ± {self.half:.2g}" if math.isfinite(self.half) else "")


def summarised(values: Sequence[Value], factor: float = 1.0) -> Summary:
    """Mean and 95% confidence interval of a column, every number times `factor`."""
    numbers = [value * factor for value in values if isinstance(value, float) and is_number(value)]
    nan = sum(map(is_nan, values))
    n = len(numbers)
    mean = math.fsum(numbers) / n if n else math.nan
    half = math.nan
    if n > 1:
        variance = math.fsum((value - mean) ** 2 for value in numbers) / (n - 1)
        half = student_t95(n - 1) * math.sqrt(variance / n)
    return Summary(mean, half, n, nan, len(values) - n - nan)


def student_t95(degrees: int) -> float:
    """The 97.5% quantile of Student's t: exact for 1 and 2 degrees of freedom, else to 0.3% (Cornish-Fisher expansion)."""
    if degrees == 1:
        return math.tan(0.475 * math.pi)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = 1.959963984540054, degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / float(v) ** power for power, term in enumerate(terms, 1))


def reasons(scores: Iterable[Score]) -> list[str]:
    """Why numbers are missing: each reason once, with the columns and how many results it concerns."""
    count: Counter[tuple[str, str]] = Counter()
    for score in scores:
        count.update((value, column) for column, value in score.values.items() if isinstance(value, str))
    columns: dict[tuple[str, int], list[str]] = {}
    for (reason, column), times in count.items():
        columns.setdefault((reason, times), []).append(column)
    return [
        f"{', '.join(names)}: not computed for {counted(times, 'result')}: {reason}"
        for (reason, times), names in columns.items()
    ]


def by_method(scores: Iterable[Score]) -> dict[str, list[Score]]:
    """Results of each method, in order of appearance."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.method, []).append(score)
    return groups


def columns_of(scores: Iterable[Score]) -> dict[str, list[Value]]:
    """All values of each column."""
    columns: dict[str, list[Value]] = {}
    for score in scores:
        for name, value in score.values.items():
            columns.setdefault(name, []).append(value)
    return columns


def method_table(method: str, scores: Sequence[Score]) -> Table:
    """Every column of one method's results: mean, interval, how many numbers, how many NaN, how many missing."""
    title = f"{method}: {counted(len(scores), 'result')} on {_hardware(scores)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("metric", "better", "mean", "95% interval", "n", "NaN", "missing"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for name, values in columns_of(scores).items():
        found = summarised(values)
        low, high = found.mean - found.half, found.mean + found.half
        interval = f"{low:.4g} to {high:.4g}" if math.isfinite(found.half) else "-"
        mean = f"{found.mean:.4g}" if found.n else "-"
        table.add_row(name, better(name), mean, interval, *map(str, (found.n, found.nan, found.none)))
    return table


def pie_table(scores: Sequence[Score]) -> Table:
    """One row per method in the layout of PIE-Bench's tables (Ju et al. 2023), as Markdown: mean ± half of the 95% interval.

    A cell says its own n where that is not the row's, and is marked where it is not of PIE-Bench's own column.
    """
    table = Table(box=box.MARKDOWN, caption_justify="left")
    heads = ["Method", *(head for head, _, _ in PIE_COLUMNS), "n", "NaN", "hardware", "s/result"]
    for head in heads:
        table.add_column(head, no_wrap=True)
    marked: dict[str, str] = {}
    for method, own in by_method(scores).items():
        columns = columns_of(own)
        chosen = [_first(columns, names) for _, names, _ in PIE_COLUMNS]
        found = [
            summarised(columns.get(name, ()), factor) for name, (_, _, factor) in zip(chosen, PIE_COLUMNS, strict=True)
        ]
        others = {name: names[0] for name, (_, names, _) in zip(chosen, PIE_COLUMNS, strict=True) if name != names[0]}
        marked |= others
        cells = [_cell(each, len(own), name in others) for each, name in zip(found, chosen, strict=True)]
        seconds = math.fsum(score.seconds for score in own) / len(own)
        nan = sum(summary.nan for summary in found)
        table.add_row(method, *cells, str(len(own)), str(nan), _hardware(own), f"{seconds:.3g}")
    if marked:
        table.caption = "† not PIE-Bench's: " + ", ".join(f"{own} in place of {its}" for own, its in marked.items())
    return table


def _cell(found: Summary, results: int, is_other: bool) -> str:
    own_n = f" (n={found.n})" if 0 < found.n < results else ""
    return f"{found}{'†' if is_other else ''}{own_n}"


def _hardware(scores: Iterable[Score]) -> str:
    return ", ".join(sorted({score.hardware for score in scores}))


def _first(columns: Mapping[str, Sequence[Value]], names: Sequence[str]) -> str:
    """The first of some columns that holds a number; the first of all where none does."""
    return next((name for name in names if any(map(is_number, columns.get(name, ())))), names[0])
