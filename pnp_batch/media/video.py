"""Reading clips frame by frame: how many there are, when each is shown, and their pixels, upright, as 8-bit RGB.

PyAV decodes, since timestamps must survive (23.976 frames a second, variable rates); nothing is ever held but one frame.
Only local files are opened: no protocol but `file`, no playlist that could name another one.
"""

from __future__ import annotations

import re
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

from pnp_batch.errors import ItemError
from pnp_batch.media.images import MAX_PIXELS, SUFFIXES, Pixels, load_rgb, picture_size, rgb_pixels

# Demuxers of files that hold their own frames; playlists, devices and scripts are none of them.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpeg,mpegts,h264,hevc,ivf,ogg"
LOCAL_ONLY = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
MAX_FRAMES = 1_000_000  # eleven hours at 25 frames a second
VIDEO_VERSION = 2  # part of every digest of a frame: raise it when the same file decodes to other pixels

NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")  # what comes before the last number of a name, the number, what comes after
HDR = {16: "PQ", 18: "HLG"}  # transfer functions (ITU-T H.273) whose numbers are not those of a screen
SHORTEST_TICK = Fraction(1, 1_000_000)  # seconds
FAR = 64  # frames ahead from which on seeking is cheaper than decoding what lies between


@dataclass(frozen=True)
class Timing:
    """When frames are shown.

    Attributes:
        times: Of each frame, in ticks, ascending.
        end: When the last one is over.
        tick: Seconds.
    """

    times: tuple[int, ...]
    end: int
    tick: Fraction

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last."""
        return float((self.end - self.times[0]) * self.tick)

    @property
    def rate(self) -> Fraction:
        """Frames a second, on average."""
        return len(self.times) / ((self.end - self.times[0]) * self.tick)

    @property
    def is_constant(self) -> bool:
        """Whether all frames are shown equally long."""
        return len({b - a for a, b in zip(self.times, (*self.times[1:], self.end), strict=True)}) == 1

    def chosen(self, numbers: range, stop: int) -> Timing:
        """The timing of some of the frames, each shown until the next chosen one, the last one at most until `stop`."""
        follower = min(numbers[-1] + numbers.step, stop)
        end = self.times[follower] if follower < len(self.times) else self.end
        return Timing(tuple(self.times[n] for n in numbers), end, self.tick)

    def beginning(self, count: int) -> Timing:
        """The timing of the first frames."""
        return self.chosen(range(count), len(self.times)) if count < len(self.times) else self

    def simplified(self) -> Timing:
        """The same times from 0 in the longest ticks that tell them; in microseconds where those are shorter: few muxers can."""
        times = [time - self.times[0] for time in (*self.times, self.end)]
        longest = self.tick * gcd(*times)
        tick = longest if longest >= SHORTEST_TICK else SHORTEST_TICK
        *starts, end = (round(time * self.tick / tick) for time in times)
        return Timing(tuple(starts), end, tick)

    def regular(self, rate: Fraction | None) -> Timing:
        """Evenly at `rate` frames a second, where these times are that but for rounding to their tick; else as it is."""
        step = 1 / (rate * self.tick) if rate else Fraction(0)
        if not rate or self.is_constant or step < 4:  # ticks so coarse are no rounding
            return self
        far = (abs(time - self.times[0] - n * step) > 1 for n, time in enumerate((*self.times, self.end)))
        return self if any(far) else Timing(tuple(range(len(self.times))), len(self.times), 1 / rate)


@dataclass(frozen=True)
class Footage:
    """What a clip holds, known by decoding it once.

    Attributes:
        timing: Of the frames that can be decoded, up to `problem`.
        size: Width and height as a person sees it: upright, with square pixels.
        rotation: Degrees counterclockwise by which a player turns the stored frames: 0, 90, 180 or 270; 0 if it mirrors them.
        audio: Whether there is sound.
        offset: Seconds from the beginning of the file to the first frame.
        problem: What is wrong with the file after these frames; empty for a sound one.
        nominal: Frames a second as the file states it; its times may be rounded to milliseconds.
        seekable: Whether a frame can be found by its time.
        files: For a folder of numbered frames their names.
        notes: What a person should know who translates it.
    """

    timing: Timing
    size: tuple[int, int]
    rotation: int = 0
    audio: bool = False
    offset: float = 0.0
    problem: str = ""
    nominal: Fraction | None = None
    seekable: bool = True
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values; see `from_json`."""
        timing = {"times": self.timing.times, "end": self.timing.end, "tick": str(self.timing.tick)}
        return vars(self) | {"timing": timing, "nominal": self.nominal and str(self.nominal)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Footage:
        """What `as_json` wrote."""
        timing = values["timing"]
        read = Timing(tuple(timing["times"]), timing["end"], Fraction(timing["tick"]))
        nominal = values["nominal"] and Fraction(values["nominal"])
        lists = {name: tuple(values[name]) for name in ("size", "files", "notes")}
        return cls(**{**values, **lists, "timing": read, "nominal": nominal})


def survey_of(path: Path, *, lenient: bool = False, rate: Fraction = Fraction(24)) -> Footage:
    """Looks at every frame of a clip once.

    Args:
        path: A video file, or a folder of numbered pictures.
        lenient: Take damaged frames and go on after them; otherwise the clip ends at the first.
        rate: Frames a second of a folder, which does not say.

    Raises:
        ItemError: Not a single frame can be decoded.
    """
    if path.is_dir():
        return _survey_of_folder(path, rate, lenient)
    with _opened(path) as container:
        return _Survey(path, container, lenient).footage()


def numbered(folder: Path) -> dict[int, str]:
    """The pictures of a folder whose names differ in one number alone, by that number: `frame9.png` comes before `frame10.png`.

    Single pictures of other names, such as a cover, are none of them.

    Raises:
        ItemError: It cannot be told which pictures are the clip, or in which order.
    """
    series: dict[str, list[tuple[int, str]]] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(SUFFIXES)):
        if name[0] != "." and (parts := NUMBERED.fullmatch(name)):
            before, number, after = parts.groups()
            series.setdefault(f"{before}#{after.lower()}", []).append((int(number), name))
    several = {name: files for name, files in series.items() if len(files) > 1 or len(series) == 1}
    if not series:
        raise ItemError(f"{folder}: holds no numbered pictures ({', '.join(SUFFIXES)})")
    if len(several) != 1:
        raise ItemError(
            f"{folder}: holds several clips ({', '.join(several or series)}); give each a folder of its own"
        )
    (files,) = several.values()
    found: dict[int, str] = {}
    for number, name in sorted(files):
        if number in found:
            raise ItemError(f"{folder}: {found[number]} and {name} have the same number")
        found[number] = name
    return found


