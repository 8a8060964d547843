"""A loaded Stable Diffusion: text encoder, VAE and UNet on one device, with the noise schedule of its own config."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.diffusion import constants, ddim
from pnp_batch.diffusion.injection import replaced
from pnp_batch.diffusion.kernels import with_fast_linears
from pnp_batch.diffusion.loading import load_parts
from pnp_batch.diffusion.sites import Site, attention_sites, feature_sites
from pnp_batch.diffusion.texts import Texts
from pnp_batch.errors import EnvironmentFailure, ModelError

log = logging.getLogger(__name__)


# A group of batches sees the same texts at every step, so all of them are kept while they take no more than this share of the
# free memory: keys and values of a text are 4 MB in Stable Diffusion 1.5. Putting those of a batch together costs little.
TEXTS_SHARE = 1 / 16


@dataclass
class DiffusionModel:
    """Everything a method needs of a model. Latents are float32 outside of the UNet, whatever its dtype.

    Attributes:
        checkpoint: What it was loaded from.
        unet: In `dtype`.
        vae: In float32: half precision turns some VAEs' pictures black.
        text_encoder: In `dtype`; its features are the cross-attentions' text.
        alphas: `alphas_cumprod` as float64 on the CPU, one per training timestep.
        final_alpha: The value before the first timestep.
        prediction_type: `epsilon` or `v_prediction`.
        device: Where it is.
        dtype: Of the UNet.
        text_encoder_2: SDXL's second one, None elsewhere.
        rows: UNet rows computed so far, the unit of cost.
    """

    checkpoint: Checkpoint
    unet: Any
    vae: Any
    text_encoder: Any
    alphas: list[float]
    final_alpha: float
    prediction_type: str
    device: torch.device
    dtype: torch.dtype
    text_encoder_2: Any = None
    rows: int = 0

    @torch.inference_mode()
    def predict(self, latents: Tensor, timestep: int, texts: Sequence[str]) -> Tensor:
        """One UNet pass.

        Args:
            latents: (rows, 4, height, width) float32.
            timestep: The timestep the UNet is told.
            texts: What each row sees.

        Returns:
            (rows, 4, height, width) float32: noise or v, as the model predicts.
        """
        self.rows += len(latents)
        with replaced(self._texts.conditioning(tuple(texts)).projections):
            (output,) = self.unet(
                latents.to(self.dtype),
                self._timesteps[timestep],
                **self.conditions(latents, texts),
                return_dict=False,
            )
        return output.float()  # type: ignore[no-any-return]

    @cached_property
    def _timesteps(self) -> Tensor:
        """All of them, on the device: to take one from here copies nothing there."""
        return torch.arange(len(self.alphas), device=self.device)

    def conditions(self, latents: Tensor, texts: Sequence[str]) -> dict[str, Any]:
        """What the UNet is told besides latents and timestep, as arguments of its forward pass; see `predict`.

        SDXL gets a summary of the text, too, and original size, place of the cut and size of the picture (Podell et al. 2023,
        section 2.2): it is whole, and what it is now is what it was.
        """
        hidden, pooled, _ = self._texts.conditioning(tuple(texts))
        if pooled is None:
            return {"encoder_hidden_states": hidden}
        height, width = (side * self.checkpoint.cell for side in latents.shape[-2:])
        sizes = constants.numbers((height, width, 0, 0, height, width), self.device)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(latents), -1)}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    @cached_property
    def hardware(self) -> str:
        """What it runs on, for people who compare seconds."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"

    @property
    def free_memory(self) -> int:
        """Bytes that its device can still give."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + unused  # torch keeps what it was given
        return int(psutil.virtual_memory().available)

    def seconds_per_pass(self, size: tuple[int, int], rows: int) -> float:
        """Seconds of one UNet pass, timed after a warm-up.

        Args:
            size: Width and height in pixels.
            rows: Rows of the pass.
        """
        cell = self.checkpoint.cell
        latents = torch.randn(rows, 4, size[1] // cell, size[0] // cell, device=self.device)
        texts = [""] * rows
        for _ in range(2):  # the first pass pays for allocation and kernel choice
            begin = time.perf_counter()
            self.predict(latents, 1, texts).sum().item()
        return time.perf_counter() - begin

    @torch.inference_mode()
    def noise(self, latents: Tensor, timestep: int, texts: Sequence[str]) -> Tensor:
        """The noise predicted at a timestep, without guidance; shapes as in `predict`."""
        return ddim.noise_from(
            self.predict(latents, timestep, texts), latents, self.alphas[timestep], self.prediction_type
        )

    def alpha_below(self, timesteps: Sequence[int], index: int) -> float:
        """`alphas_cumprod` one step below `timesteps[index]` on a descending grid."""
        return self.alphas[timesteps[index + 1]] if index + 1 < len(timesteps) else self.final_alpha

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Text features, (rows, tokens, channels) in `dtype`."""
        return self._texts.hidden(texts)

    @cached_property
    def _texts(self) -> Texts:
        return Texts(
            self.checkpoint,
            [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None],
            [module for name, module in self.unet.named_modules() if name.endswith(".attn2")],
            self.dtype,
            self.device,
            budget=TEXTS_SHARE * self.free_memory,
        )

    @torch.inference_mode()
    def encode_image(self, pixels: NDArray[np.uint8]) -> Tensor:
        """The latent of a picture: the posterior mean, scaled (method.md, section 1).

        Args:
            pixels: (height, width, 3).

        Returns:
            (1, 4, height / cell, width / cell) float32.
        """
        image = torch.from_numpy(pixels).to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean = self.vae.encode(image).latent_dist.mean
        return (mean - self._shift) * self.vae.config.scaling_factor  # type: ignore[no-any-return]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """The picture of one latent.

        Args:
            latents: (1, 4, height, width) float32.

        Returns:
            (height * cell, width * cell, 3) float32 in [0, 1] on the device; NaN stays NaN.
        """
        image = self.vae.decode(latents / self.vae.config.scaling_factor + self._shift, return_dict=False)[0]
        return (image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)  # type: ignore[no-any-return]

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @cached_property
    def _sites(self) -> dict[tuple[str, tuple[int, ...]], list[Site]]:
        return {}

    def sites(self, kind: str, layers: tuple[int, ...]) -> list[Site]:
        """The injection sites of decoder layers; `kind` is `f` or `a`."""
        if (kind, layers) not in self._sites:
            find = feature_sites if kind == "f" else attention_sites
            self._sites[kind, layers] = list(find(self.unet, layers))
        return self._sites[kind, layers]


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """8-bit pixels of a picture in [0, 1], rounded to the nearest grey level."""
    pixels: NDArray[np.uint8] = (image * 255).round().to(torch.uint8).cpu().numpy()
    return pixels


def flaw_in(picture: Tensor) -> str | None:
    """Why a picture is no result: NaN in any channel, or nothing but black, which is what NaN decodes to on some devices."""
    least, most = (float(value) for value in picture.aminmax())  # one look at the pixels; NaN is both
    if not (math.isfinite(least) and math.isfinite(most)):
        return "the result holds NaN or infinity"
    return "the result is all black" if most * 255 < 0.5 else None


def pick_device(wanted: str) -> torch.device:
    """The device for `auto | cpu | cuda | cuda:1 | mps`.

    Raises:
        EnvironmentFailure: It is not there.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentFailure(f"device '{wanted}' cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: str) -> DiffusionModel:
    """Loads a checkpoint through diffusers' own loaders: safetensors only, no remote code, no network.

    Raises:
        ModelError: diffusers cannot read it, or it predicts something else than noise or v.
        EnvironmentFailure: The device has too little memory for it.
    """
    torch_dtype = getattr(torch, dtype)
    parts = load_parts(checkpoint, torch_dtype)
    scheduler = parts.scheduler
    if scheduler.config.prediction_type not in ddim.PREDICTION_TYPES:
        raise ModelError(
            f"{checkpoint.name} predicts '{scheduler.config.prediction_type}'; known are {', '.join(ddim.PREDICTION_TYPES)}"
        )
    second = parts.text_encoder_2
    try:
        return DiffusionModel(
            checkpoint=checkpoint,
            unet=with_fast_linears(parts.unet.to(device, torch_dtype).eval()),
            vae=parts.vae.to(device, torch.float32).eval(),
            text_encoder=parts.text_encoder.to(device, torch_dtype).eval(),
            text_encoder_2=None if second is None else second.to(device, torch_dtype).eval(),
            alphas=scheduler.alphas_cumprod.double().tolist(),
            final_alpha=float(scheduler.final_alpha_cumprod),
            prediction_type=scheduler.config.prediction_type,
            device=device,
            dtype=torch_dtype,
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentFailure(f"{checkpoint.name} does not fit the memory of {device}") from error
