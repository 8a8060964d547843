"""Pictures small enough to put two thousand of them into one HTML file."""

from __future__ import annotations

import base64
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import imageio.v3 as iio
from PIL import Image

from pnp_batch.errors import ItemError, disk_errors_named
from pnp_batch.media.images import Pixels, opened, rgb_pixels
from pnp_batch.store import Artifact, ArtifactStore, key_of
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import sha256

VERSIONED = {"version": 1}  # raise it when the same picture gives another thumbnail

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


class Thumbnails:
    """Thumbnails that are kept beside the artifacts: making them is most of the work of a report, and few change between two.

    Args:
        store: Where they are kept, in a folder of their own.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self.store, self.root = store, store.root / "thumbnails"

    def make(self, files: Iterable[Path]) -> None:
        """Makes those of some files that are not kept yet, on all cores: decoding and encoding leave Python's lock alone."""
        # The decoders silence warnings for a moment each, which threads must not do at once: silent before, silent after.
        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(self._make, files):
                pass

    def _make(self, file: Path) -> None:
        self.of_file(file)  # kept, not given back: all of them at once would be the size of the page

    def of_file(self, path: Path) -> Thumbnail | None:
        """The thumbnail of a picture; None where it is missing or unreadable. One that is changed is looked at anew."""

        def made() -> Thumbnail:
            with opened(path) as image:
                return thumbnail(image)

        try:
            stat = path.stat()
        except OSError:
            return None
        try:
            return self._kept(key_of(VERSIONED | {"file": str(path), "stamp": [stat.st_size, stat.st_mtime_ns]}), made)
        except ItemError:
            return None

    def of_preview(self, trajectory: Artifact, name: str) -> Thumbnail | None:
        """The thumbnail of a picture in a trajectory's preview; None where there is none.

        Raises:
            CorruptArtifact: The preview is damaged.
        """

        def made() -> Thumbnail:
            return thumbnail_of(self.store.load(trajectory, "preview")[name])

        try:
            return self._kept(key_of(VERSIONED | {"trajectory": trajectory.key, "name": name}), made)
        except KeyError:
            return None

    def _kept(self, key: str, make: Callable[[], Thumbnail]) -> Thumbnail:
        path = self.root / key[:2] / key
        found = _read(path)
        if found is None:
            found = make()
            text = json.dumps(asdict(found))
            with disk_errors_named(str(path)):
                write_atomic(path, f"{sha256(text.encode())}\n{text}", temp_in=self.root)
        return found


def _read(path: Path) -> Thumbnail | None:
    """None where there is none, or not the one that was written: a cache that cannot be read is no cache."""
    try:
        digest, _, text = path.read_text(encoding="ascii").partition("\n")
    except (OSError, ValueError):
        return None
    return Thumbnail(**json.loads(text)) if digest == sha256(text.encode()) else None
