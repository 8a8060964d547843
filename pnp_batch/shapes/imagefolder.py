"""Scenes as an image folder (`datasets.load_dataset("imagefolder")` reads it), and clips as MP4 files with their motion."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt

from pnp_batch.errors import disk_errors_named
from pnp_batch.inputs import ROWS_FILE
from pnp_batch.media.images import encode_png
from pnp_batch.shapes.clips import clip, clip_scenes
from pnp_batch.shapes.scenes import VOCABULARY, caption, random_caption, random_scene, render
from pnp_batch.store.files import remove_stale_temps, temp_name, write_atomic

MARKER = ".rendering"  # says in a folder what is, or is being, rendered there
NAMING = ("file_name", "mask_file_name", "masks")  # what names files or folders in a row


def begun(folder: Path) -> str | None:
    """What was to be rendered into a folder, whether or not all of it is there; None where nothing was."""
    marker = folder / MARKER
    return marker.read_text() if marker.is_file() else None


def is_whole(folder: Path) -> bool:
    """Whether a rendering came to its end, its metadata being written last, and nothing was removed since."""
    if not (folder / ROWS_FILE).is_file():
        return False
    rows = map(json.loads, (folder / ROWS_FILE).read_text().splitlines())
    return all((folder / row[name]).exists() for row in rows for name in NAMING if name in row)


@contextmanager
def rendering(folder: Path, about: str) -> Iterator[None]:
    """Notes in a folder what is rendered there within the block, so that the same command may go on there."""
    with disk_errors_named(str(folder)):
        remove_stale_temps(folder.rglob("*"))
        write_atomic(folder / MARKER, about)
        yield


def write_scenes(folder: Path, count: int, seed: int = 0, size: int = 64) -> Iterator[str]:
    """Writes scenes; the same seed gives the same bytes, and what is there already is not drawn again.

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
    with disk_errors_named(str(folder)):
        for number in range(seed, seed + count):
            name = f"{number:08}.png"
            scene, files = random_scene(number), [folder / kind / name for kind in ("images", "masks")]
            if not all(path.exists() for path in files):
                for path, pixels in zip(files, render(scene, size), strict=True):
                    write_atomic(path, encode_png(pixels))
            words = {part: getattr(scene, part) for part in VOCABULARY}
            pose = {"centre": scene.centre, "radius": scene.radius, "angle": scene.angle, "seed": scene.seed}
            texts = {"caption": caption(scene), "wording": random_caption(scene, number)}
            rows.append({"file_name": f"images/{name}", "mask_file_name": f"masks/{name}", **texts, **words, **pose})
            yield name
        write_atomic(folder / ROWS_FILE, _lines(rows))


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
            if not ((folder / name).exists() and masks.exists()):
                for index, mask in enumerate(made.masks):
                    write_atomic(masks / f"{index:04}.png", encode_png(mask))
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
        write_atomic(folder / ROWS_FILE, _lines(rows))


def _encode(path: Path, frames: npt.NDArray[np.uint8], fps: int) -> None:
    """H.264 at high quality, on one thread and without dates, so that the bytes are the same every time."""
    same = ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-x264-params", "cpu-independent=1"]
    height, width = frames.shape[1:3]
    quality: dict[str, Any] = {"codec": "libx264", "quality": None, "output_params": ["-crf", "12", *same, "-f", "mp4"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temp_name())
    writer = imageio_ffmpeg.write_frames(str(temporary), (width, height), fps=fps, macro_block_size=2, **quality)
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    temporary.replace(path)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