def _survey_of_folder(folder: Path, rate: Fraction, lenient: bool) -> Footage:
    numbers = numbered(folder)
    if len(numbers) > MAX_FRAMES:
        raise ItemError(f"{folder}: more than {MAX_FRAMES:,} frames")
    sizes: dict[str, tuple[int, int]] = {}
    problem = ""
    for name in numbers.values():
        try:
            sizes[name] = picture_size(folder / name)
        except ItemError as error:
            if not lenient:
                problem = str(error)
                break
    if not sizes:
        raise ItemError(problem or f"{folder}: none of its pictures can be read")
    first, size = next(iter(sizes.items()))
    if other := next((name for name in sizes if sizes[name] != size), None):
        wide, high = sizes[other]
        raise ItemError(f"{folder}: {other} has {wide}x{high} pixels, {first} {size[0]}x{size[1]}; a clip has one size")
    timing = Timing(tuple(range(len(sizes))), len(sizes), 1 / rate)
    return Footage(timing, size, problem=problem, files=tuple(sizes), notes=tuple(_gaps(list(numbers))))


def _gaps(numbers: Sequence[int]) -> Iterator[str]:
    steps = [after - before for before, after in pairwise(numbers)]
    wide = [n for n, step in enumerate(steps) if step != min(steps)]
    if wide:
        at = numbers[wide[0]]
        more = f" and {len(wide) - 1} more gaps" if len(wide) > 1 else ""
        yield f"after number {at} comes {numbers[wide[0] + 1]}{more}; the frames that are there follow each other"


