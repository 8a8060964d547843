"""DDIM (Song et al. 2021, eq. 12 with sigma = 0) between any two noise levels, for epsilon and v models.

Plain functions on float32 latents of shape (batch, 4, height / cell, width / cell). `a` is `alphas_cumprod` at a timestep.
"""

from __future__ import annotations

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def noise_from(output: Tensor, latents: Tensor, a: float, prediction_type: str) -> Tensor:
    """The predicted noise eps.

    Args:
        output: What the UNet returned for `latents`.
        latents: What the UNet was given.
        a: `alphas_cumprod` at the timestep the UNet was given (in inversion that is the *new* timestep).
        prediction_type: `epsilon` or `v_prediction` (eps = sqrt(a) v + sqrt(1-a) x; Salimans and Ho 2022, appendix D).
    """
    return output if prediction_type == "epsilon" else a**0.5 * output + (1 - a) ** 0.5 * latents


def clean_from(output: Tensor, latents: Tensor, a: float, prediction_type: str) -> Tensor:
    """The predicted clean latent x0; for v models without a division, so that a = 0 (zero terminal SNR) does no harm."""
    clean: Tensor
    if prediction_type == "epsilon":
        clean = (latents - (1 - a) ** 0.5 * output) / a**0.5
    else:
        clean = a**0.5 * latents - (1 - a) ** 0.5 * output
    return clean


def output_for(clean: Tensor, latents: Tensor, a: float, prediction_type: str) -> Tensor:
    """What the UNet would have to return for `latents` for `clean_from` to give `clean`."""
    signal: Tensor = latents - a**0.5 * clean if prediction_type == "epsilon" else a**0.5 * latents - clean
    output: Tensor = signal / (1 - a) ** 0.5
    return output


def renoised(clean: Tensor, noise: Tensor, a: float) -> Tensor:
    """The latent at a noise level."""
    latents: Tensor = a**0.5 * clean + (1 - a) ** 0.5 * noise
    return latents


def move(latents: Tensor, noise: Tensor, a_from: float, a_to: float) -> Tensor:
    """Takes latents from one noise level to another along a noise that was predicted elsewhere, as inversion does."""
    return renoised((latents - (1 - a_from) ** 0.5 * noise) / a_from**0.5, noise, a_to)
