"""Decoding any still picture to the same 8-bit RGB pixels every time, and writing PNGs that carry their settings."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from pnp_batch.errors import ItemError

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
MAX_PIXELS = 134_217_728  # 2**27, a 134-megapixel picture: more than any camera gives, 400 MB as RGB
MAX_ASPECT = 32
DECODE_VERSION = 1  # part of every pixel digest: raise it when the same file decodes to other pixels

EXIF_ORIENTATION = 0x0112
TURNED_BY_EXIF = (5, 6, 7, 8)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as a person sees it (EXIF rotation applied), from the header alone.

    Raises:
        ItemError: Not a readable picture, or too large.
    """
    with opened(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(EXIF_ORIENTATION) in TURNED_BY_EXIF else (width, height)


def load_rgb(path: Path, size: tuple[int, int]) -> Pixels:
    """Decodes a picture of any format Pillow reads to (height, width, 3) uint8 RGB; see `rgb_pixels`.

    Raises:
        ItemError: The file is missing, corrupt, truncated or too large.
    """
    with opened(path) as image:
        return rgb_pixels(image, size)


def rgb_pixels(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """(height, width, 3) uint8 RGB: first frame, upright, transparency over white, resized to `size` (width, height)."""
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    return np.array(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.LANCZOS))


def fitted_size(
    picture: tuple[int, int], height: int | None, width: int | None, model_size: int, cell: int
) -> tuple[int, int]:
    """The width and height to work at, in whole latent cells.

    Both given: exactly those. One given: the other follows from the aspect ratio. None: the area the model was trained on
    (`model_size` squared) at the picture's own aspect ratio.

    Raises:
        ItemError: A strip so narrow that no model has seen its like.
    """
    if height and width:
        return _to_cells(width, cell), _to_cells(height, cell)
    aspect = picture[0] / picture[1]
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise ItemError(f"{picture[0]}x{picture[1]} is narrower than 1:{MAX_ASPECT}; give height and width or crop it")
    if width:
        return _to_cells(width, cell), _to_cells(width / aspect, cell)
    if height:
        return _to_cells(height * aspect, cell), _to_cells(height, cell)
    return _to_cells(model_size * math.sqrt(aspect), cell), _to_cells(model_size / math.sqrt(aspect), cell)


def encode_png(pixels: Pixels, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG of (height, width, 3) uint8 pixels with text chunks; the same input gives the same bytes."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _to_cells(pixels: float, cell: int) -> int:
    return max(round(pixels / cell), 1) * cell


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens a picture and names whatever goes wrong while it is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is checked below; metadata warnings help nobody
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ItemError(f"{path}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS:,} pixels")
                yield image
    except ItemError:
        raise
    except FileNotFoundError:
        raise ItemError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ItemError(f"{path}: too large; the limit is {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError) as error:
        reason = "the file is empty" if path.is_file() and not path.stat().st_size else f"not a readable picture ({error})"
        raise ItemError(f"{path}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image).convert("RGB")
    if image.mode in _STRAIGHT_ALPHA:
        image = image.convert(_STRAIGHT_ALPHA[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # premultiplied modes convert to nothing else


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits (Pillow's own conversion clips it to white); floats are taken as 0 to 1."""
    values: NDArray[Any] = np.asarray(image).astype(np.float64)
    scaled = values * 255 if image.mode == "F" else values / 257
    return Image.fromarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8))
