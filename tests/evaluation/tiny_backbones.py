"""Tiny random backbones saved to disk as their authors' checkpoints are: the real loading code reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from running import TINY_SD
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from pnp_batch.evaluation.lpips import LpipsModel

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_dino(folder: Path, *, side: int = 32) -> Path:
    torch.manual_seed(0)
    _save(ViTModel(ViTConfig(**SIZE, image_size=side, patch_size=8)), folder)
    ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    _save(Dinov2Model(Dinov2Config(**SIZE, image_size=28, patch_size=14)), folder)
    ViTImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")
    text = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id}
    vision = SIZE | {"image_size": 32, "patch_size": 8}
    _save(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)), folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_lpips(file: Path, network: str = "alex") -> Path:
    torch.manual_seed(0)
    model = LpipsModel(network)
    state = {name: tensor.abs() if name.startswith("lin") else tensor for name, tensor in model.state_dict().items()}
    save_file(state, file)
    return file


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Weights large enough that two pictures differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
