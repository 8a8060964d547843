"""Guided DDIM sampling without injection, in batches: what the baselines are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pnp_batch.diffusion import constants
from pnp_batch.diffusion.guidance import guidance_rows
from pnp_batch.diffusion.inversion import denoise, weighted_sum
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, State
from pnp_batch.methods.pnp import Batch

Watch = Callable[[int, int, Tensor], None]


def sample(
    model: DiffusionModel,
    batches: Sequence[Batch],
    starts: Sequence[Tensor],
    begins: Sequence[Sequence[int]],
    loop: Loop,
    watch: Watch | None = None,
) -> list[Tensor]:
    """Samples from given latents with classifier-free guidance.

    Args:
        model: The model.
        batches: The targets; all have the same `num_inference_steps`.
        starts: For each batch the latents to start from, (targets, 4, height, width) float32.
        begins: For each batch the number of the sampling step that each target starts at; from the number of steps on,
            nothing is done to it.
        loop: Runs the steps (with checkpoints and progress).
        watch: Called after each step of each batch with the batch's number, the timestep and its latents.

    Returns:
        For each batch its final latents, (targets, 4, height, width) float32.
    """
    timesteps = model.checkpoint.schedule.timesteps(batches[0][0].settings.num_inference_steps)

    def step(i: int, state: State) -> None:
        for n, batch in enumerate(batches):
            active = [member for member, begin in enumerate(begins[n]) if begin <= i]
            if active:
                places = constants.indices(active, model.device)
                latents = state[str(n)][places]
                state[str(n)][places] = guided_step(model, [batch[m] for m in active], latents, timesteps, i)
            if watch:
                watch(n, timesteps[i], state[str(n)])

    # Copied, since a step writes into its state and a loop that is run again must find the start as it was.
    state = {str(n): start.to(model.device, copy=True) for n, start in enumerate(starts)}
    end = loop("translate", len(timesteps), state, step)
    return [end[str(n)] for n in range(len(batches))]


def guided_step(model: DiffusionModel, batch: Batch, latents: Tensor, timesteps: Sequence[int], i: int) -> Tensor:
    """One guided DDIM step down the grid, of (targets, 4, height, width) latents."""
    rows = [(n, row) for n, target in enumerate(batch) for row in guidance_rows(target.prompt, target.settings, i)]
    owner = constants.indices((n for n, _ in rows), model.device)
    weights = constants.numbers((row.weight for _, row in rows), model.device)
    output = model.predict(latents[owner], timesteps[i], [row.text for _, row in rows])
    return denoise(model, latents, weighted_sum(output, owner, weights, len(batch)), timesteps, i)
