"""Clips in hand: which frames of a video are translated, and the windows they are cut into.

A clip is cut into *segments* of eight frames and *windows* of five segments. Windows share a segment with the next one, where
both give a picture and the video goes over from one to the other. All of it follows from the clip alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pnp_batch.errors import ItemError, disk_errors_named
from pnp_batch.ledger import Ledger, unit_name
from pnp_batch.manifest import VideoSpec
from pnp_batch.media.images import Pixels
from pnp_batch.media.video import VIDEO_VERSION, Footage, Timing, VideoReader, survey_of
from pnp_batch.store import DigestCache
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import sha256

SEGMENT = 8  # frames with one keyframe among them
WINDOW = 40  # frames that are translated together: what memory is bounded by


@dataclass(frozen=True)
class Clip:
    """The chosen frames of a video.

    Attributes:
        path: The file, or the folder of numbered pictures.
        spec: What the manifest says about it.
        footage: What it holds.
        numbers: Of the chosen frames, in the file.
    """

    path: Path
    spec: VideoSpec
    footage: Footage
    numbers: range

    @property
    def timing(self) -> Timing:
        """When the chosen frames are shown."""
        stop = min(self.spec.stop or len(self.footage.timing.times), len(self.footage.timing.times))
        chosen = self.footage.timing.chosen(self.numbers, stop)
        return chosen.regular(self.footage.nominal / self.numbers.step if self.footage.nominal else None)

    @property
    def first_second(self) -> float:
        """Where in the file the first chosen frame is shown, for the sound."""
        timing = self.footage.timing
        return self.footage.offset + float((timing.times[self.numbers[0]] - timing.times[0]) * timing.tick)

    def windows(self, *, overlapping: bool) -> Iterator[Window]:
        """The windows, in order.

        Args:
            overlapping: Whether neighbours share a segment.
        """
        step = WINDOW - SEGMENT if overlapping else WINDOW
        count = len(self.numbers)
        for first in range(0, count, step):
            yield Window(self, first, min(WINDOW, count - first), overlapping)
            if first + WINDOW >= count:
                return


@dataclass(frozen=True)
class Window:
    """Frames of a clip that are translated together.

    Attributes:
        clip: The clip.
        first: Place of its first frame among the chosen ones; a multiple of `SEGMENT`.
        count: How many frames.
        overlapping: Whether it shares its first segment with the window before.
    """

    clip: Clip
    first: int
    count: int
    overlapping: bool

    @property
    def cut(self) -> tuple[int, int, bool]:
        """What makes a window of the clip."""
        return self.first, self.count, self.overlapping

    @property
    def shared(self) -> int:
        """How many of its frames the window before holds, too."""
        return min(SEGMENT, self.count) if self.overlapping and self.first else 0

    def share_of_later(self, place: int) -> float:
        """How much of a shared frame's picture is this window's: it grows evenly, and the rest is the earlier one's."""
        return (place - self.first + 1) / (self.shared + 1)


def opened(path: Path, spec: VideoSpec, store: Path, ledger: Ledger | None = None) -> Clip:
    """A clip with the chosen frames; the file is decoded once, and what was seen is noted in the store.

    Args:
        path: The video.
        spec: What the manifest says about it.
        store: Folder of the store.
        ledger: Where it is noted whom decoding it kills.

    Raises:
        ItemError: It cannot be read, is damaged within the range, or holds nothing there.
    """
    footage = _footage(path, spec, store, ledger)
    count = len(footage.timing.times)
    numbers = range(count)[spec.start : spec.stop : spec.stride][: spec.max_frames]
    wanted = range(spec.stop or count + 1)[spec.start :: spec.stride][: spec.max_frames]
    if footage.problem and (not numbers or len(numbers) < len(wanted)):
        raise ItemError(
            f"{path}: {footage.problem}; write `partial: true` to take the frames there are, or `stop:` to end before"
        )
    if not numbers:
        raise ItemError(f"{path}: there is no frame in this range; the clip has {count}")
    return Clip(path, spec, footage, numbers)


def survey_unit(path: Path) -> str:
    """What decoding a whole video is called in the ledger."""
    return unit_name("read", sha256(os.fsencode(f"{path} whole")))


def _footage(path: Path, spec: VideoSpec, store: Path, ledger: Ledger | None) -> Footage:
    """What the file holds: looked at once, then read from the store under the digest of what was noted."""
    what = f"video frames {spec.partial} {spec.fps} decoder {VIDEO_VERSION}"
    folder = store / "clips"

    def look() -> str:
        with _guarded(path, ledger):
            footage = survey_of(path, lenient=spec.partial, rate=Fraction(spec.fps))
        text = json.dumps(footage.as_json())
        digest = sha256(text.encode())
        with disk_errors_named(f"to {folder}"):
            write_atomic(folder / f"{digest}.json", text)
        return digest

    try:
        digests = DigestCache(store / "digests")
        text = _noted(folder, digests.of(path, what, look))
        if text is None:  # lost or damaged
            digests.put(path, what, look())
            text = _noted(folder, digests.of(path, what, look))
    except OSError as error:
        raise ItemError(f"{path}: cannot be read: {error.strerror}") from error
    assert text is not None
    return Footage.from_json(json.loads(text))


@contextmanager
def _guarded(path: Path, ledger: Ledger | None) -> Iterator[None]:
    """A video may well kill the process that decodes it, be it the one that only plans; after some deaths it is refused."""
    if ledger is None:
        yield
        return
    ledger.refuse(survey_unit(path))
    with ledger.crashes_noted(), ledger.attempt([survey_unit(path)]):
        yield


def _noted(folder: Path, digest: str) -> str | None:
    try:
        text = (folder / f"{digest}.json").read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    return text if sha256(text.encode()) == digest else None


class ClipReader:
    """Frames of clips, one clip open at a time: windows come in order, and so each frame is decoded once."""

    def __init__(self) -> None:
        self._reader: VideoReader | None = None

    def pixels(self, clip: Clip, place: int, size: tuple[int, int]) -> Pixels:
        """The frame at a place among the chosen ones, (height, width, 3) uint8 RGB, upright, of a `size`.

        Raises:
            ItemError: It cannot be decoded.
        """
        if self._reader is None or (self._reader.path, self._reader.footage) != (clip.path, clip.footage):
            self.close()
            self._reader = VideoReader(clip.path, clip.footage)
        return self._reader.frame(clip.numbers[place], size)

    def close(self) -> None:
        """Lets go of the clip."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
