"""Structure distance: how far two pictures' DINO self-similarities are apart (Splicing ViT Features, Tumanyan et al. 2022).

The keys of the deepest layer, heads concatenated, one vector per token, CLS token included; S holds their cosine
similarities, (tokens, tokens); the distance is the mean squared difference of two S. That is what the code of both the
Plug-and-Play paper and PIE-Bench computes (the papers write the Frobenius norm); they differ in how a picture gets in:

- `structure_distance` through the checkpoint's own image processor (DINO's squeezes every picture to 224x224);
- `structure_distance_pie` as PIE-Bench's code (`MetricsCalculator.calculate_structure_distance`): shorter side to 224 pixels, at
  most 480 on the longer one, ratio kept, and pixels of 0 to 255 where the normalisation expects 0 to 1. That is a slip, but
  the published tables (which show the number times 1000) are made with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

from pnp_batch.evaluation.backbones import Backbone
from pnp_batch.evaluation.columns import VERSIONS
from pnp_batch.evaluation.pretrained import load
from pnp_batch.evaluation.tensors import as_batch, by_shape
from pnp_batch.evaluation.values import Pair, Unavailable, Values
from pnp_batch.media.images import Pixels

KEY_NAMES = ("k_proj", "key")  # of the linear layer that makes the keys, in transformers 5 and before
PIE_SIDE, PIE_MAX = 224, 480
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Prepare = Callable[[Sequence[Pixels]], Tensor]


def self_similarity(keys: Tensor) -> Tensor:
    """Cosine similarities of all tokens' keys: (rows, tokens, channels) to (rows, tokens, tokens)."""
    unit = nn.functional.normalize(keys.float(), dim=-1)
    return unit @ unit.mT


class KeyReader:
    """A ViT of the DINO, DINOv2 or plain ViT kind, of which only the last layer's keys are wanted.

    Raises:
        Unavailable: It is no such ViT.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.model = load(backbone, AutoModel, use_safetensors=True, dtype=torch.float32).to(device).eval()
        self.processor = load(backbone, AutoImageProcessor, backend="pil")
        self.device = device
        layers = [module for name, module in self.model.named_modules() if name.split(".")[-1] in KEY_NAMES]
        registers = getattr(self.model.config, "num_register_tokens", 0)
        if not layers or registers or self.model.main_input_name != "pixel_values":
            odd = f"has {registers} register tokens" if registers else "is no ViT whose keys are known"
            raise Unavailable(f"{backbone.name}: {type(self.model).__name__} {odd}; DINO and DINOv2 are understood")
        self._last = layers[-1]
        takes = inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    @torch.inference_mode()
    def keys(self, inputs: Tensor) -> Tensor:
        """Keys of prepared pictures: (rows, 3, height, width) to (rows, tokens, channels)."""
        read: list[Tensor] = []
        handle = self._last.register_forward_hook(lambda _module, _inputs, output: read.append(output))
        try:
            self.model(pixel_values=inputs.to(self.device), **self._options)
        finally:
            handle.remove()
        return read[0]

    def own(self, pictures: Sequence[Pixels]) -> Tensor:
        """Pictures through the checkpoint's own image processor."""
        inputs: Tensor = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return inputs


def pie(pictures: Sequence[Pixels]) -> Tensor:
    """Pictures of one shape as PIE-Bench's code prepares them: torchvision's `Resize(224, max_size=480)`, values up to 255.

    Of tensors, and in the torchvision of its time (0.13): without antialiasing.
    """
    inputs = as_batch(pictures) * 255
    height, width = inputs.shape[-2:]
    short, long = PIE_SIDE, int(PIE_SIDE * max(height, width) / min(height, width))
    if long > PIE_MAX:
        short, long = int(PIE_MAX * short / long), PIE_MAX
    size = (short, long) if height <= width else (long, short)
    small = nn.functional.interpolate(inputs, size, mode="bilinear", antialias=False)
    return (small - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


class StructureDistance:
    """Both structure distances are this class, with another `prepare`."""

    uses_mask = False

    def __init__(self, backbone: Backbone, reader: Callable[[], KeyReader], column: str) -> None:
        self.name = column.replace("_", "-")
        self.version = VERSIONS[column]
        self.columns: tuple[str, ...] = (column,)
        self.identity: Mapping[str, Any] = {"backbone": backbone.fingerprint}
        self._reader = reader
        self._as_pie = column.endswith("_pie")

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        reader = self._reader()
        prepare: Prepare = pie if self._as_pie else reader.own

        def distances(group: Sequence[Pair]) -> list[Values]:
            of_source = {pair.source_key: pair.source for pair in group}
            keys = reader.keys(prepare([*of_source.values(), *(pair.result for pair in group)]))
            place = {key: i for i, key in enumerate(of_source)}
            return [
                {self.columns[0]: _distance(keys[place[pair.source_key]], keys[len(place) + i])}
                for i, pair in enumerate(group)
            ]

        return by_shape(pairs, distances)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((self_similarity(a) - self_similarity(b)).square().mean())
