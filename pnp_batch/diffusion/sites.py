"""Where features are read and written: from the paper's decoder layer numbers to modules (method.md, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pnp_batch.errors import ModelError


@dataclass(frozen=True)
class FeatureSite:
    """f: the output of `conv2` of a decoder resnet, before the skip is added. Shape (rows, channels, height, width)."""

    name: str
    resnet: Any

    @property
    def leaves(self) -> dict[str, nn.Module]:
        """The modules whose outputs are the features, by feature name."""
        return {self.name: self.resnet.conv2}


@dataclass(frozen=True)
class AttentionSite:
    """A: queries and keys of a decoder self-attention, before the head split. Shape (rows, tokens, channels) each."""

    name: str
    attention: Any

    @property
    def leaves(self) -> dict[str, nn.Module]:
        """The modules whose outputs are the features, by feature name."""
        return {f"{self.name}.q": self.attention.to_q, f"{self.name}.k": self.attention.to_k}


Site = FeatureSite | AttentionSite


def feature_sites(unet: Any, layers: Sequence[int]) -> list[FeatureSite]:
    """The resnets of decoder layers.

    Raises:
        ModelError: A layer that is not there, or a resnet that resamples inside its residual branch.
    """
    sites = []
    for layer in sorted(layers):
        block, place = _block_of(unet, layer)
        resnet = block.resnets[place]
        if resnet.upsample is not None or resnet.downsample is not None:
            raise ModelError(f"decoder layer {layer}: {type(resnet).__name__} resamples inside; f is not defined there")
        sites.append(FeatureSite(f"f{layer}", resnet))
    return sites


def attention_sites(unet: Any, layers: Sequence[int]) -> list[AttentionSite]:
    """The self-attentions of decoder layers, in every transformer block they have.

    Raises:
        ModelError: A layer without self-attention, or one whose projections were fused.
    """
    sites = []
    for layer in sorted(layers):
        block, place = _block_of(unet, layer)
        if not hasattr(block, "attentions"):
            raise ModelError(f"decoder layer {layer} has no self-attention: it lies in a {type(block).__name__}")
        for index, transformer in enumerate(block.attentions[place].transformer_blocks):
            if getattr(transformer.attn1, "fused_projections", False):
                raise ModelError("the UNet's attention projections are fused; call unet.unfuse_qkv_projections() first")
            sites.append(AttentionSite(f"a{layer}.{index}", transformer.attn1))
    return sites


def _block_of(unet: Any, layer: int) -> tuple[Any, int]:
    per_block = len(unet.up_blocks[0].resnets)
    if layer >= per_block * len(unet.up_blocks):
        raise ModelError(f"there is no decoder layer {layer} in {type(unet).__name__}")
    return unet.up_blocks[layer // per_block], layer % per_block
