"""Decoding any still picture to the same 8-bit RGB pixels every time, and writing PNGs that carry their settings."""

from __future__ import annotations

import io
import math
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from pnp_batch.errors import ItemError

Pixels = NDArray[np.uint8]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".gif", ".avi", ".mpg", ".mpeg", ".ts")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # Pillow knows more, some run other programs
MAX_PIXELS = 134_217_728  # 2**27, a 134-megapixel picture: more than any camera gives, 400 MB as RGB
MAX_ASPECT = 32
DECODE_VERSION = 1  # part of every pixel digest: raise it when the same file decodes to other pixels

TURNED_BY_EXIF = (5, 6, 7, 8)
PNG_LEVEL = 4  # zlib's default of 6 takes about twice as long for files that are hardly smaller
PNG_TAIL = 65536  # bytes at the end of a PNG in which an EXIF chunk after the pixels is looked for


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height as a person sees it (EXIF rotation applied), without decoding the pixels.

    Raises:
        ItemError: Not a readable picture, or too large.
    """
    with opened(path) as image:
        width, height = image.size
        return (height, width) if _is_turned(image) else (width, height)


def _is_turned(image: Image.Image) -> bool:
    if image.format == "TIFF":
        return False  # Pillow gives the size of a TIFF as it will be once it is upright
    late_exif = image.format == "PNG" and b"eXIf" in _tail_of(image)
    exif = image.getexif() if late_exif or image.format != "PNG" else Image.Image.getexif(image)  # PNG's own decodes
    return exif.get(ExifTags.Base.Orientation) in TURNED_BY_EXIF


def _tail_of(image: Image.Image) -> bytes:
    file = image.fp  # type: ignore[attr-defined]
    place = file.tell()
    file.seek(max(file.seek(0, io.SEEK_END) - PNG_TAIL, 0))
    tail: bytes = file.read()
    file.seek(place)
    return tail


def load_rgb(path: Path, size: tuple[int, int]) -> Pixels:
    """Decodes a picture of any of `FORMATS`, whatever its suffix, to (height, width, 3) uint8 RGB; see `rgb_pixels`.

    Raises:
        ItemError: The file is missing, corrupt, truncated or too large.
    """
    with opened(path) as image:
        return rgb_pixels(image, size)


def rgb_pixels(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """(height, width, 3) uint8 RGB: first frame, upright, transparency over white, of a `size` (width, height)."""
    rgb = _to_rgb(ImageOps.exif_transpose(image))
    return np.array(rgb if rgb.size == size else rgb.resize(size, Image.Resampling.LANCZOS))


def fitted_size(
    picture: tuple[int, int], height: int | None, width: int | None, model_size: int, cell: int
) -> tuple[int, int]:
    """The width and height to work at, in whole latent cells.

    Both given: exactly those. One given: the other follows from the aspect ratio. None: the area the model was trained
    on (`model_size` squared) at the picture's own aspect ratio.

    Raises:
        ItemError: A strip so narrow that no model has seen its like, or more pixels than a picture may have.
    """
    wide, high = (width, height) if height and width else _sides_in_proportion(picture, height, width, model_size)
    if wide * high > MAX_PIXELS:
        raise ItemError(f"{round(wide)}x{round(high)} to work at; the limit is {MAX_PIXELS:,} pixels")
    return _to_cells(wide, cell), _to_cells(high, cell)


def _sides_in_proportion(
    picture: tuple[int, int], height: int | None, width: int | None, model_size: int
) -> tuple[float, float]:
    aspect = picture[0] / picture[1]
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise ItemError(f"{picture[0]}x{picture[1]} is narrower than 1:{MAX_ASPECT}; give height and width or crop it")
    if width:
        return width, width / aspect
    if height:
        return height * aspect, height
    return model_size * math.sqrt(aspect), model_size / math.sqrt(aspect)


def encode_png(pixels: Pixels, text: Mapping[str, str] | None = None) -> bytes:
    """A PNG of (height, width, 3) or (height, width) uint8 pixels with text chunks; the same input gives the same bytes."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    return buffer.getvalue()


def _to_cells(pixels: float, cell: int) -> int:
    return max(round(pixels / cell), 1) * cell


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens a picture and names whatever goes wrong while it is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is checked below; metadata warnings help nobody
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise ItemError(f"{path}: not an ordinary file")  # opening a pipe would wait for ever
            if not found.st_size:
                raise ItemError(f"{path}: the file is empty")
            with Image.open(path, formats=_formats()) as image:
                if not 0 < image.width * image.height <= MAX_PIXELS:
                    raise ItemError(f"{path}: {image.width}x{image.height} pixels; the limit is {MAX_PIXELS:,} pixels")
                yield image
    except ItemError:
        raise
    except FileNotFoundError:
        raise ItemError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        raise ItemError(f"{path}: too large; the limit is {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # decoders let all kinds of errors escape when the bytes make no sense
        raise ItemError(f"{path}: not a readable picture ({error})") from error


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image).convert("RGB")
    if image.mode in _STRAIGHT_ALPHA:
        image = image.convert(_STRAIGHT_ALPHA[image.mode])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # premultiplied modes convert to nothing else


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits (Pillow's own conversion clips it to white); floats are taken as 0 to 1."""
    values: NDArray[Any] = np.nan_to_num(np.asarray(image).astype(np.float64))
    scaled = values * 255 if image.mode == "F" else values / 257
    scaled[values == image.info.get("transparency", math.nan)] = 255  # the one grey that a PNG may call transparent
    return Image.fromarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8))
