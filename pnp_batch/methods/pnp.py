"""Plug-and-Play Diffusion Features (Tumanyan et al., CVPR 2023, arXiv 2211.12572), in batches.

A *group* is a list of batches that share their guidance images. At each step the source features are computed once for
the whole group; then every batch takes its guided, injected DDIM step. What a result is made of depends on the members
of its own batch only (and on the guidance images they name), never on the other batches of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pnp_batch.diffusion import constants
from pnp_batch.diffusion.banks import SourceFeatures, SourcePass
from pnp_batch.diffusion.guidance import guidance_rows, injected_steps
from pnp_batch.diffusion.injection import Features, injected
from pnp_batch.diffusion.inversion import denoise, weighted_sum
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.sites import Site
from pnp_batch.diffusion.steps import Loop, State, plain_loop
from pnp_batch.manifest import Settings


@dataclass(frozen=True)
class Target:
    """One translation to make.

    Attributes:
        source: Row of its guidance image in the trajectory.
        prompt: The target prompt.
        settings: All settings that hold for it.
        f_layers: Decoder layers whose f is injected.
        attn_layers: Decoder layers whose A is injected.
    """

    source: int
    prompt: str
    settings: Settings
    f_layers: tuple[int, ...]
    attn_layers: tuple[int, ...]


Batch = Sequence[Target]


@torch.inference_mode()
def translate(
    model: DiffusionModel,
    trajectory: Tensor,
    source_prompts: Sequence[str],
    batches: Sequence[Batch],
    loop: Loop = plain_loop,
    watch: Callable[[int, int, Tensor], None] | None = None,
    features: SourceFeatures | None = None,
) -> list[Tensor]:
    """Translates guidance images to target prompts.

    Args:
        model: The model.
        trajectory: (sources, steps, 4, height, width) float32: the kept latents, one per sampling timestep, descending.
        source_prompts: The prompt each source was inverted (or generated) with.
        batches: The targets; all have `num_inference_steps` equal to the trajectory's steps.
        loop: Runs the steps (with checkpoints and progress).
        watch: Called after each step of each batch with the batch's number, the timestep and its latents.
        features: Where the sources' features come from, a row for each source; by a pass at each step if omitted.

    Returns:
        For each batch its final latents, (targets, 4, height, width) float32.
    """
    timesteps = model.checkpoint.schedule.timesteps(trajectory.shape[1])
    start = {
        str(n): trajectory[[target.source for target in batch], 0].to(model.device) for n, batch in enumerate(batches)
    }

    source = features or SourcePass(model, trajectory, source_prompts)

    def step(i: int, state: State) -> None:
        given = source.at(i, _wanted_sites(model, batches, i))
        for n, batch in enumerate(batches):
            output = _guided_output(model, batch, state[str(n)], timesteps[i], i, given)
            state[str(n)] = denoise(model, state[str(n)], output, timesteps, i)
            if watch:
                watch(n, timesteps[i], state[str(n)])

    end = loop("translate", len(timesteps), start, step)
    return [end[str(n)] for n in range(len(batches))]


def sites_of(model: DiffusionModel, target: Target, step: int) -> tuple[Site, ...]:
    """The sites injected for a target at a step."""
    f_steps, attn_steps = injected_steps(target.settings)
    f = model.sites("f", target.f_layers) if step < f_steps else []
    attn = model.sites("a", target.attn_layers) if step < attn_steps else []
    return (*f, *attn)


def _wanted_sites(model: DiffusionModel, batches: Sequence[Batch], step: int) -> list[Site]:
    return list({site: None for batch in batches for target in batch for site in sites_of(model, target, step)})


def _guided_output(
    model: DiffusionModel, batch: Batch, latents: Tensor, timestep: int, step: int, features: Features
) -> Tensor:
    """The guided prediction for a batch: one UNet pass for each set of targets that inject at the same sites."""
    by_sites: dict[tuple[Site, ...], list[int]] = {}
    for member, target in enumerate(batch):
        by_sites.setdefault(sites_of(model, target, step), []).append(member)
    output = torch.empty_like(latents)
    for sites, members in by_sites.items():
        places = constants.indices(members, model.device)
        output[places] = _pass(model, [batch[m] for m in members], latents[places], timestep, step, sites, features)
    return output


def _pass(
    model: DiffusionModel,
    batch: Batch,
    latents: Tensor,
    timestep: int,
    step: int,
    sites: Sequence[Site],
    features: Features,
) -> Tensor:
    """One UNet pass over all guidance rows of some targets, with their sources' features at `sites`."""
    rows = [(n, row) for n, target in enumerate(batch) for row in guidance_rows(target.prompt, target.settings, step)]
    owner = constants.indices((n for n, _ in rows), model.device)
    weights = constants.numbers((row.weight for _, row in rows), model.device)
    source = constants.indices((batch[n].source for n, _ in rows), model.device)
    names = [name for site in sites for name in site.leaves]
    with injected(sites, {name: features[name][source] for name in names}):
        output = model.predict(latents[owner], timestep, [row.text for _, row in rows])
    return weighted_sum(output, owner, weights, len(batch))
