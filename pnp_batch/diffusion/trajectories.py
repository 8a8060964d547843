"""Trajectories of whole pictures: encode, invert, and measure by sampling back; or sample a guidance image from a prompt."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnp_batch.diffusion.fixed_point import fixed_point_invert
from pnp_batch.diffusion.guidance import Row
from pnp_batch.diffusion.inversion import ddim_invert, reconstruct, sample_trajectory
from pnp_batch.diffusion.model import DiffusionModel, to_pixels
from pnp_batch.diffusion.steps import Loop
from pnp_batch.manifest import AUTHORS_INVERSION_STEPS, GenerateSpec, Settings
from pnp_batch.media.images import Pixels

log = logging.getLogger(__name__)

GOOD_FIDELITY = 45.0  # dB, about what 999 explicit steps reach on average (docs/performance.md)


@dataclass(frozen=True)
class Trajectory:
    """What PnP needs of a guidance image.

    Attributes:
        latents: (steps, 4, height, width) float32, one per sampling timestep.
        timesteps: Descending.
        source: The guidance image, (height, width, 3) uint8.
        reconstruction: What sampling back from the noisiest latent gives, likewise (`fixed-point` adds up its residuals
            instead, which are the errors of the steps; that leaves out how a step passes on the errors above it).
        errors: `reconstruction_psnr` in dB against the source's pixels, `vae_psnr` (the same for the VAE alone, the best
            any inversion can reach), `reconstruction_mse` of the latents, `inverted_by`, `inversion_rows` and, for
            `fixed-point`, `inversion_residual` and `reconstruction_is_estimated`; empty for a generated image.
        is_finite: Whether neither latents nor pictures hold NaN or infinity.
    """

    latents: NDArray[np.float32]
    timesteps: list[int]
    source: Pixels
    reconstruction: Pixels | None
    errors: dict[str, Any]
    is_finite: bool


def of_pictures(
    model: DiffusionModel,
    pictures: Sequence[Pixels],
    prompts: Sequence[str],
    settings: Settings,
    loop: Loop,
    measure: bool = True,
) -> list[Trajectory]:
    """Inverts pictures of one size and says what the inversion is worth (method.md, section 2).

    Args:
        model: The model.
        pictures: (height, width, 3) uint8 each.
        prompts: The inversion prompt of each.
        settings: `num_inference_steps` and the inversion settings, which all share.
        loop: Runs the steps.
        measure: Whether to sample back what `ddim` inverted, `num_inference_steps` rows a picture, to see its error.
    """
    # One by one: a picture's latent must not depend on its neighbours in the batch.
    clean = torch.cat([model.encode_image(picture) for picture in pictures])
    inverted = invert(model, clean, prompts, settings, loop)
    back = inverted.back
    if back is None and measure:
        back = reconstruct(model, inverted.kept[:, 0], prompts, inverted.timesteps, loop)
    made = []
    for i, picture in enumerate(pictures):
        plain = Trajectory(
            inverted.kept[i].cpu().numpy(),
            inverted.timesteps,
            picture,
            None,
            inverted.how[i],
            _finite(inverted.kept[i]),
        )
        made.append(plain if back is None else _measured(model, plain, clean[i], back[i]))
    return made


class PictureAlone(NamedTuple):
    """A guidance image that nothing is inverted of: its pixels, those after the VAE, and the PSNR between them."""

    source: Pixels
    reconstruction: Pixels
    errors: dict[str, Any]


def of_picture_alone(model: DiffusionModel, picture: Pixels) -> PictureAlone:
    """What the VAE makes of a picture, (height, width, 3) uint8; no UNet row is computed."""
    back = to_pixels(model.decode(model.encode_image(picture)))
    return PictureAlone(picture, back, {"vae_psnr": psnr(picture, back)})


@dataclass(frozen=True)
class Inverted:
    """Inverted latents.

    Attributes:
        kept: (rows, steps, 4, height, width) float32.
        timesteps: Descending.
        back: (rows, 4, height, width) what sampling back gives, where that is known already.
        how: For each row what is to be told about it.
    """

    kept: Tensor
    timesteps: list[int]
    back: Tensor | None
    how: list[dict[str, Any]]


def invert(model: DiffusionModel, clean: Tensor, prompts: Sequence[str], settings: Settings, loop: Loop) -> Inverted:
    """Inverts latents by `settings.inversion_method`.

    Args:
        model: The model.
        clean: (rows, 4, height, width) float32, the latents of the pictures.
        prompts: The inversion prompt of each.
        settings: `num_inference_steps` and the inversion settings, `auto` decided.
        loop: Runs the steps.
    """
    noisiest = model.checkpoint.schedule.timesteps(settings.num_inference_steps)[0]
    # Zero terminal SNR speaks against it: at a = 0 the equation's variable x / sqrt(a) is not defined.
    if settings.inversion_method == "fixed-point" and model.alphas[noisiest] > 0:
        return _by_fixed_point(model, clean, prompts, settings, loop)
    return _by_ddim(model, clean, prompts, settings, loop)


def _by_ddim(model: DiffusionModel, clean: Tensor, prompts: Sequence[str], settings: Settings, loop: Loop) -> Inverted:
    steps = settings.num_inversion_steps or _safe_steps(model, settings)
    timesteps = model.checkpoint.schedule.sampling_grid(settings.num_inference_steps, steps)
    kept = ddim_invert(model, clean, prompts, steps, timesteps, loop)
    rows = model.checkpoint.schedule.steps_up_to(settings.num_inference_steps, steps)
    return Inverted(kept, timesteps, None, [{"inverted_by": "ddim", "inversion_rows": rows} for _ in prompts])


def _by_fixed_point(
    model: DiffusionModel, clean: Tensor, prompts: Sequence[str], settings: Settings, loop: Loop
) -> Inverted:
    timesteps = model.checkpoint.schedule.timesteps(settings.num_inference_steps)
    solved = fixed_point_invert(model, clean, prompts, timesteps, settings.inversion_tolerance, loop)
    how: list[dict[str, Any]] = [
        {
            "inverted_by": "fixed-point",
            "inversion_rows": int(solved.calls[i]),
            "inversion_residual": float(solved.residual[i]),
            "reconstruction_is_estimated": True,
        }
        for i in range(len(prompts))
    ]
    kept, back = solved.kept, clean + solved.drift
    if unsolved := [i for i, is_solved in enumerate(solved.solved) if not is_solved]:
        own_prompts = [prompts[i] for i in unsolved]
        safer = _by_safer_scheme(model, clean[unsolved], own_prompts, settings, kept[unsolved], loop)
        assert safer.back is not None
        kept[unsolved], back[unsolved] = safer.kept, safer.back
        for row, told in zip(unsolved, safer.how, strict=True):
            how[row] |= told | {"inversion_rows": how[row]["inversion_rows"] + told["inversion_rows"]}
    return Inverted(kept, timesteps, back, how)


def _safe_steps(model: DiffusionModel, settings: Settings) -> int:
    """The step count near the authors' 999 whose grid holds the sampling grid, whatever the spacing."""
    return model.checkpoint.schedule.nearest_containing(AUTHORS_INVERSION_STEPS, settings.num_inference_steps)[-1]


