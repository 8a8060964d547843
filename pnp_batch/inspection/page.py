"""Sheets as PNG files and one self-contained HTML page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pnp_batch.inputs import slug
from pnp_batch.inspection.kinds import ABOUT
from pnp_batch.inspection.names import file_names
from pnp_batch.inspection.sheets import Sheet
from pnp_batch.media.images import Pixels, encode_png
from pnp_batch.names import counted
from pnp_batch.store.files import write_atomic

CELL = 160  # pixels of a picture's longer side on a sheet
GAP, LINE = 6, 16

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1600px; padding: 24px; }
table { border-collapse: collapse; } th { font-weight: 500; text-align: left; padding: 4px 8px 4px 3px; }
td { padding: 3px; } img { width: 160px; image-rendering: pixelated; display: block; border-radius: 4px; }
h2 { margin: 32px 0 8px; overflow-wrap: anywhere; } .scroll { overflow-x: auto; } tbody th { max-width: 180px; }
"""


def write(kind: str, sheets: Sequence[Sheet], folder: Path) -> Path:
    """Writes a PNG of each sheet, a PNG of each of its pictures, and the page.

    Args:
        kind: `features`, `attention` or `trajectory`.
        sheets: What to show.
        folder: Where to; `<kind>.html` and `<kind>/` appear in it.

    Returns:
        The page.
    """
    for number, sheet in enumerate(sheets):
        name = f"{number:03}-{slug(Path(sheet.name).stem)}"
        write_atomic(folder / kind / f"{name}.png", encode_png(contact_sheet(sheet)))
        for row, pictures in zip(file_names(sheet.rows), sheet.pictures, strict=True):
            for column, picture in zip(sheet.columns, pictures, strict=True):
                write_atomic(folder / kind / name / f"{row}--{slug(column)}.png", encode_png(picture))
    page = folder / f"{kind}.html"
    write_atomic(page, _page(kind, sheets))
    return page


def contact_sheet(sheet: Sheet) -> Pixels:
    """All pictures of a sheet in one, the source first, with the names of rows and columns."""
    height, width = (round(CELL * n / max(sheet.source.shape[:2])) for n in sheet.source.shape[:2])
    across, down = width + GAP, height + GAP
    size = (across * (len(sheet.columns) + 1) + GAP, LINE + (down + LINE) * len(sheet.rows) + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    canvas.paste(Image.fromarray(sheet.source).resize((width, height), Image.Resampling.LANCZOS), (GAP, LINE * 2))
    for x, column in enumerate(sheet.columns, 1):
        draw.text((GAP + x * across, 2), column, "black")
    for y, (row, pictures) in enumerate(zip(sheet.rows, sheet.pictures, strict=True)):
        top = LINE + y * (down + LINE)
        draw.text((GAP + across, top), _drawable(row), "black")
        for x, picture in enumerate(pictures, 1):
            cell = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (GAP + x * across, top + LINE))
    return np.asarray(canvas)


def _drawable(text: str) -> str:
    """What Pillow's own font has letters for."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _page(kind: str, sheets: Sequence[Sheet]) -> str:
    body = "".join(map(_section, sheets))
    title = f"{kind} of {counted(len(sheets), 'guidance image')}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1><p>{escape(ABOUT[kind])}</p>{body}</html>\n"
    )


def _section(sheet: Sheet) -> str:
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + "".join(
            f"<td>{_img(picture, f'{sheet.name}, {row}, {column}')}</td>"
            for picture, column in zip(pictures, sheet.columns, strict=True)
        )
        + "</tr>"
        for row, pictures in zip(sheet.rows, sheet.pictures, strict=True)
    )
    return (
        f'<section><h2>{escape(sheet.name)}</h2>{_img(sheet.source, sheet.name)}<div class="scroll" tabindex="0">'
        f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _img(picture: Pixels, alt: str) -> str:
    data = b64encode(encode_png(picture)).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
