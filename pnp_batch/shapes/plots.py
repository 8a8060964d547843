"""The benchmark's figures, as PNG bytes. matplotlib is imported here and nowhere else, so that a run never pays for it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pnp_batch.shapes.ablations import THRESHOLDS, Ablations
from pnp_batch.shapes.benchmark import CURVES, Bench, Setting, hull

IN_PROPORTION = "p2p, limit in proportion"
COLOURS = {
    "pnp": "#c2410c",
    "p2p": "#2563eb",
    IN_PROPORTION: "#0891b2",
    "ddim": "#0d9488",
    "sdedit": "#7c3aed",
    "text-to-image": "#57534e",
}
MARKERS = {"pnp": "o", "p2p": "s", IN_PROPORTION: "P", "ddim": "D", "sdedit": "^", "text-to-image": "X"}
STRUCTURE, TEXT = "#c2410c", "#2563eb"

mpl.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
)

HIGHEST = 0.985  # a label of the trade-off plot, in its data


def trade_off(bench: Bench) -> bytes:
    """Structure against text, one point per setting with its 95% intervals over scenes, and the baselines' curves."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots()
    axes.plot((0, 1), [bench.sources["picture"]] * 2, color="0.6", lw=1, ls=":")
    axes.text(0.0, bench.sources["picture"] + 0.006, "the judge on the sources themselves", color="0.45", fontsize=8)
    rows = list(zip(bench.settings, bench.rows(), strict=True))
    for (name, belongs), style in zip(CURVES.items(), ("-", "--", ":"), strict=True):
        _curve(axes, [row for setting, row in rows if setting.method != "pnp" and belongs(setting)], name, style)
    seen: set[str] = set()
    for setting, row in rows:
        kind = _kind(setting)
        x, y = row["text_accuracy"], row["structure_iou"]
        line: dict[str, Any] = {"fmt": MARKERS[kind], "color": COLOURS[kind], "elinewidth": 0.6, "alpha": 0.9, "ms": 5}
        axes.errorbar(x, y, **_bars_of(row), label=None if kind in seen else kind, **line)
        seen.add(kind)
    _label(axes, rows)
    axes.set(
        xlabel="text: share of results with every new word recognised", ylabel="structure: IoU with the known mask"
    )
    axes.set(xlim=(-0.03, 1.45), ylim=(0, 1), xticks=np.linspace(0, 1, 6))
    count = len(bench.of(bench.settings[0]))
    axes.set_title(f"{count} edits of {bench.scenes} held-out scenes a point, 95% intervals over scenes")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return _png(figure)


def _kind(setting: Setting) -> str:
    return IN_PROPORTION if "p2p_self_cells" in setting.values else setting.method


def _curve(axes: Axes, rows: Sequence[dict[str, Any]], name: str, style: str) -> None:
    """The upper hull of some points, on to the left edge at the height of its first one."""
    points = hull([(row["text_accuracy"], row["structure_iou"]) for row in rows])
    if points:
        x, y = zip((0.0, points[0][1]), *points, strict=True)
        axes.plot(x, y, style, color="0.55", lw=1, label=f"curve: {name}", zorder=0)


def _bars_of(row: dict[str, Any]) -> dict[str, Any]:
    """The intervals of a point, where it has any; of structure never beyond 0 and 1."""
    if row["ci95"] is None:
        return {}
    text, structure = row["text_accuracy"], row["structure_iou"]
    return {"xerr": [[text - row["text_low"]], [row["text_high"] - text]], "yerr": _within(structure, row["ci95"])}


def _within(value: float, half: float) -> list[list[float]]:
    return [[min(half, value)], [min(half, 1 - value)]]


