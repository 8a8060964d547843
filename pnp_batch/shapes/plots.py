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
from pnp_batch.shapes.benchmark import Bench

COLOURS = {"pnp": "#c2410c", "p2p": "#2563eb", "ddim": "#0d9488", "sdedit": "#7c3aed", "text-to-image": "#57534e"}
MARKERS = {"pnp": "o", "p2p": "s", "ddim": "D", "sdedit": "^", "text-to-image": "X"}

mpl.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
)


def trade_off(bench: Bench) -> bytes:
    """Structure against text, one point per setting with its 95% intervals over scenes."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(bench.sources["picture"], color="0.6", lw=1, ls=":")
    axes.text(0.0, bench.sources["picture"] + 0.006, "the judge on the sources themselves", color="0.45", fontsize=8)
    seen: set[str] = set()
    for row in bench.rows():
        method = row["method"]
        x, y = row["text_accuracy"], row["structure_iou"]
        axes.errorbar(
            x,
            y,
            xerr=row["text_ci95"] or 0,
            yerr=row["ci95"] or 0,
            fmt=MARKERS[method],
            color=COLOURS[method],
            elinewidth=0.7,
            alpha=0.9,
            label=None if method in seen else method,
        )
        seen.add(method)
    _label(axes, bench.rows())
    axes.set(
        xlabel="text: share of results with every new word recognised", ylabel="structure: IoU with the known mask"
    )
    axes.set(xlim=(-0.04, 1.3), ylim=(0, 1), xticks=np.linspace(0, 1, 6))
    axes.set_title(f"{len(bench.of(bench.settings[0]))} edits of held-out scenes a point, 95% intervals over scenes")
    axes.legend(loc="lower left", frameon=False)
    return _png(figure)


def _label(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The settings' names beside their points, those of one neighbourhood moved apart."""
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: -row["structure_iou"]):
        x, y = row["text_accuracy"], row["structure_iou"]
        near = [other for at, other in placed if abs(at - x) < 0.25]
        height = min([y, *(other - 0.032 for other in near)])
        placed.append((x, height))
        line = {"arrowstyle": "-", "color": COLOURS[row["method"]], "lw": 0.4}
        style: dict[str, Any] = {"fontsize": 7, "color": COLOURS[row["method"]], "va": "center", "arrowprops": line}
        style["bbox"] = {
            "facecolor": "white",
            "edgecolor": "none",
            "alpha": 0.85,
            "pad": 0.6,
        }  # over the intervals' lines
        axes.annotate(row["setting"], (x, y), xytext=(x + 0.035, height), **style)


def ablations(found: Ablations) -> bytes:
    """All ablations on one page."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    _heat(panels[0, 0], found.thresholds, "structure_iou", "structure (IoU)")
    _heat(panels[0, 1], found.thresholds, "text_accuracy", "text accuracy")
    _sites(panels[0, 2], found.sites, "f", "f at one layer alone, first 0.8 of the steps")
    _sites(panels[1, 0], found.sites, "A", "A at one layer alone, first 0.8 of the steps")
    _inversion(panels[1, 1], found)
    _negatives(panels[1, 2], found.negatives)
    return _png(figure)


def _heat(axes: Axes, bench: Bench, key: str, title: str) -> None:
    table = np.array([row[key] for row in bench.rows()]).reshape(len(THRESHOLDS), len(THRESHOLDS)).T
    axes.imshow(table, origin="lower", cmap="viridis", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    ticks, labels = range(len(THRESHOLDS)), [f"{value:g}" for value in THRESHOLDS]
    axes.set(xlabel="f threshold", ylabel="A threshold", title=title, xticks=ticks, yticks=ticks)
    axes.set_xticklabels(labels)
    axes.set_yticklabels(labels)
    axes.grid(visible=False)


def _sites(axes: Axes, bench: Bench, kind: str, title: str) -> None:
    rows = [row for row in bench.rows() if row["setting"].startswith(f"{kind} ")]
    names = [row["setting"] for row in rows]
    for key, ci, offset, colour in (
        ("structure_iou", "ci95", -0.2, "#c2410c"),
        ("text_accuracy", "text_ci95", 0.2, "#2563eb"),
    ):
        _bars(axes, np.arange(len(rows)) + offset, rows, key, ci, colour, 0.38)
    axes.set_xticks(range(len(rows)), names)
    axes.set(ylim=(0, 1.2), title=title, yticks=np.linspace(0, 1, 6))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _bars(
    axes: Axes, places: Any, rows: Sequence[dict[str, Any]], key: str, ci: str, colour: str, width: float
) -> None:
    errors = [row[ci] or 0 for row in rows]
    label = {"structure_iou": "structure", "text_accuracy": "text"}[key]
    axes.bar(
        places,
        [row[key] for row in rows],
        width,
        yerr=errors,
        color=colour,
        alpha=0.85,
        label=label,
        error_kw={"lw": 0.8},
    )


def _inversion(axes: Axes, found: Ablations) -> None:
    calls = [point.rows for point in found.inversions]
    axes.errorbar(
        calls,
        [p.psnr for p in found.inversions],
        yerr=[p.ci95 or 0 for p in found.inversions],
        fmt="o",
        color="#0d9488",
    )
    for point in found.inversions:
        axes.annotate(point.name, (point.rows, point.psnr), xytext=(5, -9), textcoords="offset points", fontsize=7)
    axes.axhline(found.vae_psnr, color="0.6", lw=1, ls=":")
    axes.text(calls[0], found.vae_psnr, "the VAE alone", color="0.45", fontsize=8, va="bottom")
    axes.set(xscale="log", xlabel="UNet rows a picture to invert", ylabel="reconstruction PSNR (dB)")
    axes.set(title="inversion against reconstruction")


def _negatives(axes: Axes, bench: Bench) -> None:
    rows = bench.rows()
    for key, ci, offset, colour in (
        ("structure_iou", "ci95", -0.2, "#c2410c"),
        ("text_accuracy", "text_ci95", 0.2, "#2563eb"),
    ):
        _bars(axes, np.arange(len(rows)) + offset, rows, key, ci, colour, 0.38)
    axes.set_xticks(
        range(len(rows)), [row["setting"].replace("guidance ", "w = ").replace(", ", "\n") for row in rows], fontsize=7
    )
    axes.set(ylim=(0, 1.2), title="negative prompting, plain scenes", yticks=np.linspace(0, 1, 6))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
