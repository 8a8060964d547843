"""The columns of an evaluation: which metric fills them, in which version, on which backbone. No torch."""

from __future__ import annotations

from collections.abc import Mapping

# What a name in `evaluation.metrics` stands for, and what it adds where the source has a mask.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "psnr": ("psnr",),
    "mse": ("mse",),
    "ssim": ("ssim",),
    "lpips": ("lpips",),
    "structure_distance": ("structure_distance",),
    "structure_distance_pie": ("structure_distance_pie",),
    "clip_similarity": ("clip_similarity",),
    "text_gain": ("text_gain",),
    "alignment": ("shift", "shift_x", "shift_y", "scale"),
    "reconstruction_psnr": ("reconstruction_psnr",),
    "reconstruction_lpips": ("reconstruction_lpips",),
}
MASKED: Mapping[str, tuple[str, ...]] = {
    "psnr": ("psnr_outside", "psnr_inside", "psnr_pie"),
    "mse": ("mse_outside", "mse_inside", "mse_pie"),
    "ssim": ("ssim_outside", "ssim_inside", "ssim_pie"),
    "lpips": ("lpips_pie",),
    "clip_similarity": ("clip_similarity_inside",),
}

# Part of every metric's key: raise one when the same pictures give other numbers.
VERSIONS: Mapping[str, int] = {
    "closed-forms": 2,
    "alignment": 1,
    "lpips": 2,
    "reconstruction_psnr": 1,
    "reconstruction_lpips": 2,
    "structure_distance": 1,
    "structure_distance_pie": 2,
    "text": 2,
}

# The key of `evaluation` that names the weights behind a column; the other columns need none.
BACKBONES: Mapping[str, str] = {
    "lpips": "lpips",
    "reconstruction_lpips": "lpips",
    "structure_distance": "dino",
    "structure_distance_pie": "dino",
    "clip_similarity": "clip",
    "text_gain": "clip",
}

METRICS_FILE = "metrics.jsonl"  # in the output folder: the rows of the last evaluation
NOT_METRICS = frozenset(("file_name", "source", "prompt", "method", "nan", "key", "hardware", "seconds"))

BETTER: Mapping[str, str] = {
    "psnr": "↑",
    "mse": "↓",
    "ssim": "↑",
    "lpips": "↓",
    "structure": "↓",
    "clip": "↑",
    "text": "↑",
    "shift": "→ 0",
    "scale": "→ 1",
    "reconstruction": "↑",
    "reconstruction_lpips": "↓",
}


def better(column: str) -> str:
    """Which way a column is better: `↑`, `↓`, or the number it should be near."""
    return BETTER.get(column) or BETTER[column.split("_")[0]]
