"""What can be looked at and at which layers, told without torch, so that a mistake on the command line is answered at once."""

from __future__ import annotations

from pnp_batch.checkpoint import Checkpoint

ABOUT = {
    "features": "Three leading principal components of f, the residual branch's output before the skip, as red, green and blue. "
    "One basis for each layer and timestep over all inputs with these timesteps: the same colour means the "
    "same feature, in every picture.",
    "attention": "Three leading principal components of the self-attention map, averaged over heads: places of one colour "
    "attend to the same places. Each picture has its own basis.",
    "trajectory": "Latents decoded as they are: the kept trajectory of the guidance image from the noisiest down, and the "
    "latent after each step of its translations.",
}

PAPER_LAYERS = (1, 4, 7, 11)  # the decoder layers of the paper's figure 3


def default_layers(kind: str, checkpoint: Checkpoint) -> list[int]:
    """The layers to show: for features those of the paper's figure and the model's own; for attention the model's own."""
    f, attention = checkpoint.layers
    if kind == "attention":
        return list(attention)
    last = len(checkpoint.unet["up_block_types"]) * (int(checkpoint.unet.get("layers_per_block", 2)) + 1)
    return sorted({*f, *(layer for layer in PAPER_LAYERS if layer < last)})
