"""CLIP similarity of picture and prompt (Radford et al. 2021), and what the edit gained over the source picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pnp_batch.evaluation.backbones import Backbone
from pnp_batch.evaluation.closed_forms import EMPTY, blackened
from pnp_batch.evaluation.columns import VERSIONS
from pnp_batch.evaluation.pretrained import load
from pnp_batch.evaluation.values import Pair, Unavailable, Value, Values
from pnp_batch.media.images import Pixels


class TextImageModel:
    """A CLIP: pictures and prompts to unit vectors of one space.

    Raises:
        Unavailable: It has no such vectors.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.model = load(backbone, AutoModel, use_safetensors=True, dtype=torch.float32).to(device).eval()
        if not hasattr(self.model, "get_text_features"):
            raise Unavailable(
                f"{backbone.name}: {type(self.model).__name__} has no text features; a CLIP model is needed"
            )
        self.processor = load(backbone, AutoImageProcessor, backend="pil")
        self.tokenizer = load(backbone, AutoTokenizer)
        self.device = device
        # A tokenizer that was saved without its length claims to have none.
        self.tokens = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Pixels]) -> Tensor:
        """(rows, channels), each of length 1."""
        inputs = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(pixel_values=inputs.to(self.device)))

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(rows, channels), each of length 1. Prompts are padded to the tokenizer's length, and cut there."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        )
        return _unit(self.model.get_text_features(**tokens.to(self.device)))


def _unit(output: Any) -> Tensor:
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return nn.functional.normalize(features.float(), dim=-1)


class TextSimilarity:
    """Cosines (not times 100) of the prompt with the result, its gain over the source, and with the edited part alone."""

    name = "text"
    version = VERSIONS["text"]
    columns: tuple[str, ...] = ("clip_similarity", "text_gain")
    uses_mask = True

    def __init__(self, backbone: Backbone, model: Callable[[], TextImageModel]) -> None:
        self.identity: Mapping[str, Any] = {"backbone": backbone.fingerprint}
        self._model = model

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        sources = {pair.source_key: pair.source for pair in pairs}
        masked = {i: blackened(p.result, p.mask) for i, p in enumerate(pairs) if p.mask is not None and p.mask.any()}
        model = self._model()
        images = model.images([*(pair.result for pair in pairs), *sources.values(), *masked.values()])
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
        texts = dict(zip(prompts, model.texts(prompts), strict=True))
        of_source = dict(zip(sources, images[len(pairs) :], strict=False))
        of_mask = dict(zip(masked, images[len(pairs) + len(sources) :], strict=True))
        rows: list[Values] = []
        for i, pair in enumerate(pairs):
            text = texts[pair.prompt]
            similarity = float(images[i] @ text)
            row: dict[str, Value] = {"clip_similarity": similarity}
            row["text_gain"] = similarity - float(of_source[pair.source_key] @ text)
            if pair.mask is not None:
                row["clip_similarity_inside"] = float(of_mask[i] @ text) if i in of_mask else EMPTY
            rows.append(row)
        return rows
