"""Scenes as an image folder: pictures, exact masks and captions, which `datasets.load_dataset("imagefolder")` reads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pnp_batch.errors import disk_errors_named
from pnp_batch.shapes.scenes import VOCABULARY, caption, random_caption, random_scene, render
from pnp_batch.store.files import write_atomic


def write_scenes(folder: Path, count: int, seed: int = 0, size: int = 64) -> Iterator[str]:
    """Writes scenes; the same seed gives the same bytes.

    `images/` holds the pictures, `masks/` the alpha of their objects, and `metadata.jsonl` a row for each: the captions (the
    canonical one and a random wording), the words, the pose. The metadata is written last: with it the folder is whole.

    Args:
        folder: Where to.
        count: How many.
        seed: Of the first scene; the next ones follow.
        size: Side of the pictures, in pixels.

    Yields:
        The name of each picture, once it is there.
    """
    rows = []
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with disk_errors_named(str(folder)):
        for number in range(seed, seed + count):
            name = f"{number:08}.png"
            picture, mask = render(scene := random_scene(number), size)
            (folder / "images" / name).write_bytes(_png(picture))
            (folder / "masks" / name).write_bytes(_png(mask))
            words = {part: getattr(scene, part) for part in VOCABULARY}
            pose = {"centre": scene.centre, "radius": scene.radius, "angle": scene.angle, "seed": scene.seed}
            texts = {"caption": caption(scene), "wording": random_caption(scene, number)}
            rows.append({"file_name": f"images/{name}", "mask_file_name": f"masks/{name}", **texts, **words, **pose})
            yield name
        write_atomic(folder / "metadata.jsonl", _lines(rows))


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)  # half the time of the default, a few percent larger
    return buffer.getvalue()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
