"""The benchmark's tables for the terminal, and its page: table, figure and pictures in one HTML file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table

from pnp_batch.media.images import encode_png
from pnp_batch.names import counted
from pnp_batch.shapes.ablations import Ablations
from pnp_batch.shapes.benchmark import EDITS, Bench, Margin, Outcome
from pnp_batch.shapes.scenes import caption, render

SHOWN = 6  # sources whose pictures are on the page

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 24px; }
table { border-collapse: collapse; margin: 12px 0; } td, th { padding: 3px 10px; text-align: right; white-space: nowrap; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; } tr + tr { border-top: 1px solid #8884; }
figure { display: inline-block; margin: 0 6px 10px 0; vertical-align: top; width: 104px; }
figure img { width: 104px; image-rendering: pixelated; border-radius: 4px; display: block; }
figcaption { font-size: 11px; line-height: 1.25; } .plot { max-width: 100%; background: #fff; border-radius: 6px; }
.scroll { overflow-x: auto; }
"""


def judged(figures: Mapping[str, float]) -> str:
    """How often the judge is right, in a line."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if name != "mask_iou")
    return f"The judge on 512 held-out scenes: {parts}; mask IoU {figures['mask_iou']:.3f}."


def reach(sources: Mapping[str, float]) -> str:
    """What the judge measures where nothing was edited, in a line."""
    best, back = sources["picture"], sources["reconstruction"]
    return f"Structure of the sources themselves: {best:.3f}; of what comes back from their inversion: {back:.3f}."


def what(bench: Bench) -> str:
    """What was measured, in a line."""
    return f"{counted(bench.scenes, 'scene')}, {counted(bench.steps, 'step')}, {bench.model}"


HEADS = ("method", "setting", "structure", "text", "shape kept", "n", *EDITS)
INVERSION_HEADS = ("inversion", "UNet rows", "reconstruction PSNR (dB)", "structure", "text", "n")


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a benchmark as text, in the columns of `HEADS`; for each edit structure / text."""
    return [
        [
            row["method"],
            row["setting"],
            _with(row["structure_iou"], row["ci95"]),
            _between(row["text_accuracy"], row["text_low"], row["text_high"]),
            _with(row["shape_kept"], None),
            str(row["n"]),
            *(_pair(row["edits"].get(edit)) for edit in EDITS),
        ]
        for row in rows
    ]


def inversion_cells(found: Ablations) -> list[list[str]]:
    """The ways to invert as text, in the columns of `INVERSION_HEADS`."""
    lines = [
        [
            row["setting"],
            f"{point.rows:.0f}",
            f"{point.psnr:.2f}" + (f" ± {point.ci95:.2f}" if point.ci95 is not None else ""),
            _with(row["structure_iou"], row["ci95"]),
            _between(row["text_accuracy"], row["text_low"], row["text_high"]),
            str(row["n"]),
        ]
        for row, point in zip(found.inversions.rows(), found.inversion_points, strict=True)
    ]
    return [*lines, ["the VAE alone", "0", f"{found.vae_psnr:.2f}", "-", "-", "-"]]


def margin_heads(margins: Sequence[Margin]) -> list[str]:
    """The columns of `margin_cells`."""
    return ["setting", *dict.fromkeys(margin.curve for margin in margins)]


def margin_cells(margins: Sequence[Margin]) -> list[list[str]]:
    """For each setting its margins above every curve."""
    lines: dict[str, list[str]] = {}
    for margin in margins:
        interval = "" if margin.low is None else f" [{margin.low:+.3f}, {margin.high:+.3f}]"
        name = f"{margin.setting.method} {margin.setting.name}"
        lines.setdefault(name, [name]).append(f"{margin.structure:+.3f}{interval}")
    return list(lines.values())


def _with(value: float | None, half: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {half:.3f}" if half is not None else "")


def _between(value: float | None, low: float | None, high: float | None) -> str:
    return _with(value, None) + (f" [{low:.2f}, {high:.2f}]" if low is not None else "")


def _pair(figures: Mapping[str, Any] | None) -> str:
    return f"{_with(figures['structure_iou'], figures['ci95'])} / {figures['text_accuracy']:.2f}" if figures else "-"


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], left: int, caption: str) -> Table:
    """A table for the terminal, its first columns to the left."""
    made = Table(title=title, box=box.SIMPLE, title_justify="left", caption=caption, caption_justify="left")
    for number, head in enumerate(heads):
        made.add_column(head, justify="left" if number < left else "right")
    for line in lines:
        made.add_row(*line)
    return made


