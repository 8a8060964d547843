"""Plain DDIM from the inverted noise (Song et al. 2021): the target prompt takes over from the noisiest latent on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, plain_loop
from pnp_batch.methods.pnp import Batch
from pnp_batch.methods.sampling import Watch, sample


@torch.inference_mode()
def translate(
    model: DiffusionModel,
    trajectory: Tensor,
    source_prompts: Sequence[str],
    batches: Sequence[Batch],
    loop: Loop = plain_loop,
    watch: Watch | None = None,
) -> list[Tensor]:
    """Samples with the target prompt from where the inversion of the guidance image ended.

    Args:
        model: The model.
        trajectory: (sources, steps, 4, height, width) float32; only the first, noisiest latent counts.
        source_prompts: Not used: nothing is read from the source.
        batches: The targets.
        loop: Runs the steps.
        watch: See `sample`.

    Returns:
        For each batch its final latents, (targets, 4, height, width) float32.
    """
    starts = [trajectory[[target.source for target in batch], 0] for batch in batches]
    return sample(model, batches, starts, [[0] * len(batch) for batch in batches], loop, watch)
