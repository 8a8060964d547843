"""Text to image alone: what the model paints from the prompt and a seed. Of the guidance image it takes the size, no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, plain_loop
from pnp_batch.diffusion.trajectories import noise_like
from pnp_batch.methods.pnp import Batch
from pnp_batch.methods.sampling import Watch, sample


@torch.inference_mode()
def translate(
    model: DiffusionModel,
    clean: Tensor,
    source_prompts: Sequence[str],
    batches: Sequence[Batch],
    loop: Loop = plain_loop,
    watch: Watch | None = None,
) -> list[Tensor]:
    """Samples each target from noise.

    Args:
        model: The model.
        clean: (sources, 4, height, width) float32; only its shape counts.
        source_prompts: Not used.
        batches: The targets; `settings.seed` draws the noise.
        loop: Runs the steps.
        watch: See `sample`.

    Returns:
        For each batch its final latents, (targets, 4, height, width) float32.
    """
    starts = [
        torch.cat([noise_like(clean[target.source], target.settings.seed) for target in batch]) for batch in batches
    ]
    return sample(model, batches, starts, [[0] * len(batch) for batch in batches], loop, watch)