def _by_safer_scheme(
    model: DiffusionModel, clean: Tensor, prompts: Sequence[str], settings: Settings, kept: Tensor, loop: Loop
) -> Inverted:
    """For pictures whose fixed point was not found: it is sampled back, and where that is poor, plain DDIM is tried as well.

    With few steps hardly any fixed point is found to the tolerance, and nearly all are far better than what plain DDIM gives.
    """
    timesteps = model.checkpoint.schedule.timesteps(settings.num_inference_steps)
    back = reconstruct(model, kept[:, 0], prompts, timesteps, loop, "reconstruct-fixed-point")
    told = {"inverted_by": "fixed-point", "inversion_converged": False, "reconstruction_is_estimated": False}
    how: list[dict[str, Any]] = [told | {"inversion_rows": len(timesteps)} for _ in prompts]
    if poor := [i for i in range(len(prompts)) if _fidelity(model, clean[i : i + 1], back[i : i + 1]) < GOOD_FIDELITY]:
        within = _safe_steps(model, settings)
        rows = model.checkpoint.schedule.steps_up_to(settings.num_inference_steps, within) + len(timesteps)
        log.info(
            "%d pictures did not converge and are inverted by ddim as well: %d UNet rows", len(poor), len(poor) * rows
        )
        own_prompts = [prompts[i] for i in poor]
        by_ddim = ddim_invert(model, clean[poor], own_prompts, within, timesteps, loop)
        ddim_back = reconstruct(model, by_ddim[:, 0], own_prompts, timesteps, loop, "reconstruct-ddim")
        chosen, sampled_back = list(kept), list(back)
        for i, candidate, sampled in zip(poor, by_ddim, ddim_back, strict=True):
            how[i]["inversion_rows"] += rows
            error, other = ((each - clean[i]).square().mean() for each in (back[i], sampled))
            if not error <= other:  # also where it is NaN
                chosen[i], sampled_back[i], how[i]["inverted_by"] = candidate, sampled, "ddim"
        kept, back = torch.stack(chosen), torch.stack(sampled_back)
    return Inverted(kept, timesteps, back, how)


def _fidelity(model: DiffusionModel, clean: Tensor, back: Tensor) -> float:
    """PSNR in dB of the picture that comes back against the one that the latent itself decodes to; -inf where it holds NaN."""
    picture = model.decode(back)
    return psnr(to_pixels(model.decode(clean)), to_pixels(picture)) if _finite(picture) else -math.inf


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
    return _drawn(seed, (1, 4, size[1] // cell, size[0] // cell))


def noise_like(latent: Tensor, seed: int) -> Tensor:
    """The noise of a seed for a latent, (4, height, width), drawn likewise; (1, 4, height, width) on the CPU."""
    return _drawn(seed, (1, *latent.shape))


def _drawn(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


def _rows(spec: GenerateSpec) -> list[Row]:
    rows = [Row(spec.negative_prompt, 1 - spec.guidance_scale), Row(spec.prompt, spec.guidance_scale)]
    return [row for row in rows if row.weight != 0]


def _measured(model: DiffusionModel, trajectory: Trajectory, clean: Tensor, back: Tensor) -> Trajectory:
    """The trajectory with its reconstruction and what that differs by."""
    picture = model.decode(back[None])
    reconstruction = to_pixels(picture)
    if not (trajectory.is_finite and _finite(picture)):
        return replace(trajectory, reconstruction=reconstruction, is_finite=False)
    errors = {
        "reconstruction_psnr": psnr(trajectory.source, reconstruction),
        "vae_psnr": psnr(trajectory.source, to_pixels(model.decode(clean[None]))),
        "reconstruction_mse": float((back - clean).square().mean()),
    }
    return replace(trajectory, reconstruction=reconstruction, errors=trajectory.errors | errors)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def psnr(a: Pixels, b: Pixels) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB, rounded to 0.01 and capped at 100 (equal pictures have none)."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 100.0 if mse == 0 else min(100.0, round(10 * math.log10(255**2 / mse), 2))