def _label(axes: Axes, rows: Sequence[tuple[Setting, dict[str, Any]]]) -> None:
    """The settings' names: of points near the right edge in a column beside it, of others above their intervals.

    None lies over another of its side, however few scenes there are: then many points lie at one place.
    """
    for is_right in (True, False):
        side = sorted(
            (each for each in rows if (each[1]["text_accuracy"] > 0.6) == is_right),
            key=lambda each: -each[1]["structure_iou"],
        )
        lift = 0.0 if is_right else 0.025
        heights = _apart([row["structure_iou"] + lift for _, row in side], 0.027)
        for (setting, row), height in zip(side, heights, strict=True):
            x = row["text_accuracy"]
            colour = COLOURS[_kind(setting)]
            line = {"arrowstyle": "-", "color": colour, "lw": 0.4, "relpos": (0, 0.5), "shrinkA": 0}
            paper = {"fc": "w", "ec": "none", "alpha": 0.8, "pad": 0.5}
            style: dict[str, Any] = {
                "fontsize": 7.5,
                "color": colour,
                "va": "center",
                "arrowprops": line,
                "bbox": paper,
            }
            place = (1.08 if is_right else x + 0.03, height)
            axes.annotate(f"{setting.method} {setting.name}", (x, row["structure_iou"]), xytext=place, **style)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Falling heights moved as little as need be so that each is a gap below the one before it, and all below the title."""
    groups: list[list[float]] = []  # of neighbours that touch; each lies around its own mean
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _bottom(groups[-2], gap) - gap < _top(groups[-1], gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_top(group, gap) - n * gap for group in groups for n in range(len(group))]


def _top(group: Sequence[float], gap: float) -> float:
    return min(sum(group) / len(group) + gap * (len(group) - 1) / 2, HIGHEST)


def _bottom(group: Sequence[float], gap: float) -> float:
    return _top(group, gap) - gap * (len(group) - 1)


def ablations(found: Ablations) -> bytes:
    """All ablations on one page."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    _heat(panels[0, 0], found.thresholds, "structure_iou", "structure (IoU)")
    _heat(panels[0, 1], found.thresholds, "text_accuracy", "text accuracy")
    _pairs(panels[0, 2], _sites(found.sites, "f"), f"f at one layer, first 0.8 of the steps, {_n(found.sites)}")
    _pairs(panels[1, 0], _sites(found.sites, "A"), f"A at one layer, first 0.8 of the steps, {_n(found.sites)}")
    _inversion(panels[1, 1], found)
    _pairs(panels[1, 2], _negatives(found.negatives), f"negative prompting, plain scenes, {_n(found.negatives)}")
    return _png(figure)


def _n(bench: Bench) -> str:
    """How many results a point stands for."""
    return f"n = {len(bench.of(bench.settings[0]))}"


def _heat(axes: Axes, bench: Bench, key: str, title: str) -> None:
    table = np.array([row[key] for row in bench.rows()]).reshape(len(THRESHOLDS), len(THRESHOLDS)).T
    axes.imshow(table, origin="lower", cmap="viridis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    ticks, labels = range(len(THRESHOLDS)), [f"{value:g}" for value in THRESHOLDS]
    axes.set(xlabel="f threshold", ylabel="A threshold", title=f"{title}, {_n(bench)}", xticks=ticks, yticks=ticks)
    axes.set_xticklabels(labels)
    axes.set_yticklabels(labels)
    axes.grid(visible=False)


def _sites(bench: Bench, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of f or of A, each with its layer."""
    return [(row["setting"], row) for row in bench.rows() if row["setting"].startswith(f"{kind} ")]


def _negatives(bench: Bench) -> list[tuple[str, dict[str, Any]]]:
    return [(row["setting"].replace("guidance ", "w = ").replace(", ", "\n"), row) for row in bench.rows()]


def _pairs(axes: Axes, named: Sequence[tuple[str, dict[str, Any]]], title: str) -> None:
    """Bars of structure and of text side by side."""
    places, rows = np.arange(len(named)), [row for _, row in named]
    for name, key, offset, colour in (
        ("structure", "structure_iou", -0.2, STRUCTURE),
        ("text", "text_accuracy", 0.2, TEXT),
    ):
        bars = axes.bar(places + offset, [row[key] for row in rows], 0.38, color=colour, alpha=0.85, label=name)
        for bar, row in zip(bars, rows, strict=True):
            if errors := _bars_of(row):
                error = errors["yerr" if name == "structure" else "xerr"]
                axes.errorbar(bar.get_x() + bar.get_width() / 2, row[key], yerr=error, color="k", elinewidth=0.8)
    axes.set_xticks(places, [name for name, _ in named], fontsize=7)
    axes.set(ylim=(0, 1.2), yticks=np.linspace(0, 1, 6))
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _inversion(axes: Axes, found: Ablations) -> None:
    for setting, point in zip(found.inversions.settings, found.inversion_points, strict=True):
        axes.errorbar(point.rows, point.psnr, yerr=point.ci95, fmt="o", color="#0d9488", elinewidth=0.8)
        top = point.psnr + (point.ci95 or 0)
        above: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 7}
        axes.annotate(setting.name, (point.rows, top), **above)
    axes.axhline(found.vae_psnr, color="0.6", lw=1, ls=":", label="the VAE alone")
    axes.set(xscale="log", xlabel="UNet rows a picture to invert", ylabel="reconstruction PSNR (dB)")
    axes.set(title=f"inversion against reconstruction, {_n(found.inversions)}")
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
