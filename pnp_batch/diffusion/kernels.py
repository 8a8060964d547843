"""Faster forms of a UNet's own linear layers on a CPU: the same numbers but for rounding (about 1e-6, benchmarks/rows.py).

PyTorch computes the gated feed-forward of a transformer block (GEGLU) as a matrix product, a copy of its bias, a GELU and a
product, each a pass over memory. oneDNN, which PyTorch ships, does it in two; and it adds biases without copying them first.
These are the operators that `torch.compile` itself puts in the place of such layers on a CPU. (Compiling the UNet is no way to
get them: injection changes modules from step to step, and each change would be compiled anew.)
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn


def with_fast_linears(unet: Any) -> Any:
    """Puts fused layers in the place of the linear ones of a UNet's transformer blocks, in place; gives the UNet.

    Nothing is changed where there is no oneDNN or the UNet is not in float32 on a CPU. What is chosen depends on nothing
    that changes from run to run, since rounding does.
    """
    weight = next(unet.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        blocks = [
            module for name, module in unet.named_modules() if name.rpartition(".")[0].endswith("transformer_blocks")
        ]
        for owner in [module for block in blocks for module in block.modules()]:
            for name, child in list(owner.named_children()):
                if (fused := _fused(child)) is not None:
                    setattr(owner, name, fused)
    return unet


def _fused(module: nn.Module) -> nn.Module | None:
    if type(module) is GEGLU and module.proj.bias is not None:  # type: ignore[union-attr]
        return _FusedGEGLU(module.proj)
    if type(module) is nn.Linear and module.bias is not None:
        return _FusedLinear(module)
    return None


class _FusedLinear(nn.Module):
    """A linear layer with the weights of another. (rows, tokens, channels) in and out."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output."""
        return _linear(inputs, self.weight, self.bias, "none")


class _FusedGEGLU(nn.Module):
    """x W + b, times GELU of x V + c (Shazeer 2020, arXiv 2002.05202); W and V lie in one matrix."""

    def __init__(self, proj: Any) -> None:
        super().__init__()
        self.proj = proj  # named as in the layer it stands for, so that the UNet's weights are called what they were

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output."""
        (weight, gate_weight), (bias, gate_bias) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        gate = _linear(inputs, gate_weight, gate_bias, "gelu")
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, gate, weight, bias, "mul")  # type: ignore[no-any-return]


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, activation, [], "none")  # type: ignore[no-any-return]
