"""Lays the results of a run out as one picture: a row per guidance image, the image first, then its translations.

python docs/contact_sheet.py manifests/quickstart.yaml docs/quickstart.png
"""

import sys
from itertools import groupby
from pathlib import Path

from PIL import Image

from pnp_batch.manifest import load_manifest
from pnp_batch.stages.outputs import Outputs

SIDE, GAP = 128, 6


def contact_sheet(manifest_path: Path, columns: int = 2) -> Image.Image:
    manifest = load_manifest(manifest_path)
    rows = [list(group) for _, group in groupby(Outputs(manifest.output).rows(), key=lambda row: row["source"])]
    strips = [
        [manifest.base / row[0]["source"], *(manifest.output / each["file_name"] for each in row)] for row in rows
    ]
    widest = max(map(len, strips))
    width, height = widest * (SIDE + GAP) + 4 * GAP, SIDE + GAP
    sheet = Image.new("RGB", (columns * width - 4 * GAP, -(-len(strips) // columns) * height), "white")
    for i, strip in enumerate(strips):
        for j, path in enumerate(strip):
            picture = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            sheet.paste(
                picture, (i % columns * width + j * (SIDE + GAP) + (2 * GAP if j else 0), i // columns * height)
            )
    return sheet


if __name__ == "__main__":
    contact_sheet(Path(sys.argv[1])).save(sys.argv[2])
