"""Reading a checkpoint's parts through diffusers' own loaders: safetensors only, no remote code, no network."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.errors import EnvironmentFailure, ModelError
from pnp_batch.families import SD, SDXL

CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
# How diffusers reads a single file of each family, and what it is told to leave out.
PIPELINES: dict[str, tuple[Any, dict[str, Any]]] = {
    SD.name: (StableDiffusionPipeline, {"safety_checker": None}),
    SDXL.name: (StableDiffusionXLPipeline, {"add_watermarker": False}),
}


class Parts(NamedTuple):
    """What a Stable Diffusion is made of, on the CPU."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: DDIMScheduler
    text_encoder_2: Any = None


def load_parts(checkpoint: Checkpoint, dtype: torch.dtype) -> Parts:
    """Loads everything but the tokenizer; the VAE in float32, since half precision turns some VAEs' pictures black.

    Raises:
        ModelError: A file is broken, or weights are missing in it: diffusers would go on with random ones.
        EnvironmentFailure: The memory is too small.
    """
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        models = (_from_file if checkpoint.single_file else _from_folder)(checkpoint, dtype)
        return Parts(**models, scheduler=DDIMScheduler.from_pretrained(checkpoint.configs / "scheduler"))
    except ModelError:
        raise
    except MemoryError as error:
        raise EnvironmentFailure(f"{checkpoint.name} does not fit the memory of this machine") from error
    except Exception as error:  # of a dozen kinds, from three libraries
        raise ModelError(f"{checkpoint.name} ({checkpoint.weights}) cannot be loaded: {error}") from error


def _from_folder(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    models = {}
    for name in checkpoint.family.networks:
        models[name], report = CLASSES[name].from_pretrained(
            checkpoint.weights / name,
            variant=checkpoint.variant,
            dtype=torch.float32 if name == "vae" else dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise ModelError(f"{checkpoint.weights / name} lacks {len(missing)} weights, such as {missing[0]}")
    return models


def _from_file(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
    """The VAE by itself: the loader of whole pipelines knows one dtype for all, and would round its weights."""
    family = checkpoint.family
    kind, others = PIPELINES[family.name]
    where = {"config": str(checkpoint.configs), "local_files_only": True}
    pipeline = kind.from_single_file(
        str(checkpoint.weights),
        vae=AutoencoderKL.from_single_file(str(checkpoint.weights), subfolder="vae", dtype=torch.float32, **where),
        dtype=dtype,
        feature_extractor=None,
        image_encoder=None,
        **where,
        **others,
    )
    models = {name: getattr(pipeline, name) for name in family.networks}
    with safe_open(checkpoint.weights, framework="numpy") as file:
        sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for name, model in models.items():
        wanted = sum(weight.numel() for weight in model.parameters())
        found = sum(size for key, size in sizes.items() if key.startswith(family.prefixes[name]))
        if found < wanted:
            raise ModelError(f"{checkpoint.weights} lacks {wanted - found:,} of the {wanted:,} weights of its {name}")
    return models
