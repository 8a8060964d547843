"""From a picture's latent to the trajectory of latents that PnP reads features at (method.md, sections 2 and 6).

All functions take a batch of latents, (rows, 4, height, width) float32, and give the kept latents as
(rows, steps, 4, height, width), one per *sampling* timestep, from the largest down.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pnp_batch.diffusion import constants, ddim
from pnp_batch.diffusion.guidance import Row
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, plain_loop


def ddim_invert(
    model: DiffusionModel,
    latents: Tensor,
    prompts: Sequence[str],
    steps: int,
    keep: Sequence[int],
    loop: Loop = plain_loop,
) -> Tensor:
    """DDIM inversion by the authors' rule: the *new* timestep with the *old* latent, no guidance.

    Args:
        model: The model.
        latents: The pictures' latents.
        prompts: The inversion prompt of each.
        steps: `num_inversion_steps`.
        keep: Descending sampling timesteps; a subset of the inversion grid.
        loop: Runs the steps (with checkpoints and progress).
    """
    grid = model.checkpoint.schedule.timesteps(steps)[::-1]
    place = {timestep: i for i, timestep in enumerate(keep)}
    kept = latents.new_empty(len(latents), len(keep), *latents.shape[1:])

    def step(i: int, state: dict[str, Tensor]) -> None:
        timestep = grid[i]
        a_from = model.alphas[grid[i - 1]] if i else model.final_alpha
        noise = model.noise(state["latents"], timestep, prompts)
        state["latents"] = ddim.move(state["latents"], noise, a_from, model.alphas[timestep])
        if timestep in place:
            state["kept"][:, place[timestep]] = state["latents"]

    last = max(i for i, timestep in enumerate(grid) if timestep in place)
    return loop("invert", last + 1, {"latents": latents, "kept": kept}, step)["kept"]


def sample_trajectory(
    model: DiffusionModel,
    latents: Tensor,
    rows: Sequence[Sequence[Row]],
    steps: int,
    keep: Sequence[int],
    loop: Loop = plain_loop,
    name: str = "generate",
) -> tuple[Tensor, Tensor]:
    """Guided DDIM sampling that keeps the latent *before* each wanted step: the trajectory of a generated guidance image.

    Args:
        model: The model.
        latents: Initial noise.
        rows: For each latent the weighted texts whose sum is the guided prediction.
        steps: Sampling steps of the guidance image.
        keep: Descending timesteps to keep, a subset of the grid of `steps`.
        loop: Runs the steps.
        name: Of the loop, for its checkpoint.

    Returns:
        The kept latents, and the final ones (rows, 4, height, width).
    """
    grid = model.checkpoint.schedule.timesteps(steps)
    place = {timestep: i for i, timestep in enumerate(keep)}
    kept = latents.new_empty(len(latents), len(keep), *latents.shape[1:])
    owner = constants.indices((i for i, own in enumerate(rows) for _ in own), latents.device)
    weights = constants.numbers((row.weight for own in rows for row in own), latents.device)
    texts = [row.text for own in rows for row in own]

    def step(i: int, state: dict[str, Tensor]) -> None:
        timestep = grid[i]
        if timestep in place:
            state["kept"][:, place[timestep]] = state["latents"]
        output = model.predict(state["latents"][owner], timestep, texts)
        state["latents"] = denoise(model, state["latents"], weighted_sum(output, owner, weights, len(rows)), grid, i)

    state = loop(name, steps, {"latents": latents, "kept": kept}, step)
    return state["kept"], state["latents"]


def reconstruct(
    model: DiffusionModel,
    noise: Tensor,
    prompts: Sequence[str],
    timesteps: Sequence[int],
    loop: Loop = plain_loop,
    name: str = "reconstruct",
) -> Tensor:
    """Samples back from the noisiest kept latent with the inversion prompt and no guidance: what the inversion is worth.

    Returns:
        (rows, 4, height, width): the latents that come out, to be compared with the ones that went in.
    """
    rows = [[Row(prompt, 1.0)] for prompt in prompts]
    return sample_trajectory(model, noise, rows, len(timesteps), (), loop, name)[1]


def denoise(model: DiffusionModel, latents: Tensor, output: Tensor, timesteps: Sequence[int], index: int) -> Tensor:
    """One deterministic DDIM step down the grid from `timesteps[index]`."""
    a = model.alphas[timesteps[index]]
    clean = ddim.clean_from(output, latents, a, model.prediction_type)
    noise = ddim.noise_from(output, latents, a, model.prediction_type)
    return ddim.renoised(clean, noise, model.alpha_below(timesteps, index))


def weighted_sum(output: Tensor, owner: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sums UNet rows by owner with their guidance weights: (rows, ...) to (count, ...)."""
    total = output.new_zeros(count, *output.shape[1:])
    return total.index_add_(0, owner, output * weights.view(-1, 1, 1, 1))
