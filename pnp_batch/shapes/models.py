"""Models that paint scenes."""

from __future__ import annotations

from pathlib import Path

from pnp_batch.checkpoint import Checkpoint, resolve
from pnp_batch.errors import ModelError
from pnp_batch.shapes.scenes import SIDE


def scene_model(name: str, base: Path) -> Checkpoint:
    """Resolves a model and checks that its pictures have the size that scenes are rendered, trained on and judged at.

    Args:
        name: As in a manifest.
        base: What a relative path is relative to.

    Raises:
        ModelError: There is no such model, or it paints pictures of another size.
    """
    checkpoint = resolve(name, base)
    if checkpoint.sample_size != SIDE:
        size = checkpoint.sample_size
        raise ModelError(f"{name} paints pictures of {size}x{size} pixels; scenes have {SIDE:.0f}x{SIDE:.0f}")
    return checkpoint
