"""MSE, PSNR and SSIM of 8-bit RGB pictures, taken as values in [0, 1]; whole, or within a mask.

Written out here rather than taken from torchmetrics, whose SSIM (1.9) averages a border of reflected pixels that scikit-image
and the original leave out; and the masked forms need the maps. The tests hold everything against both libraries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pnp_batch.evaluation.columns import VERSIONS
from pnp_batch.evaluation.values import Mask, Pair, Value, Values
from pnp_batch.media.images import Pixels

Array = NDArray[np.float64]

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.B
C1, C2 = 0.01**2, 0.03**2
EQUAL = "the pictures are equal there, so the PSNR is infinite"
SMALL = f"the picture is smaller than the {WINDOW}x{WINDOW} window"
EMPTY = "the mask leaves nothing there"
NONE: Mapping[str, Value] = dict.fromkeys(("psnr", "mse", "ssim"), EMPTY)


def mse(a: Pixels, b: Pixels, region: Mask | None = None) -> float:
    """Mean squared error over pixels and channels.

    Args:
        a: (height, width, 3).
        b: Likewise.
        region: (height, width): only pixels where it is True; None for all.
    """
    squared = ((a.astype(np.float64) - b) / 255) ** 2
    return float((squared if region is None else squared[region]).mean())


def psnr(error: float) -> Value:
    """Peak signal-to-noise ratio in dB of a mean squared error, for a peak of 1."""
    return EQUAL if error == 0 else -10 * math.log10(error)


def ssim_map(a: Pixels, b: Pixels) -> Array:
    """SSIM at each place where the whole Gaussian window lies in the picture (Wang et al. 2004, eq. 13).

    No padding, population covariance: the mean of the map is `skimage.metrics.structural_similarity(gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=1)`, which crops away the five pixels that padding touches.

    Args:
        a: (height, width, 3), at least 11 x 11.
        b: Likewise.

    Returns:
        (height - 10, width - 10, 3).
    """
    x, y = a / 255, b / 255
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    cov = _smooth(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + C1) * (2 * cov + C2)
    result: Array = top / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))
    return result


def _smooth(values: Array) -> Array:
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    height, width = (n - WINDOW + 1 for n in values.shape[:2])
    rows = sum(w * values[i : i + height] for i, w in enumerate(weights))
    smooth: Array = sum(w * rows[:, i : i + width] for i, w in enumerate(weights))
    return smooth


def ssim(a: Pixels, b: Pixels, region: Mask | None = None) -> Value:
    """Mean SSIM over places and channels; with a region, over windows whose centre lies in it."""
    if min(a.shape[:2]) < WINDOW:
        return SMALL
    values, edge = ssim_map(a, b), WINDOW // 2
    if region is None:
        return float(values.mean())
    centres = region[edge:-edge, edge:-edge]
    return float(values[centres].mean()) if centres.any() else EMPTY


def blackened(pixels: Pixels, region: Mask) -> Pixels:
    """The picture with everything outside of a region black, which is how PIE-Bench's code applies its masks."""
    return pixels * region[..., None].astype(np.uint8)


class ClosedForms:
    """PSNR, MSE and SSIM: whole, outside and inside the mask, and outside as PIE-Bench's code computes it."""

    name = "closed-forms"
    version = VERSIONS["closed-forms"]
    columns: tuple[str, ...] = ("psnr", "mse", "ssim")
    identity: Mapping[str, Any] = {}
    uses_mask = True

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        return [self._of(pair) for pair in pairs]

    def _of(self, pair: Pair) -> Values:
        values = _three(pair.source, pair.result)
        if pair.mask is None:
            return values
        outside = ~pair.mask
        parts = {
            "outside": _three(pair.source, pair.result, outside),
            "inside": _three(pair.source, pair.result, pair.mask),
            "pie": _as_pie(pair.source, pair.result, outside),
        }
        return {**values, **{f"{name}_{where}": value for where, own in parts.items() for name, value in own.items()}}


class ReconstructionPsnr:
    """PSNR of the guidance image and what sampling its inversion back gives."""

    name = "reconstruction-psnr"
    version = VERSIONS["reconstruction_psnr"]
    columns: tuple[str, ...] = ("reconstruction_psnr",)
    identity: Mapping[str, Any] = {}
    uses_mask = False

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        return [{"reconstruction_psnr": self._of(pair.source, pair.reconstruction)} for pair in pairs]

    def _of(self, source: Pixels, reconstruction: Pixels | str) -> Value:
        return reconstruction if isinstance(reconstruction, str) else psnr(mse(source, reconstruction))


def _as_pie(a: Pixels, b: Pixels, outside: Mask) -> Mapping[str, Value]:
    """As PIE-Bench's code: black where it is edited. Wholly black pictures would be equal, and get "nan" there."""
    return _three(blackened(a, outside), blackened(b, outside)) if outside.any() else NONE


def _three(a: Pixels, b: Pixels, region: Mask | None = None) -> Mapping[str, Value]:
    if region is not None and not region.any():
        return NONE
    error = mse(a, b, region)
    return {"psnr": psnr(error), "mse": error, "ssim": ssim(a, b, region)}
