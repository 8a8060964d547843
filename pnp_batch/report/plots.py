"""Plots of a run's metrics as SVG that stands in the page: a histogram for each, and structure against text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BINS = 16
# What is plotted against what: how far the layout is from the source's, and how well the text is met (the paper's figure).
ACROSS = ("structure_distance", "lpips", "mse", "psnr")
UP = ("clip_similarity", "text_gain")

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram.

    Attributes:
        low: The least value in it, rounded down where that takes in no other.
        high: The largest, likewise rounded up.
        count: Results in it: just those from `low` to `high`.
        height: Of the highest bin, 0 to 1.
        place: From the left, from 0.
    """

    low: float
    high: float
    count: int
    height: float
    place: int


@dataclass(frozen=True)
class Histogram:
    """How a metric is distributed.

    Attributes:
        column: Its name.
        count: Results that have it.
        low: Least value.
        median: The middle one, the upper of two.
        high: Largest.
        bars: Equal steps from `low` to `high`, without those that hold nothing.
    """

    column: str
    count: int
    low: float
    median: float
    high: float
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Point:
    """A result in a scatter plot: its place, 0 to 1 from the lower left, and the number of its tile."""

    x: float
    y: float
    tile: int
    quality: str
    title: str


@dataclass(frozen=True)
class Scatter:
    """Two metrics of every result that has both."""

    across: str
    up: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    points: Sequence[Point]


@dataclass(frozen=True)
class Dot:
    """A result to plot: the number of its tile, what it is called, its verdict and its figures."""

    tile: int
    title: str
    quality: str
    figures: Figures


def histograms(dots: Sequence[Dot], columns: Sequence[str]) -> list[Histogram]:
    """A histogram of each column that differs between results."""
    found = []
    for column in columns:
        values = sorted(dot.figures[column] for dot in dots if column in dot.figures)
        if values and values[0] < values[-1]:
            found.append(Histogram(column, len(values), values[0], values[len(values) // 2], values[-1], _bars(values)))
    return found


def _bars(values: Sequence[float]) -> list[Bar]:
    """Of values in order."""
    low, step = values[0], (values[-1] - values[0]) / BINS
    bins: list[list[float]] = [[] for _ in range(BINS)]
    for value in values:
        bins[min(int((value - low) / step) if step else 0, BINS - 1)].append(value)
    most = max(map(len, bins))
    bars, end = [], 0
    for place, own in enumerate(bins):
        if not own:
            continue
        begin, end = end, end + len(own)
        below = values[begin - 1] if begin else -math.inf
        above = values[end] if end < len(values) else math.inf
        least = _rounded(own[0], math.nextafter(below, math.inf), own[0])
        largest = _rounded(own[-1], own[-1], math.nextafter(above, -math.inf))
        bars.append(Bar(least, largest, len(own), len(own) / most, place))
    return bars


def _rounded(value: float, least: float, most: float) -> float:
    """A value with so few digits, but four, that it stays within bounds."""
    return next(short for digits in range(4, 18) if least <= (short := float(f"{value:.{digits}g}")) <= most)


def scatter(dots: Sequence[Dot], columns: Sequence[str]) -> Scatter | None:
    """Layout against text, where both were measured."""
    across = next((name for name in ACROSS if name in columns), None)
    up = next((name for name in UP if name in columns), None)
    both = [dot for dot in dots if across in dot.figures and up in dot.figures]
    if across is None or up is None or len(both) < 2:
        return None
    x_range, y_range = (_range([dot.figures[name] for dot in both]) for name in (across, up))
    points = [
        Point(_place(dot.figures[across], x_range), _place(dot.figures[up], y_range), dot.tile, dot.quality, dot.title)
        for dot in sorted(both, key=lambda dot: dot.figures[across])  # arrow keys go from left to right
    ]
    return Scatter(across, up, x_range, y_range, points)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _place(value: float, ends: tuple[float, float]) -> float:
    return 0.5 if ends[0] == ends[1] else (value - ends[0]) / (ends[1] - ends[0])
