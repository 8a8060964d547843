"""Trajectories of whole pictures: encode, invert, and measure by sampling back; or sample a guidance image from a prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnp_batch.diffusion.guidance import Row
from pnp_batch.diffusion.inversion import ddim_invert, reconstruct, sample_trajectory
from pnp_batch.diffusion.model import DiffusionModel, to_pixels
from pnp_batch.diffusion.steps import Loop
from pnp_batch.manifest import GenerateSpec
from pnp_batch.media.images import Pixels


@dataclass(frozen=True)
class Trajectory:
    """What PnP needs of a guidance image.

    Attributes:
        latents: (steps, 4, height, width) float32, one per sampling timestep.
        timesteps: Descending.
        source: The guidance image, (height, width, 3) uint8.
        reconstruction: What sampling back from the noisiest latent gives, likewise.
        errors: `reconstruction_psnr` in dB against the source's pixels, `vae_psnr` (the same for the VAE alone, the best
            any inversion can reach) and `reconstruction_mse` of the latents; empty for a generated image.
        is_finite: Whether neither latents nor pictures hold NaN or infinity.
    """

    latents: NDArray[np.float32]
    timesteps: list[int]
    source: Pixels
    reconstruction: Pixels
    errors: dict[str, float]
    is_finite: bool


def of_pictures(
    model: DiffusionModel,
    pictures: Sequence[Pixels],
    prompts: Sequence[str],
    inversion_steps: int,
    steps: int,
    loop: Loop,
) -> list[Trajectory]:
    """Inverts pictures of one size (method.md, section 2).

    Args:
        model: The model.
        pictures: (height, width, 3) uint8 each.
        prompts: The inversion prompt of each.
        inversion_steps: `num_inversion_steps`.
        steps: `num_inference_steps`; its grid must be a subset of the inversion grid.
        loop: Runs the steps.
    """
    timesteps = model.checkpoint.schedule.sampling_grid(steps, inversion_steps)
    # One by one: a picture's latent must not depend on its neighbours in the batch.
    clean = torch.cat([model.encode_image(picture) for picture in pictures])
    kept = ddim_invert(model, clean, prompts, inversion_steps, timesteps, loop)
    back = reconstruct(model, kept[:, 0], prompts, timesteps, loop)
    return [_measured(model, pictures[i], clean[i], kept[i], back[i], timesteps) for i in range(len(pictures))]


def of_prompts(
    model: DiffusionModel, specs: Sequence[GenerateSpec], size: tuple[int, int], own_steps: int, steps: int, loop: Loop
) -> list[Trajectory]:
    """Samples guidance images; their own trajectory takes the place of an inversion (method.md, section 6).

    Args:
        model: The model.
        specs: Prompt, seed and guidance of each.
        size: Width and height in pixels.
        own_steps: Sampling steps of the guidance images.
        steps: `num_inference_steps`; its grid must be a subset of that of `own_steps`.
        loop: Runs the steps.
    """
    timesteps = model.checkpoint.schedule.sampling_grid(steps, own_steps)
    noise = torch.cat([seeded_noise(spec.seed, size, model.checkpoint.cell) for spec in specs]).to(model.device)
    kept, final = sample_trajectory(model, noise, [_rows(spec) for spec in specs], own_steps, timesteps, loop)
    made = []
    for i in range(len(specs)):
        picture = model.decode(final[i : i + 1])
        pixels = to_pixels(picture)
        made.append(Trajectory(kept[i].cpu().numpy(), timesteps, pixels, pixels, {}, _finite(kept[i], picture)))
    return made


def seeded_noise(seed: int, size: tuple[int, int], cell: int) -> Tensor:
    """(1, 4, height / cell, width / cell) float32 noise, drawn on the CPU as diffusers' pipelines do with a CPU generator."""
    shape = (1, 4, size[1] // cell, size[0] // cell)
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def _rows(spec: GenerateSpec) -> list[Row]:
    rows = [Row(spec.negative_prompt, 1 - spec.guidance_scale), Row(spec.prompt, spec.guidance_scale)]
    return [row for row in rows if row.weight != 0]


def _measured(
    model: DiffusionModel, source: Pixels, clean: Tensor, kept: Tensor, back: Tensor, timesteps: list[int]
) -> Trajectory:
    picture = model.decode(back[None])
    reconstruction = to_pixels(picture)
    finite = _finite(kept, picture)
    errors: dict[str, Any] = {}
    if finite:
        errors = {
            "reconstruction_psnr": psnr(source, reconstruction),
            "vae_psnr": psnr(source, to_pixels(model.decode(clean[None]))),
            "reconstruction_mse": float((back - clean).square().mean()),
        }
    return Trajectory(kept.cpu().numpy(), timesteps, source, reconstruction, errors, finite)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB, rounded to 0.01 and capped at 100 (equal pictures have none)."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 100.0 if mse == 0 else min(100.0, round(10 * math.log10(255**2 / mse), 2))