def table(bench: Bench, title: str) -> Table:
    """A benchmark for the terminal."""
    return _table(f"{title}: {what(bench)}", HEADS, cells(bench.rows()), 2, judged(bench.judge))


ABOVE = (
    "Structure above the baselines' trade-off curve at the same text accuracy, with 95% intervals (bootstrap over scenes). "
    "In proportion: Prompt-to-Prompt takes over self-attention maps of 4x4 (one setting: 8x8) cells at most, a quarter (half) of "
    "the latents' resolution as on Stable Diffusion; 16x16, the authors' number, is all of this model's."
)


def benchmark_tables(bench: Bench, margins: Sequence[Margin]) -> list[Table | str]:
    """What is said of a benchmark on the terminal."""
    above = [_table("Margins", margin_heads(margins), margin_cells(margins), 1, ABOVE)] if margins else []
    return [table(bench, "Methods"), *above, reach(bench.sources)]


def ablation_tables(found: Ablations) -> list[Table | str]:
    """What is said of the ablations on the terminal."""
    inversions = found.inversions
    title = f"Inversion: {what(inversions)}"
    return [
        *(table(bench, title) for title, bench in _benches(found).items()),
        _table(title, INVERSION_HEADS, inversion_cells(found), 1, judged(inversions.judge)),
        reach(found.thresholds.sources),
    ]


def _benches(found: Ablations) -> dict[str, Bench]:
    return {
        "Thresholds (f / A)": found.thresholds,
        "One layer at a time": found.sites,
        "Negative prompting on plain scenes": found.negatives,
    }


def benchmark_page(bench: Bench, margins: Sequence[Margin], plot: bytes, report: str) -> str:
    """The page of a benchmark; `report` is the address of the run's own report."""
    parts = [
        "<h1>Structure against text, where the truth is known</h1>",
        f"<p>{escape(what(bench))}. {escape(judged(bench.judge))} {escape(reach(bench.sources))} "
        f'Every single result is in the <a href="{escape(report)}">report of the run</a>.</p>',
        _image(plot, "plot"),
        _html_table(HEADS, cells(bench.rows())),
        "<p>Structure and text are over new material and background and new styles; the last columns show structure / text "
        "for each edit. A new shape is not meant to fill the old mask. Intervals are 95% over scenes, of text Wilson's.</p>",
    ]
    if margins:
        parts += [f"<h2>Margins</h2><p>{escape(ABOVE)}</p>", _html_table(margin_heads(margins), margin_cells(margins))]
    return _page("pnp-batch bench shapes", [*parts, "<h2>Pictures</h2>", *_pictures(bench.outcomes)])


def ablation_page(found: Ablations, plot: bytes) -> str:
    """The page of the ablations."""
    parts = ["<h1>Ablations</h1>", f"<p>{escape(reach(found.thresholds.sources))}</p>", _image(plot, "plot")]
    for title, bench in _benches(found).items():
        parts += [_head(title, bench), _html_table(HEADS, cells(bench.rows()))]
    parts += [_head("Inversion", found.inversions), _html_table(INVERSION_HEADS, inversion_cells(found))]
    return _page("pnp-batch bench shapes --ablations", parts)


def _head(title: str, bench: Bench) -> str:
    return f"<h2>{escape(title)}</h2><p>{escape(what(bench))}. {escape(judged(bench.judge))}</p>"


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n"


def _html_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _pictures(outcomes: Sequence[Outcome]) -> list[str]:
    """For the first sources a strip of results for each of their captions."""
    parts = []
    shown = [case for case in dict.fromkeys(outcome.case for outcome in outcomes) if case.number < SHOWN]
    for case in shown:
        strip = [_figure(render(case.source)[0], caption(case.source))]
        strip += [
            _figure(
                o.picture, f"{o.setting.method} {o.setting.name}: {o.structure:.2f}{'' if o.text else ', text missed'}"
            )
            for o in outcomes
            if o.case == case
        ]
        parts += [f"<h3>{escape(caption(case.target))}</h3>", "<div>", *strip, "</div>"]
    return parts


def _figure(picture: npt.NDArray[np.uint8], text: str) -> str:
    return f"<figure>{_image(encode_png(picture), '')}<figcaption>{escape(text)}</figcaption></figure>"


def _image(png: bytes, kind: str) -> str:
    return f'<img class="{kind}" alt="" src="data:image/png;base64,{b64encode(png).decode()}">'
