"""Pictures small enough to put two thousand of them into one HTML file."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, replace

import imageio.v3 as iio
from PIL import Image

from pnp_batch.media.images import Pixels, rgb_pixels

MAX_SIDE = 320  # sharp at 192 CSS pixels on most screens; about 13 kB each
PIXEL_ART = 96  # up to this side a picture is kept as it is, and shown magnified without smoothing
WEBP = {"quality": 82, "method": 2}  # a third smaller than JPEG at the same look, 5 ms each


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a `data:` address, with the size it is stored at.

    Attributes:
        uri: The `data:` address.
        width: In pixels.
        height: In pixels.
        is_pixel_art: Whether it is to be magnified without smoothing.
        video: Of a clip, whose first frame the picture is, the `data:` address; else empty.
    """

    uri: str
    width: int
    height: int
    is_pixel_art: bool
    video: str = ""


def thumbnail(image: Image.Image) -> Thumbnail:
    """A picture scaled down to `MAX_SIDE` where it is larger; the same picture gives the same bytes.

    Args:
        image: Any picture; one opened from a file is decoded here, so a corrupt file raises here.
    """
    longest = max(image.size)
    scale = min(1.0, MAX_SIDE / longest)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = Image.fromarray(rgb_pixels(image, size))
    kind, options = ("png", {"optimize": True}) if longest <= PIXEL_ART else ("webp", WEBP)
    buffer = io.BytesIO()
    small.save(buffer, kind, **options)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Thumbnail(uri, *small.size, is_pixel_art=longest <= PIXEL_ART)


def thumbnail_of(pixels: Pixels) -> Thumbnail:
    """A thumbnail of (height, width, 3) uint8 pixels."""
    return thumbnail(Image.fromarray(pixels))


def clip_of(data: bytes) -> Thumbnail:
    """A clip that plays, from the bytes of a small MP4.

    Raises:
        OSError: They are no MP4.
    """
    first = iio.imread(data, plugin="pyav", index=0, extension=".mp4")
    uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return replace(thumbnail_of(first), video=uri)
