"""SDEdit (Meng et al., ICLR 2022, arXiv 2108.01073): add noise to the picture's latent, then sample with the target prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnp_batch.diffusion import ddim
from pnp_batch.diffusion.guidance import skipped_steps
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, plain_loop
from pnp_batch.diffusion.trajectories import noise_like
from pnp_batch.methods.pnp import Batch, Target
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
    """Noises each guidance image to the level of its target's `sdedit_strength` and samples from there.

    The first steps are left out as diffusers' image-to-image pipelines do: of n steps the last `int(n * strength)` are run.

    Args:
        model: The model.
        clean: (sources, 4, height, width) float32, the guidance images' latents.
        source_prompts: Not used: nothing is inverted.
        batches: The targets; `settings.seed` draws the noise.
        loop: Runs the steps.
        watch: See `sample`.

    Returns:
        For each batch its final latents, (targets, 4, height, width) float32.
    """
    starts = [torch.cat([_noised(model, clean[target.source], target) for target in batch]) for batch in batches]
    begins = [[skipped_steps(target.settings) for target in batch] for batch in batches]
    return sample(model, batches, starts, begins, loop, watch)


def _noised(model: DiffusionModel, clean: Tensor, target: Target) -> Tensor:
    """(1, 4, height, width): the latent at the timestep that its sampling begins with."""
    timesteps = model.checkpoint.schedule.timesteps(target.settings.num_inference_steps)
    begin = skipped_steps(target.settings)
    if begin == len(timesteps):
        return clean[None]
    return ddim.renoised(clean[None], noise_like(clean, target.settings.seed), model.alphas[timesteps[begin]])
