"""Scenes as an image folder (`datasets.load_dataset("imagefolder")` reads it), and clips as MP4 files with their motion."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
from PIL import Image

from pnp_batch.errors import disk_errors_named
from pnp_batch.shapes.clips import clip, clip_scenes
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


def write_clips(
    folder: Path, count: int, seed: int = 0, size: int = 64, frames: int = 16, fps: int = 8
) -> Iterator[str]:
    """Writes clips of a moving, turning, growing object; the same seed gives the same bytes.

    `videos/` holds the clips as H.264, `masks/<name>/` the object's exact alpha in every frame as PNG, and `metadata.jsonl` a
    row for each: the caption, and for every frame the 2x3 matrix that takes the object's points from the first frame there.

    Args:
        folder: Where to.
        count: How many.
        seed: Of the first clip; the next ones follow.
        size: Side of the frames, in pixels; even.
        frames: How many a clip has.
        fps: How many are shown in a second.

    Yields:
        The name of each clip, once it is there.
    """
    rows = []
    with disk_errors_named(str(folder)):
        for number in range(seed, seed + count):
            made, scene = clip(number, frames, size), clip_scenes(number, 1)[0]
            name, masks = f"videos/{number:08}.mp4", folder / "masks" / f"{number:08}"
            masks.mkdir(parents=True)
            for index, mask in enumerate(made.masks):
                (masks / f"{index:04}.png").write_bytes(_png(mask))
            (folder / "videos").mkdir(exist_ok=True)
            _encode(folder / name, made.frames, fps)
            words = {part: getattr(scene, part) for part in VOCABULARY}
            about = {
                "file_name": name,
                "masks": f"masks/{number:08}",
                "caption": caption(scene),
                "seed": number,
                "fps": fps,
            }
            rows.append({**about, **words, "motion": made.motion.tolist()})
            yield name
        write_atomic(folder / "metadata.jsonl", _lines(rows))


def _encode(path: Path, frames: npt.NDArray[np.uint8], fps: int) -> None:
    """H.264 at high quality, on one thread and without dates, so that the bytes are the same every time."""
    same = ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-x264-params", "cpu-independent=1"]
    height, width = frames.shape[1:3]
    quality: dict[str, Any] = {"codec": "libx264", "quality": None, "output_params": ["-crf", "12", *same]}
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2, **quality)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)  # half the time of the default, a few percent larger
    return buffer.getvalue()


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
