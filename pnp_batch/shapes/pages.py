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
from pnp_batch.shapes.ablations import Ablations, InversionPoint
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


HEADS = ("method", "setting", "structure", "text", "shape kept", "n", *EDITS)


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a benchmark as text, in the columns of `HEADS`; for each edit structure and text."""
    return [
        [
            row["method"],
            row["setting"],
            _with(row["structure_iou"], row["ci95"]),
            _with(row["text_accuracy"], row["text_ci95"]),
            _with(row["shape_kept"], None),
            str(row["n"]),
            *(_pair(row["edits"].get(edit)) for edit in EDITS),
        ]
        for row in rows
    ]


def _with(value: float | None, half: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ± {half:.3f}" if half is not None else "")


def _pair(figures: Mapping[str, Any] | None) -> str:
    return f"{figures['structure_iou']:.2f} / {figures['text_accuracy']:.2f}" if figures else "-"


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A benchmark for the terminal."""
    made = Table(title=title, box=box.SIMPLE, title_justify="left")
    for number, head in enumerate(HEADS):
        made.add_column(head, justify="left" if number < 2 else "right")
    for line in cells(rows):
        made.add_row(*line)
    return made


def margin_line(margin: Margin) -> str:
    """A setting's margin, in a line."""
    value = f"{margin.structure:+.3f} [{margin.low:+.3f}, {margin.high:+.3f}]"
    return f"{margin.setting.method} {margin.setting.name}: {value}"


def margins_about(count: int) -> str:
    """What the lines of margins mean."""
    return f"Structure above the baselines' trade-off curve at the same text accuracy [95%, bootstrap over {count} scenes]:"


def benchmark_tables(bench: Bench, margins: Sequence[Margin]) -> list[Table | str]:
    """What is said of a benchmark on the terminal."""
    count = len({outcome.case.number for outcome in bench.outcomes})
    lines = [margins_about(count), *(f"  {margin_line(margin)}" for margin in margins)] if margins else []
    return [table(bench.rows(), "Methods"), "\n".join(lines), judged(bench.judge), reach(bench.sources)]


def ablation_tables(found: Ablations) -> list[Table | str]:
    """What is said of the ablations on the terminal."""
    inversions = Table(title="Inversion", box=box.SIMPLE, title_justify="left")
    for number, head in enumerate(("method", "UNet rows", "reconstruction PSNR (dB)")):
        inversions.add_column(head, justify="left" if number == 0 else "right")
    for point in found.inversions:
        inversions.add_row(point.name, f"{point.rows:.0f}", _decibels(point))
    inversions.add_row("the VAE alone", "0", f"{found.vae_psnr:.2f}")
    return [
        *(table(bench.rows(), title) for title, bench in _benches(found).items()),
        inversions,
        judged(found.thresholds.judge),
        reach(found.thresholds.sources),
    ]


def _decibels(point: InversionPoint) -> str:
    return f"{point.psnr:.2f}" + (f" ± {point.ci95:.2f}" if point.ci95 is not None else "")


def _benches(found: Ablations) -> dict[str, Bench]:
    return {
        "Thresholds (f / A)": found.thresholds,
        "One layer at a time": found.sites,
        "Negative prompting": found.negatives,
    }


def benchmark_page(bench: Bench, margins: Sequence[Margin], plot: bytes) -> str:
    """The page of a benchmark."""
    count = len({outcome.case.number for outcome in bench.outcomes})
    parts = [
        "<h1>Structure against text, where the truth is known</h1>",
        f"<p>{escape(judged(bench.judge))} {escape(reach(bench.sources))}</p>",
        _image(plot, "plot"),
        _html_table(cells(bench.rows())),
        "<p>Structure and text are over new material and background and new styles; the last columns show structure / text "
        "for each edit. A new shape is not meant to fill the old mask.</p>",
        f"<p>{escape(margins_about(count))}</p>" if margins else "",
        "<ul>" + "".join(f"<li>{escape(margin_line(margin))}</li>" for margin in margins) + "</ul>",
        "<h2>Pictures</h2>",
        *_pictures(bench.outcomes),
    ]
    return _page("pnp-batch bench shapes", parts)


def ablation_page(found: Ablations, plot: bytes) -> str:
    """The page of the ablations."""
    parts = [
        "<h1>Ablations</h1>",
        f"<p>{escape(judged(found.thresholds.judge))} {escape(reach(found.thresholds.sources))}</p>",
        _image(plot, "plot"),
    ]
    for title, bench in _benches(found).items():
        parts += [f"<h2>{escape(title)}</h2>", _html_table(cells(bench.rows()))]
    return _page("pnp-batch bench shapes --ablations", parts)


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return head + "\n".join(parts) + "</html>\n"


def _html_table(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADS)
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
