"""A random pipeline laid out as Stable Diffusion XL is, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TINY_SD = Path(__file__).parent / "conformance/tiny-sd"
SECOND_WIDTH, SUMMARY = 40, 24


def write_tiny_sdxl(folder: Path, *, empty_is_zero: bool = True) -> Path:
    """Two text encoders, three levels with 1 to 3 transformer blocks an attention, a summary of the text and the sizes."""
    torch.manual_seed(7)
    first = CLIPTextConfig.from_pretrained(TINY_SD / "text_encoder")
    second = CLIPTextConfig.from_pretrained(
        TINY_SD / "text_encoder",
        hidden_size=SECOND_WIDTH,
        projection_dim=SUMMARY,
        num_hidden_layers=3,
        hidden_act="gelu",
    )
    StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(TINY_SD / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(TINY_SD / "text_encoder"),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer", pad_token="!"),
        unet=UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32, 48),
            transformer_layers_per_block=(1, 2, 3),
            attention_head_dim=(2, 4, 6),
            norm_num_groups=8,
            use_linear_projection=True,
            cross_attention_dim=first.hidden_size + SECOND_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=SUMMARY + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=empty_is_zero,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
