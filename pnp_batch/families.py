"""The kinds of Stable Diffusion that are understood: what their files hold, and where their decoders keep the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The only classes a pipeline folder may name: diffusers imports whatever is written there.
_COMPONENTS = {
    "unet": r"diffusers\.UNet2DConditionModel",
    "vae": r"diffusers\.AutoencoderKL",
    "text_encoder": r"transformers\.CLIPTextModel",
    "tokenizer": r"transformers\.CLIPTokenizer(Fast)?",
    "scheduler": r"diffusers\.\w+Scheduler",
}
_SECOND_TEXT = {
    "text_encoder_2": r"transformers\.CLIPTextModelWithProjection",
    "tokenizer_2": r"transformers\.CLIPTokenizer(Fast)?",
}

# Stems of weight files, of the components that have any.
WEIGHT_NAMES = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
EVERY_COMPONENT = (*_COMPONENTS, *_SECOND_TEXT)


@dataclass(frozen=True)
class Family:
    """A kind of Stable Diffusion.

    Attributes:
        name: For people.
        pipelines: Pattern of the pipeline classes that a `model_index.json` may name.
        components: For each component the pattern of its class.
        addition_embed_type: What its UNet is told besides timestep and text, as in the UNet's config.
        up_blocks: The decoder's block types, if it is laid out as the family's own models are.
        f_layers: Decoder layers whose f is injected by default.
        attn_layers: Decoder layers whose self-attention is injected by default.
        prefixes: Of the weights of each component in a single file of the original layout.
        text_key: In such a file, a weight of shape (out, text width).
        configs: For some text widths the hub id whose configs fit a single file, which carries none.
    """

    name: str
    pipelines: str
    components: Mapping[str, str]
    addition_embed_type: str | None
    up_blocks: Sequence[str]
    f_layers: tuple[int, ...]
    attn_layers: tuple[int, ...]
    prefixes: Mapping[str, str | tuple[str, ...]]
    text_key: str
    configs: Mapping[int, str]

    @property
    def networks(self) -> list[str]:
        """The components that have weights."""
        return [component for component in self.components if component in WEIGHT_NAMES]


SD = Family(
    name="Stable Diffusion 1.x and 2.x",
    pipelines=r"StableDiffusion(?!XL|3)\w*",
    components=_COMPONENTS,
    addition_embed_type=None,
    up_blocks=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    f_layers=(4,),  # Plug-and-Play, section 4: f at decoder layer 4, A at layers 4 to 11
    attn_layers=(4, 5, 6, 7, 8, 9, 10, 11),
    prefixes={
        "unet": "model.diffusion_model.",
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": "cond_stage_model.",
    },
    text_key="model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    configs={768: "stable-diffusion-v1-5/stable-diffusion-v1-5"},
)

SDXL = Family(
    name="Stable Diffusion XL",
    pipelines=r"StableDiffusionXL\w*",
    components=_COMPONENTS | _SECOND_TEXT,
    addition_embed_type="text_time",
    up_blocks=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    # The level with Stable Diffusion 1.5's 32 pixels a cell, where Ctrl-X (NeurIPS 2024) has structure, too.
    f_layers=(0,),
    attn_layers=(0, 1, 2),
    prefixes={
        "unet": "model.diffusion_model.",
        "vae": ("first_stage_model.", "vae."),
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    text_key="model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
    configs={2048: "stabilityai/stable-diffusion-xl-base-1.0"},
)

# In this order: a single file of Stable Diffusion 1.x has SDXL's `text_key` as well.
FAMILIES = (SD, SDXL)
SUPPORTED = "Stable Diffusion 1.x, 2.x and XL"
