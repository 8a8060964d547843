"""Edit masks: where in a guidance image an edit is wanted. A folder of pictures, or PIE-Bench's own mapping file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pnp_batch.errors import ItemError
from pnp_batch.evaluation.values import Mask, Unavailable
from pnp_batch.inputs import Source
from pnp_batch.media.images import load_rgb

PIE_SIDE = 512
PIE_FOLDER = "annotation_images"


class Masks:
    """The masks a manifest names with `evaluation.masks`.

    Args:
        path: A folder that mirrors the results' tree (`<tree>/<stem>.png`, white where the edit is wanted), or PIE-Bench's
            `mapping_file.json`, beside which its `annotation_images` lie.

    Raises:
        Unavailable: There is no such folder, or the file is not PIE-Bench's.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise Unavailable(f"no such folder or mapping file: {path}")
        self.path = path
        self._pie = _runs(path) if path.is_file() else None

    def of(self, source: Source, size: tuple[int, int]) -> Mask | None:
        """The mask of a guidance image at the run's width and height; None where there is none.

        Raises:
            Unavailable: It cannot be read.
        """
        if self._pie is not None:
            name = _within(source.path, self.path.parent / PIE_FOLDER)
            return _resized(decode_pie(self._pie[name]), size) if name in self._pie else None
        file = self.path / source.stem.with_name(f"{source.stem.name}.png")
        try:
            return load_rgb(file, size).mean(2) > 127 if file.is_file() else None
        except ItemError as error:
            raise Unavailable(str(error)) from error


def _runs(path: Path) -> dict[str, Sequence[int]]:
    return {entry["image_path"]: entry["mask"] for entry in read_mapping(path).values()}


def read_mapping(path: Path) -> dict[str, Any]:
    """PIE-Bench's `mapping_file.json`: entries by id.

    Raises:
        Unavailable: It is not what PIE-Bench publishes.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries.values():
            if not isinstance(entry["image_path"], str) or len(entry["mask"]) % 2:
                raise ValueError("an entry without image_path or with half a (start, length) pair in its mask")
            if not all(isinstance(number, int) for number in entry["mask"]):
                raise ValueError("a mask of (start, length) pairs that are no numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"{path} is not PIE-Bench's mapping_file.json: {type(error).__name__} {error}") from error
    return dict(entries)


def decode_pie(runs: Sequence[int]) -> Mask:
    """PIE-Bench's run-length mask: (start, length) pairs over the flattened 512 x 512 picture.

    The outermost pixels count as edited, as in PIE-Bench's own code ("to avoid annotation errors in boundary").
    """
    flat = np.zeros(PIE_SIDE * PIE_SIDE, bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = True
    mask = flat.reshape(PIE_SIDE, PIE_SIDE)
    mask[[0, -1]] = mask[:, [0, -1]] = True
    return mask


def _resized(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _within(path: Path | None, folder: Path) -> str:
    """A path relative to a folder, with forward slashes; empty where it lies elsewhere."""
    absolute = path.resolve() if path else None
    return (
        absolute.relative_to(folder.resolve()).as_posix()
        if absolute and absolute.is_relative_to(folder.resolve())
        else ""
    )
