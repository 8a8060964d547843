"""Writes a pipeline folder as one file in the original Stable Diffusion layout, the way checkpoints are passed around."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
Weights = dict[str, torch.Tensor]

RESNET: Rules = [
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
UNET: Rules = [
    (r"^time_embedding\.linear_([12])", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^add_embedding\.linear_([12])", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{3 * int(m[1]) + 3}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.2.1"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", lambda m: f"output_blocks.{3 * int(m[1]) + 2}.2"),
]
VAE: Rules = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


OPEN_CLIP: Rules = [
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn\.", "attn."),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
]


def write_single_file(pipeline: Path, target: Path, *, open_clip: bool = False) -> None:
    """Writes a folder as one file: as Stable Diffusion 1.x, with `open_clip` as 2.x, with two text encoders as SDXL is."""
    unet = load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(pipeline / "vae/diffusion_pytorch_model.safetensors")
    text = load_file(pipeline / "text_encoder/model.safetensors")
    second = pipeline / "text_encoder_2/model.safetensors"
    xl = second.exists()
    weights = {f"model.diffusion_model.{_unet_name(name, xl)}": weight for name, weight in unet.items()}
    weights |= {
        f"first_stage_model.{_renamed(name, VAE)}": _as_convolution(name, weight) for name, weight in vae.items()
    }
    if open_clip:
        width = torch.eye(text["final_layer_norm.weight"].numel())
        weights |= _prefixed("cond_stage_model.model.", _as_open_clip(text) | {"text_projection": width})
    else:
        stage = "conditioner.embedders.0" if xl else "cond_stage_model"
        weights |= _prefixed(f"{stage}.transformer.text_model.", text)
    if xl:
        other = {name.removeprefix("text_model."): weight for name, weight in load_file(second).items()}
        projection = {"text_projection": other.pop("text_projection.weight").T}
        weights |= _prefixed("conditioner.embedders.1.model.", _as_open_clip(other) | projection)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target)


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


def _unet_name(name: str, xl: bool) -> str:
    name = _renamed(_renamed(name, RESNET) if ".resnets." in name else name, UNET)
    # An upsampler follows the attention, and the first level up has one in SDXL only.
    return name.replace("output_blocks.2.1.conv", "output_blocks.2.2.conv") if xl else name


def _renamed(name: str, rules: Rules) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _as_convolution(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The original VAE's attention is made of 1x1 convolutions."""
    is_attention = re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", name)
    return weight[:, :, None, None] if is_attention else weight


def _as_open_clip(text: Weights) -> Weights:
    """OpenCLIP keeps queries, keys and values in one matrix."""
    weights = {_renamed(name, OPEN_CLIP): weight for name, weight in text.items() if not re.search(r"[qkv]_proj", name)}
    for name in (name for name in text if "q_proj" in name):
        together = torch.cat([text[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        weights[re.sub(r"q_proj\.", "in_proj_", _renamed(name, OPEN_CLIP))] = together
    return weights


def same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