class _Survey:
    """One pass over a file."""

    def __init__(self, path: Path, container: InputContainer, lenient: bool) -> None:
        self._path, self._container, self._lenient = path, container, lenient
        self._stream = _film(container)
        self._tick = self._stream.time_base or Fraction(1, 1000)
        self._times: list[int] = []
        self._end = 0
        self._seekable = True
        self._problem = ""
        self._first: Any = None

    def footage(self) -> Footage:
        """What the frames tell, all of them decoded once."""
        for frame in _frames(self._container, self._stream, self._damaged):
            if frame.is_corrupt:
                self._damaged(f"frame {len(self._times)} is damaged")
            if self._problem and not self._lenient:
                break
            self._add(frame)
        if not self._times:
            raise ItemError(f"{self._path}: {self._problem or 'holds no frame that can be decoded'}")
        if not self._problem and (missing := self._missing()):
            self._damaged(missing)
        begin = (self._container.start_time or 0) / 1e6
        return Footage(
            timing=Timing(tuple(self._times), self._end, self._tick),
            nominal=self._stream.guessed_rate,
            size=_display_size(self._first, self._stream.sample_aspect_ratio),
            rotation=_rotation(self._first),
            audio=bool(self._container.streams.audio) and _is_known(self._container.streams.audio[0]),
            offset=max(round(float(self._times[0] * self._tick) - begin, 6), 0.0),
            problem="" if self._lenient else self._problem,
            seekable=self._seekable and not self._problem and "gif" not in self._container.format.name,
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        sounds = self._container.streams.audio
        if sounds and not _is_known(sounds[0]):
            yield "its sound is of a kind that cannot be read; the result has none"
        elif len(sounds) > 1:
            yield f"of its {len(sounds)} sound tracks the result has the first"
        for kind in {self._first.color_trc, self._stream.codec_context.color_trc} & HDR.keys():
            yield f"it is HDR ({HDR[kind]}), which is read as it is, without tone mapping: it will look flat"

    def _damaged(self, message: str) -> None:
        self._problem = self._problem or message

    def _add(self, frame: Any) -> None:
        if len(self._times) == MAX_FRAMES:
            raise ItemError(f"{self._path}: more than {MAX_FRAMES:,} frames")
        if self._first is None:
            _check_size(self._path, frame)
            self._first = frame
        shown = frame.duration or self._usual_duration()
        if frame.pts is None or (self._times and frame.pts <= self._times[-1]):
            self._seekable = False  # it does not say when it is shown, or not sensibly: when the one before is over
            self._times.append(self._end if self._times else 0)
        else:
            self._times.append(frame.pts)
        self._end = self._times[-1] + shown

    def _usual_duration(self) -> int:
        rate = self._stream.guessed_rate or self._stream.average_rate or Fraction(25)
        return max(round(1 / (rate * self._tick)), 1)

    def _missing(self) -> str:
        """What a file that ends early lacks: by its index where it has a whole one, else by the length it states."""
        if "mp4" in self._container.format.name:
            ends = [entry.pos + entry.size for entry in self._stream.index_entries]
            is_cut = max(ends, default=0) > self._path.stat().st_size
            return f"the file is truncated: {len(self._times)} of {len(ends)} frames are there" if is_cut else ""
        stated = _stated_seconds(self._container, self._stream)
        found = float(self._end * self._tick) - (self._container.start_time or 0) / 1e6
        slack = max(0.25, 3 * float(self._usual_duration() * self._tick))
        if stated is not None and found < stated - slack:
            return f"the file is truncated: it states {stated:.1f} s, {found:.1f} s of frames are there"
        return ""


def _is_known(sound: Any) -> bool:
    """Whether there is a decoder for a sound track; PyAV has no codec context otherwise."""
    return sound.codec_context is not None


def _stated_seconds(container: InputContainer, stream: Any) -> float | None:
    tagged = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "").strip("\0 "))
    if tagged:
        hours, minutes, seconds = (float(part) for part in tagged.groups())
        return 3600 * hours + 60 * minutes + seconds
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None or len(container.streams) > 1 else container.duration / 1e6


