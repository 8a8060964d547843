"""Fused layers give what the plain ones give, and injection works on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import TINY_SD

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.injection import injected, read_features
from pnp_batch.diffusion.kernels import with_fast_linears
from pnp_batch.diffusion.loading import load_parts
from pnp_batch.diffusion.model import DiffusionModel, load_model

NAMES = ("_FusedGEGLU", "_FusedLinear")


@pytest.mark.parametrize("model", [str(TINY_SD), "builtin:shapes"])
def test_the_fused_unet_predicts_what_the_plain_one_does(model: str) -> None:
    checkpoint = resolve(model, Path())
    fused = load_model(checkpoint, torch.device("cpu"), "float32")
    plain = load_model(checkpoint, torch.device("cpu"), "float32")
    plain.unet = load_parts(checkpoint, torch.float32).unet.eval()
    kinds = {type(module).__name__ for module in fused.unet.modules()}
    assert {*NAMES} <= kinds and not {type(module).__name__ for module in plain.unet.modules()} & {*NAMES}
    side = checkpoint.sample_size // checkpoint.cell
    latents = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0))
    texts = ["", "a red star", "a dog"]
    difference = fused.predict(latents, 401, texts) - plain.predict(latents, 401, texts)
    assert 0 < difference.abs().max() < 1e-5
    injecting = [_injecting(model, latents, texts) for model in (fused, plain)]
    torch.testing.assert_close(*injecting, atol=1e-5, rtol=0)
    assert (injecting[0] - fused.predict(latents, 401, texts)).abs().max() > 1e-3


def _injecting(model: DiffusionModel, latents: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """What a model predicts with the features of other latents."""
    f_layers, attn_layers = model.checkpoint.layers
    sites = [*model.sites("f", f_layers), *model.sites("a", attn_layers)]
    features = read_features(sites, lambda: model.predict(latents.flip(0), 401, texts))
    with injected(sites, features):
        return model.predict(latents, 401, texts)


def test_other_types_keep_their_layers() -> None:
    unet = load_parts(resolve(str(TINY_SD), Path()), torch.bfloat16).unet
    assert not {type(module).__name__ for module in with_fast_linears(unet).modules()} & {*NAMES}
