"""Making test clips with ffmpeg, whose reading and writing is independent of ours."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray


def ffmpeg(*arguments: object) -> bytes:
    """Runs the ffmpeg binary; gives what it printed."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-nostdin", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def film(
    path: Path, *options: object, size: str = "96x64", rate: str = "25", seconds: float = 1, sound: bool = True
) -> Path:
    """A test card with a counter, and half-second steps of a rising tone."""
    tone = f"aevalsrc='0.5*sin(2*PI*(200+200*floor(t/0.5))*t)':d={seconds}:s=48000"
    inputs = ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={seconds}"]
    inputs += ["-f", "lavfi", "-i", tone] if sound else []
    ffmpeg(*inputs, *(options or ("-pix_fmt", "yuv420p")), path)
    return path


def tones(path: Path, seconds: float) -> list[int]:
    """The loudest frequency of each quarter second, to 10 Hz."""
    samples = np.frombuffer(ffmpeg("-i", path, "-f", "s16le", "-ac", "1", "-ar", "48000", "-"), np.int16)
    begins = (np.arange(0.05, seconds - 0.15, 0.25) * 48000).astype(int)
    return [int(np.argmax(np.abs(np.fft.rfft(samples[b : b + 4800].astype(float)))) * 10) for b in begins]


def decoded(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """All frames as ffmpeg itself decodes them, upright, (frames, height, width, 3)."""
    raw = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, size[1], size[0], 3)
