"""The Python front door: one image in memory, no store, no files.

import pnp_batch
result = pnp_batch.translate("horse.jpg", "a bronze statue of a horse", model="stable-diffusion-v1-5/stable-diffusion-v1-5")
result.image.save("statue.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pnp_batch.checkpoint import Checkpoint, resolve
from pnp_batch.diffusion.model import DiffusionModel, flaw_in, load_model, pick_device, to_pixels
from pnp_batch.diffusion.steps import plain_loop
from pnp_batch.diffusion.trajectories import invert
from pnp_batch.errors import ItemError, ManifestError, ModelError, NonFiniteError, Problem
from pnp_batch.manifest import RunSpec, Settings, run_from, settings_from
from pnp_batch.media.images import Pixels, fitted_size, opened, rgb_pixels
from pnp_batch.methods import METHODS
from pnp_batch.methods.pnp import Target


@dataclass(frozen=True)
class Translation:
    """What `translate` gives.

    Attributes:
        image: The translated picture.
        source: The guidance image as it was worked on (resized, upright, RGB).
        inversion: For each sampling timestep the inverted latent, (1, 4, height, width) float32; empty where the method
            inverts nothing.
        sampling: For each sampling timestep the latent *after* the guided, injected step; the smallest is the final one.
    """

    image: Image.Image
    source: Image.Image
    inversion: dict[int, Tensor] = field(repr=False)
    sampling: dict[int, Tensor] = field(repr=False)


def translate(
    image: str | Path | Image.Image | np.ndarray[Any, Any],
    prompt: str,
    model: str | Path = "builtin:shapes",
    *,
    device: str | int = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    **settings: Any,
) -> Translation:
    """Translates one guidance image to a prompt, by PnP (Tumanyan et al., CVPR 2023) or by `method=` another one.

    Args:
        image: A file, a PIL image, or an array (height, width, 3) of uint8.
        prompt: What the result should show.
        model: Hub id, pipeline folder, `.safetensors` file or `builtin:shapes`. The last one used stays loaded.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or a number.
        dtype: `auto`, `float32`, `float16` or `bfloat16`.
        revision: Git revision of a hub id.
        variant: Weight variant, such as `fp16`.
        config: Where a single file takes its configs from.
        **settings: The manifest's settings: `guidance_scale`, `pnp_f_t`, `num_inversion_steps`, ...

    Raises:
        ManifestError: An unknown or unusable setting, also one that this model cannot follow; a prompt that is no text.
        ModelError: The model cannot be used.
        ItemError: The picture cannot be read, or the result is not finite or all black.
    """
    chosen = settings_from(settings).settled()
    run = run_from({"devices": [int(device)] if str(device).isdecimal() else device, "dtype": dtype})
    if not isinstance(prompt, str) or not prompt.strip():
        raise _refused("prompt", "the prompt must be text, and not empty")
    checkpoint = resolve(str(model), Path.cwd(), revision=revision, variant=variant, config=config)
    method = METHODS[chosen.method]
    layers = chosen.layers(checkpoint.layers) if method.uses_layers else ((), ())
    _check_with_model(chosen, layers, checkpoint)
    if method.needs_source_prompt and not chosen.inversion_prompt.strip():
        raise _refused("inversion_prompt", f"{chosen.method} needs the source's words")
    loaded = _loaded(checkpoint, run)
    return _translate(loaded, _pixels(image, chosen, checkpoint), Target(0, prompt, chosen, *layers))


def _refused(key: str, message: str) -> ManifestError:
    return ManifestError([Problem("settings", None, key, message)])


def _check_with_model(chosen: Settings, layers: tuple[Sequence[int], Sequence[int]], checkpoint: Checkpoint) -> None:
    """Refuses settings that this model cannot follow: they are what is wrong, not the model."""
    try:
        checkpoint.check_layers(*layers)
    except ModelError as error:
        raise _refused("pnp_f_layers" if chosen.pnp_f_layers is not None else "pnp_attn_layers", str(error)) from error
    if METHODS[chosen.method].needs != "trajectory":
        return
    steps = chosen.num_inference_steps
    try:
        checkpoint.schedule.sampling_grid(steps, chosen.num_inversion_steps or steps)
    except ModelError as error:
        raise _refused("num_inversion_steps", str(error)) from error


def _pixels(image: str | Path | Image.Image | np.ndarray[Any, Any], chosen: Settings, checkpoint: Checkpoint) -> Pixels:
    if isinstance(image, str | Path):
        with opened(Path(image)) as file:
            return _pixels(file, chosen, checkpoint)
    upright = _upright(image)
    size = fitted_size(upright.size, chosen.height, chosen.width, checkpoint.sample_size, checkpoint.cell)
    return rgb_pixels(upright, size)


def _upright(image: Image.Image | np.ndarray[Any, Any]) -> Image.Image:
    """A picture in memory as a person sees it, decoded."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ItemError(f"an array must be (height, width, 3) uint8, not {image.shape} {image.dtype}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ItemError(f"a picture is a path, a PIL image or an array, not {type(image).__name__}")
    if not all(image.size):
        raise ItemError(f"the picture has no pixels: {image.width}x{image.height}")
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # its file is read only now
        raise ItemError(f"not a readable picture ({error})") from error


@lru_cache(maxsize=1)
def _loaded(checkpoint: Checkpoint, run: RunSpec) -> DiffusionModel:
    device = pick_device(run.device)
    return load_model(checkpoint, device, run.dtype_on(device.type))


def _translate(model: DiffusionModel, pixels: Pixels, target: Target) -> Translation:
    chosen: Settings = target.settings
    sampling: dict[int, Tensor] = {}
    kept, timesteps = _kept(model, pixels, chosen)
    (final,) = METHODS[chosen.method].load()(
        model,
        kept,
        [chosen.inversion_prompt],
        [[target]],
        watch=lambda _, timestep, latents: sampling.update({timestep: latents.cpu().clone()}),
    )
    picture = model.decode(final)
    if flaw := flaw_in(picture):
        half = model.dtype != torch.float32
        raise NonFiniteError(flaw + ("; try dtype='float32'" if half else ""))
    inversion = {timestep: kept[:, i].cpu() for i, timestep in enumerate(timesteps)}
    return Translation(Image.fromarray(to_pixels(picture)), Image.fromarray(pixels), inversion, sampling)


def _kept(model: DiffusionModel, pixels: Pixels, chosen: Settings) -> tuple[Tensor, list[int]]:
    """What the method needs of the picture: its trajectory with the timesteps, or its latent alone and no timesteps."""
    clean = model.encode_image(pixels)
    if METHODS[chosen.method].needs == "latent":
        return clean, []
    inverted = invert(model, clean, [chosen.inversion_prompt], chosen, plain_loop)
    return inverted.kept, inverted.timesteps