class VideoReader:
    """The frames of one clip by number. Goes forward by decoding, and elsewhere by seeking.

    Args:
        path: The clip.
        footage: What is known about it.
    """

    def __init__(self, path: Path, footage: Footage) -> None:
        self.path, self.footage = path, footage
        self._container: InputContainer | None = None
        self._frames: Iterator[Any] = iter(())
        self._next = 0

    def frame(self, number: int, size: tuple[int, int]) -> Pixels:
        """One frame, (height, width, 3) uint8 RGB of a `size` (width, height), upright.

        Raises:
            ItemError: It cannot be decoded.
        """
        if self.footage.files:
            return load_rgb(self.path / self.footage.files[number], size)
        try:
            return _upright(self._found(number), size)
        except (FFmpegError, OSError) as error:
            self.close()
            raise ItemError(f"{self.path}: frame {number} cannot be decoded ({error})") from error

    def close(self) -> None:
        """Lets go of the file."""
        if self._container is not None:
            self._container.close()
        self._container, self._frames, self._next = None, iter(()), 0

    def _found(self, number: int) -> Any:
        far = self.footage.seekable and number > self._next + FAR
        if self._container is None or number < self._next or far:
            self._open_at(number if self.footage.seekable and number > FAR else 0)
        frame = self._forward_to(number)
        if frame is None:  # the seek led too far, as it may in a transport stream
            self._open_at(0)
            frame = self._forward_to(number)
        if frame is None:
            raise ItemError(f"{self.path}: frame {number} is no longer there; the file has changed, run again")
        return frame

    def _open_at(self, number: int) -> None:
        self.close()
        self._container = container = _open(self.path)
        stream = _film(container)
        stream.thread_type = "AUTO"
        if number:
            container.seek(self.footage.timing.times[number], stream=stream)
        self._frames = _frames(container, stream, lambda _: None)

    def _forward_to(self, number: int) -> Any:
        for frame in self._frames:
            place = self._next
            if self.footage.seekable:
                place = bisect_left(self.footage.timing.times, frame.pts)
            self._next = place + 1
            if place >= number:
                return frame if place == number else None
        return None


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """Opens a clip and names whatever goes wrong while it is read."""
    try:
        with _open(path) as container:
            _film(container).thread_type = "AUTO"
            yield container
    except ItemError:
        raise
    except (FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ItemError(
            f"{path}: not a readable video ({reason}); if it was cut off, only a whole copy helps"
        ) from error


def _open(path: Path) -> InputContainer:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ItemError(f"{path}: not an ordinary file")
    if not found.st_size:
        raise ItemError(f"{path}: the file is empty")
    # As a URL, a name such as "concat:a|b" would be a protocol of its own; an absolute path never is.
    container = av.open(str(path.absolute()), options=LOCAL_ONLY)
    if not _films(container):
        container.close()
        raise ItemError(f"{path}: holds no video")
    return container


def _films(container: InputContainer) -> list[Any]:
    """The video streams; a cover picture is none."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def _film(container: InputContainer) -> Any:
    return _films(container)[0]


def _frames(container: InputContainer, stream: Any, damaged: Callable[[str], None]) -> Iterator[Any]:
    """All frames that can be decoded, in the order in which they are shown; what cannot is told to `damaged`."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except FFmpegError as error:
            damaged(f"the file is damaged ({error.strerror})")
            return
        try:
            yield from packet.decode()
        except FFmpegError as error:
            damaged(f"a frame cannot be decoded ({error.strerror})")


def _upright(frame: Any, size: tuple[int, int]) -> Pixels:
    """Pixels as a person sees them: transparency over white, turned as the file says, of a `size` (width, height)."""
    kind = "rgba" if any(component.is_alpha for component in frame.format.components) else "rgb24"
    pixels, turn = frame.to_ndarray(format=kind), _turn(frame)
    pixels = pixels.swapaxes(0, 1) if turn.swaps else pixels
    pixels = pixels[:: -1 if turn.flips_rows else 1, :: -1 if turn.flips_columns else 1]
    return rgb_pixels(Image.fromarray(np.ascontiguousarray(pixels)), size)


class _Turn(NamedTuple):
    """What makes stored pixels upright: rows and columns swapped, then flipped."""

    swaps: bool
    flips_rows: bool
    flips_columns: bool

    @property
    def is_mirrored(self) -> bool:
        return self.swaps ^ self.flips_rows ^ self.flips_columns


def _turn(frame: Any) -> _Turn:
    """Read from the display matrix, whose angle alone does not tell a mirrored picture from one upside down."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Turn(False, False, False)
    x_of_x, y_of_x, _, x_of_y, y_of_y, *_ = (int(value) for value in np.frombuffer(matrix, np.int32))
    if abs(x_of_x) >= abs(y_of_x):
        return _Turn(False, y_of_y < 0, x_of_x < 0)
    return _Turn(True, y_of_x < 0, x_of_y < 0)


def _rotation(frame: Any) -> int:
    """In whole quarters, counterclockwise; none for a mirrored picture, which is written upright."""
    return 0 if _turn(frame).is_mirrored else int(round(frame.rotation / 90) % 4 * 90)


def _display_size(frame: Any, sample_aspect: Fraction | None) -> tuple[int, int]:
    width, height = max(round(frame.width * (sample_aspect or 1)), 1), frame.height
    return (height, width) if _turn(frame).swaps else (width, height)


def _check_size(path: Path, frame: Any) -> None:
    if frame.width * frame.height > MAX_PIXELS:
        raise ItemError(f"{path}: {frame.width}x{frame.height} pixels; the limit is {MAX_PIXELS:,} pixels")
