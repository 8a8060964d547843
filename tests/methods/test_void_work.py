"""What is not computed: calls of the model's own modules are counted, not seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import TINY_SD
from torch import nn

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.model import DiffusionModel, load_model
from pnp_batch.manifest import Settings
from pnp_batch.methods.pnp import Target, translate

STEPS, F_STEPS, ATTN_STEPS = 6, 4, 2
SETTINGS = Settings(num_inference_steps=STEPS, pnp_f_t=F_STEPS / STEPS, pnp_attn_t=ATTN_STEPS / STEPS)


@pytest.fixture
def model() -> DiffusionModel:
    return load_model(resolve(str(TINY_SD), Path.cwd()), torch.device("cpu"), "float32")


@pytest.fixture
def count(model: DiffusionModel) -> Callable[[str, nn.Module], Counter[str]]:
    """Counts, by name and rows, how often modules compute."""
    calls: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> Counter[str]:
        module.register_forward_hook(lambda _m, inputs, _out: calls.update([f"{name} {len(inputs[0])}"]))
        return calls

    return watch


def run(model: DiffusionModel, prompts: int, sources: int = 1) -> None:
    torch.manual_seed(0)
    trajectory = torch.randn(sources, STEPS, 4, 8, 8)
    f_layers, attn_layers = model.checkpoint.layers
    batch = [Target(i % sources, f"prompt {i}", SETTINGS, f_layers, attn_layers) for i in range(prompts)]
    translate(model, trajectory, [""] * sources, [batch])


def test_injected_rows_compute_neither_queries_and_keys_nor_the_replaced_branch(
    model: DiffusionModel, count: Callable[[str, nn.Module], Counter[str]]
) -> None:
    unet = model.unet
    resnet, attention = unet.up_blocks[1].resnets[1], unet.up_blocks[3].attentions[2].transformer_blocks[0].attn1
    for name in ("norm1", "conv1", "norm2", "conv2"):
        calls = count(name, getattr(resnet, name))
    for name in ("to_q", "to_k", "to_v"):
        calls = count(name, getattr(attention, name))
    count("mid", unet.mid_block.resnets[0])
    count("conv_out", unet.conv_out)
    run(model, prompts=2)
    source, target = 1, 4  # rows of a pass
    free_of_f, free_of_attn = STEPS - F_STEPS, STEPS - ATTN_STEPS
    for name in ("norm1", "conv1", "norm2", "conv2"):
        assert calls[f"{name} {source}"] == F_STEPS and calls[f"{name} {target}"] == free_of_f
    # The source pass ends once all is read, and goes no deeper than f where that is all: values are of no use to it.
    assert calls[f"to_q {source}"] == calls[f"to_k {source}"] == ATTN_STEPS and calls[f"to_v {source}"] == 0
    assert calls[f"to_q {target}"] == calls[f"to_k {target}"] == free_of_attn and calls[f"to_v {target}"] == STEPS
    assert calls[f"conv_out {source}"] == 0 and calls[f"conv_out {target}"] == STEPS
    # Where nothing is injected there is no source pass at all.
    assert calls[f"mid {source}"] == F_STEPS and calls[f"mid {target}"] == STEPS


def test_a_text_is_encoded_and_projected_once_however_many_there_are(
    model: DiffusionModel, count: Callable[[str, nn.Module], Counter[str]]
) -> None:
    calls = count("text", model.text_encoder)
    count("key", model.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k)
    run(model, prompts=130)
    assert calls["text 1"] == calls["key 1"] == 131
