"""Shift and scale of a result against its source: what instruction editors get wrong and pixel errors do not name.

The pictures may differ in every colour and texture, so the directions of their edges are compared, not values: orientation
correlation (Fitch et al. 2002; blind to the sign of a contrast) with half of the phase correlation's whitening, at every
shift by FFT, for a grid of scales. Measured on scenes of which material *and* background were replaced, shifted by up to 5
and scaled by up to 15%: docs/evaluation.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pnp_batch.evaluation.columns import VERSIONS
from pnp_batch.evaluation.values import Pair, Values
from pnp_batch.media.images import Pixels

Array = NDArray[np.float64]
Spectrum = NDArray[np.complex128]

SIDE = 192  # longer side at which edges are compared: finer texture only disturbs
SCALES = np.exp(np.linspace(-0.3, 0.3, 21))  # 0.74 to 1.35 in steps of 3%
MAX_SHIFT = 0.25  # of a side; beyond it little of the picture is left to compare
# Least height of the peak over the root mean square of the surface, for edges of 64 pixels a side; it grows with the root of
# the side. Chosen so that of scenes that have nothing to do with each other 2% pass at most (docs/evaluation.md).
LEAST_SHARPNESS = 8.0
UNRELATED = "the edges of result and source have too little in common to be aligned"


@dataclass(frozen=True)
class Alignment:
    """How the source has to be moved to lie on the result.

    Attributes:
        shift_x: Pixels to the right.
        shift_y: Pixels down.
        scale: Magnification about the centre, before the shift.
        sharpness: How far the best match stands out, over what it takes to be believed; below 1 the rest means nothing.
    """

    shift_x: float
    shift_y: float
    scale: float
    sharpness: float


def align(source: Pixels, result: Pixels) -> Alignment:
    """The shift and scale (no rotation) under which the pictures' edges match best.

    Args:
        source: (height, width, 3).
        result: Likewise.
    """
    height, width = source.shape[:2]
    factor = min(SIDE / max(height, width), 1.0)
    size = max(round(width * factor), 8), max(round(height * factor), 8)
    target = _spectrum(result, size)
    peaks = [_peak(_spectrum(source, size, float(scale)), target) for scale in SCALES]
    heights = np.array([peak[0] for peak in peaks])
    best = int(heights.argmax())
    step = float(np.log(SCALES[1] / SCALES[0]))
    scale = float(SCALES[best] * np.exp(step * _vertex(heights, best)))
    sharpness, y, x = peaks[best]
    needed = LEAST_SHARPNESS * math.sqrt(max(size) / 64)
    return Alignment(x * width / size[0], y * height / size[1], scale, sharpness / needed)


def _spectrum(pixels: Pixels, size: tuple[int, int], scale: float = 1.0) -> Spectrum:
    """Spectrum of the picture's edge directions at `size`, magnified about the centre, faded out towards the border."""
    width, height = size
    grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BOX).convert("F")
    if scale != 1:
        at = (1 / scale, 0, width / 2 * (1 - 1 / scale), 0, 1 / scale, height / 2 * (1 - 1 / scale))
        grey = grey.transform(size, Image.Transform.AFFINE, at, Image.Resampling.BILINEAR)
    down, right = np.gradient(np.asarray(grey, np.float64))
    gradient = right + 1j * down
    # Squaring makes opposite directions one; the root keeps strong edges from being all there is.
    edges = gradient**2 / np.maximum(np.abs(gradient), 1e-6) ** 1.5
    window = np.outer(*(np.hanning(n + 2)[1:-1] for n in edges.shape))
    spectrum: Spectrum = np.fft.fft2((edges - (edges * window).sum() / window.sum()) * window)
    return spectrum


def _peak(source: Spectrum, target: Spectrum) -> tuple[float, float, float]:
    """Sharpness and sub-pixel place (y, x) of the best match within `MAX_SHIFT`."""
    cross = target * source.conj()
    surface = np.fft.fftshift(np.fft.ifft2(cross / (np.sqrt(np.abs(cross)) + 1e-12)).real)
    middle = [n // 2 for n in surface.shape]
    reach = [max(int(n * MAX_SHIFT), 1) for n in surface.shape]
    part = surface[middle[0] - reach[0] : middle[0] + reach[0] + 1, middle[1] - reach[1] : middle[1] + reach[1] + 1]
    y, x = (int(i) for i in np.unravel_index(part.argmax(), part.shape))
    place = y + _vertex(part[:, x], y) - reach[0], x + _vertex(part[y], x) - reach[1]
    spread = float(np.sqrt((part**2).mean()))
    return (float(part.max()) / spread if spread else 0.0), *place


def _vertex(values: Array, at: int) -> float:
    """Place of a parabola's top through a maximum and its neighbours, relative to the maximum; 0 at an end."""
    if not 0 < at < len(values) - 1:
        return 0.0
    before, top, after = values[at - 1 : at + 2]
    bend = before - 2 * top + after
    return 0.0 if bend == 0 else float(np.clip((before - after) / (2 * bend), -0.5, 0.5))


class PixelAlignment:
    """Shift (pixels; along x, y and in all) and scale of the result against its source."""

    name = "alignment"
    version = VERSIONS["alignment"]
    columns: tuple[str, ...] = ("shift", "shift_x", "shift_y", "scale")
    identity: Mapping[str, Any] = {}
    uses_mask = False

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        return [self._of(align(pair.source, pair.result)) for pair in pairs]

    def _of(self, found: Alignment) -> Values:
        if found.sharpness < 1:
            return dict.fromkeys(self.columns, UNRELATED)
        shift = math.hypot(found.shift_x, found.shift_y)
        return {"shift": shift, "shift_x": found.shift_x, "shift_y": found.shift_y, "scale": found.scale}
