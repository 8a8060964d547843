"""Writing clips: the frames one by one, each at its time, then the sound of the source beside them.

PyAV encodes, since every frame has a time of its own; the ffmpeg binary of imageio-ffmpeg adds the sound and makes GIFs. The
same frames and settings give the same bytes on every machine: one thread, no CPU-dependent shortcuts, no dates or versions.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from PIL import Image

from pnp_batch.errors import ItemError
from pnp_batch.media.images import Pixels, encode_png
from pnp_batch.media.video import LOCAL_ONLY, Timing

ENCODE_VERSION = 2  # part of every video's key: raise it when the same frames become other bytes
BT709 = 1
UNSEEN = 0.02  # of an aspect: sides are rounded to cells of the model
GIF_SHORTEST = Fraction(1, 50)  # seconds that a frame is shown
BITEXACT: int = av.container.Flags.bitexact.value  # type: ignore[assignment]  # its stub leaves the value out
LIMITED = 1  # 16 to 235


@dataclass(frozen=True)
class Format:
    """How a kind of file is written.

    Attributes:
        suffix: Of its name; empty for a folder.
        muxer: ffmpeg's name of the container.
        interim: Of the one that the frames are first written to.
        codec: Of the frames.
        pixels: Pixel format.
        options: Of the codec, but for its quality.
        copied: Audio codecs that the container takes as they are.
        audio: What other sound is encoded to, as options of ffmpeg; empty for a container without sound.
        turns: Whether it can say that a player shall turn it.
    """

    suffix: str
    muxer: str
    interim: str
    codec: str
    pixels: str
    options: Mapping[str, str]
    copied: tuple[str, ...] = ()
    audio: tuple[str, ...] = ()
    turns: bool = False


_X264 = {"preset": "medium", "threads": "1", "x264-params": "cpu-independent=1"}
_AAC = ("-c:a", "aac", "-b:a", "192k")
FORMATS: dict[str, Format] = {
    "mp4": Format(
        ".mp4", "mp4", "mp4", "libx264", "yuv420p", _X264, ("aac", "mp3", "ac3", "eac3", "alac"), _AAC, turns=True
    ),
    "mov": Format(
        ".mov", "mov", "mov", "libx264", "yuv420p", _X264, ("aac", "mp3", "ac3", "alac", "pcm_s16le"), _AAC, turns=True
    ),
    "webm": Format(
        ".webm",
        "webm",
        "mp4",  # PyAV cannot tell WebM the shape of the pixels, and ffmpeg takes it from here
        "libvpx-vp9",
        "yuv420p",
        {"threads": "1", "b": "0", "cpu-used": "2"},
        ("opus", "vorbis"),
        ("-c:a", "libopus", "-b:a", "128k"),
    ),
    "gif": Format(".gif", "gif", "matroska", "ffv1", "bgr0", {"threads": "1"}),
    "frames": Format("", "", "", "", "", {}),
}


@dataclass(frozen=True)
class Sound:
    """The sound to lay beside the frames.

    Attributes:
        path: The file it is in.
        start: Seconds from the beginning of that file.
        seconds: How much of it; None for all that follows.
    """

    path: Path
    start: float
    seconds: float | None


@dataclass(frozen=True)
class Look:
    """How the frames are to be shown.

    Attributes:
        timing: When.
        aspect: Width to height on the screen, whatever the number of pixels.
        rotation: Degrees counterclockwise by which a player is told to turn them, as the source's player was.
        crf: Constant rate factor: 0 is lossless, 18 hardly visible, 51 worst (VP9 counts to 63).
    """

    timing: Timing
    aspect: Fraction
    rotation: int = 0
    crf: int = 18


def write_video(
    path: Path,
    frames: Iterable[Pixels],
    look: Look,
    kind: str = "mp4",
    sound: Sound | None = None,
    text: Mapping[str, str] | None = None,
) -> None:
    """Writes a clip; holds one frame at a time. The caller gives a temporary path and renames.

    Args:
        path: The file; for `frames` a folder that is made.
        frames: (height, width, 3) uint8, upright, one for each time of `look`.
        look: How they are shown.
        kind: One of `FORMATS`.
        sound: The source's sound, if it has any.
        text: Text chunks of each picture, where frames are written as pictures.

    Raises:
        ItemError: The sound cannot be read, or the frames cannot be written in this way.
        OSError: The disk is full.
    """
    how, look = FORMATS[kind], replace(look, timing=look.timing.simplified())
    if kind == "frames":
        _write_folder(path, _square(frames, look.aspect), text)
    elif kind == "gif":
        timing, kept = _for_gif(look.timing)
        shown = (frame for frame, is_kept in zip(frames, kept, strict=True) if is_kept)
        with _beside(path, ".mkv") as lossless:
            _encode(lossless, _square(shown, look.aspect), replace(look, timing=timing), how)
            _as_gif(lossless, path, timing)
    elif sound is None and how.interim == how.muxer:
        _encode(path, frames, look, how)
    else:
        with _beside(path, how.suffix) as silent:
            _encode(silent, frames, look, how)
            with _refusals_named(how):
                _finish(silent, path, sound, how)


@contextmanager
def _refusals_named(how: Format) -> Iterator[None]:
    """Around the encoder's own calls, never around the making of frames: that other bugs are none of the container's."""
    try:
        yield
    except OSError:
        raise  # PyAV's errors of the system are these, too
    except (FFmpegError, ValueError, LookupError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ItemError(
            f"the video could not be written as {how.muxer} ({what}); another `container:` may do"
        ) from error


def shortcomings(look: Look, kind: str) -> Iterator[str]:
    """What a kind of file cannot tell of how frames are to be shown, for a person."""
    if kind == "gif" and not all(kept := _for_gif(look.timing)[1]):
        yield f"a GIF shows at most 50 frames a second: it has {sum(kept)} of the {len(kept)} frames"
    if kind == "webm" and not look.timing.is_constant:
        yield "a WebM file does not tell how long its last frame is shown"


def _for_gif(timing: Timing) -> tuple[Timing, list[bool]]:
    """Times that browsers keep to, who slow down what is shown for less than 2/100 s, and which frames they leave."""
    ends = (*timing.times[1:], timing.end)
    if all((end - time) * timing.tick >= GIF_SHORTEST for time, end in zip(timing.times, ends, strict=True)):
        return timing, [True] * len(timing.times)
    slots = [int((time - timing.times[0]) * timing.tick / GIF_SHORTEST) for time in (*timing.times, timing.end)]
    kept = [n == 0 or slot > slots[n - 1] for n, slot in enumerate(slots[:-1])]
    times = tuple(slot for slot, is_kept in zip(slots, kept, strict=False) if is_kept)
    return Timing(times, max(slots[-1], times[-1] + 1), GIF_SHORTEST), kept


def _square(frames: Iterable[Pixels], aspect: Fraction) -> Iterator[Pixels]:
    """Frames with square pixels, for files that know no others: the squeezed side is stretched."""
    for pixels in frames:
        height, width = pixels.shape[:2]
        ratio = float(aspect * height / width)
        size = (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))
        if abs(ratio - 1) < UNSEEN:
            yield pixels
        else:
            yield np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _write_folder(folder: Path, frames: Iterable[Pixels], text: Mapping[str, str] | None) -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(frames):
        (folder / f"{number:06}.png").write_bytes(encode_png(pixels, text))


@contextmanager
def _beside(path: Path, suffix: str) -> Iterator[Path]:
    temporary = path.with_name(f"{path.name}.part{suffix}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _encode(path: Path, frames: Iterable[Pixels], look: Look, how: Format) -> None:
    turned = (np.rot90(pixels, -(look.rotation // 90)) if how.turns else pixels for pixels in frames)
    first = next(iterator := iter(turned))
    size = first.shape[1] + first.shape[1] % 2, first.shape[0] + first.shape[0] % 2
    with _refusals_named(how):
        container = av.open(str(path), "w", format=how.interim, options=_muxer_options(how.interim))
    try:
        with _refusals_named(how):
            stream = _stream(container, look, how, first.shape, size)
        shown: dict[int, int] = {}
        for pixels, (time, ticks) in zip(chain([first], iterator), _shown(look.timing), strict=True):
            shown[time] = ticks
            with _refusals_named(how):
                _mux(container, stream.encode(_frame(pixels, size, how, time, look.timing.tick)), shown)
        with _refusals_named(how):
            _mux(container, stream.encode(None), shown)
    finally:
        with _refusals_named(how):
            container.close()


def _stream(container: OutputContainer, look: Look, how: Format, shape: tuple[int, ...], size: tuple[int, int]) -> Any:
    container.flags |= BITEXACT
    stream: Any = container.add_stream(how.codec, rate=look.timing.rate.limit_denominator(100_000))
    (stream.width, stream.height), stream.pix_fmt = size, how.pixels
    stream.codec_context.time_base = stream.time_base = look.timing.tick
    stream.codec_context.thread_count = 1
    stream.options = {**how.options, **_quality(look, how)}
    stream.codec_context.sample_aspect_ratio = _sample_aspect(look, how, shape)
    if how.pixels == "yuv420p":
        _tag(stream.codec_context)
    if how.turns and look.rotation:
        stream.set_display_rotation(look.rotation)
    return stream


def _mux(container: OutputContainer, packets: Iterable[Any], shown: dict[int, int]) -> None:
    """Writes encoded frames with their durations, which encoders guess."""
    for packet in packets:
        packet.duration = shown.pop(packet.pts)
        container.mux(packet)


def _muxer_options(muxer: str) -> dict[str, str]:
    return {"movflags": "+faststart"} if muxer in ("mp4", "mov") else {}


def _quality(look: Look, how: Format) -> dict[str, str]:
    if how.codec == "ffv1":
        return {}
    # MP4 keeps durations in the order of decoding; only without B-frames is that the order of showing.
    return {"crf": str(look.crf)} | ({} if look.timing.is_constant or how.codec != "libx264" else {"bf": "0"})


def _sample_aspect(look: Look, how: Format, shape: tuple[int, ...]) -> Fraction:
    """What makes the stored pixels fill the aspect of the screen, turned if they are stored turned."""
    upright = 1 / look.aspect if how.turns and look.rotation % 180 else look.aspect
    return (upright * shape[0] / shape[1]).limit_denominator(1000)


def _tag(codec: Any) -> None:
    """Says which colours the numbers mean: players guess otherwise, by size."""
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = LIMITED


def _shown(timing: Timing) -> Iterator[tuple[int, int]]:
    """Time and duration of each frame, from 0."""
    for time, follower in zip(timing.times, (*timing.times[1:], timing.end), strict=True):
        yield time - timing.times[0], follower - time


def _frame(pixels: Pixels, size: tuple[int, int], how: Format, time: int, tick: Fraction) -> Any:
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, size[1] - height), (0, size[0] - width), (0, 0)), mode="edge")
    frame: Any = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
    if how.pixels == "yuv420p":
        frame = frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED, interpolation="AREA")
        frame.colorspace = BT709
    else:
        frame = frame.reformat(format=how.pixels)
    frame.pts, frame.time_base = time, tick
    return frame


def _as_gif(lossless: Path, path: Path, timing: Timing) -> None:
    """In two passes over the file: one palette for the whole clip, then the frames; neither holds the clip."""
    last = round((timing.end - timing.times[-1]) * timing.tick * 100)
    with _beside(path, ".png") as palette:
        _ffmpeg("-i", lossless, "-vf", "palettegen=stats_mode=diff", "-frames:v", "1", "-update", "1", "-y", palette)
        _ffmpeg(
            *("-i", lossless, "-f", "png_pipe", "-i", palette),
            *("-lavfi", "paletteuse=dither=bayer:bayer_scale=4:diff_mode=rectangle"),
            *("-fps_mode", "passthrough", "-enc_time_base", "1:100", "-final_delay", last, "-f", "gif", "-y", path),
        )


def _finish(silent: Path, path: Path, sound: Sound | None, how: Format) -> None:
    """Into the container it is to be in, with the sound: copied where the container takes its codec, else encoded."""
    beside = [] if sound is None else [*_cut(sound), "-i", sound.path.absolute(), "-map", "1:a:0", *_codec(sound, how)]
    options = chain.from_iterable((f"-{name}", value) for name, value in _muxer_options(how.muxer).items())
    _ffmpeg(
        *("-i", silent, *beside, "-map", "0:v:0", "-c:v", "copy"),
        *("-map_metadata", "-1", "-map_metadata:s", "-1", "-map_chapters", "-1", "-fflags", "+bitexact"),
        *(*options, "-f", how.muxer, "-y", path),
    )


def _cut(sound: Sound) -> Iterator[str]:
    yield from chain.from_iterable((f"-{name}", value) for name, value in LOCAL_ONLY.items())
    if sound.start > 0:
        yield from ("-ss", f"{sound.start:.6f}")
    if sound.seconds is not None:
        yield from ("-t", f"{sound.seconds:.6f}")


def _codec(sound: Sound, how: Format) -> tuple[str, ...]:
    return ("-c:a", "copy") if _audio_codec(sound.path) in how.copied else (*how.audio, "-flags:a", "+bitexact")


def _audio_codec(path: Path) -> str:
    with av.open(str(path.absolute()), options=LOCAL_ONLY) as container:
        return str(container.streams.audio[0].codec_context.codec.canonical_name)


def _ffmpeg(*arguments: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-threads", "1", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, check=False)
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip()[-300:]
        if os.strerror(errno.ENOSPC) in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ItemError(f"ffmpeg could not write {arguments[-1]}: {said}")


def side_by_side(left: Iterable[Pixels], right: Iterable[Pixels]) -> Iterator[Pixels]:
    """Pairs of frames as one frame each, left and right, all of one size."""
    for a, b in zip(left, right, strict=True):
        yield np.concatenate([a, b], axis=1)


def small_preview(frames: Iterable[Pixels], longest: int) -> Iterator[Pixels]:
    """Frames scaled down to a longest side, where they are larger."""
    for pixels in frames:
        image = Image.fromarray(pixels)
        image.thumbnail((longest, longest), Image.Resampling.BOX)
        yield np.asarray(image)
