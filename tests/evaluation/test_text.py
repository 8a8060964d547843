"""CLIP similarity against transformers' own forward pass, and the text gain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import save_clip, save_dino
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from pnp_batch.evaluation.backbones import Backbone, locate
from pnp_batch.evaluation.closed_forms import EMPTY
from pnp_batch.evaluation.text import TextImageModel, TextSimilarity
from pnp_batch.evaluation.values import Pair, Unavailable
from pnp_batch.media.images import Pixels
from pnp_batch.store import DigestCache

CPU = torch.device("cpu")


def picture(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 255, (48, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("clip")
    return locate("clip", str(save_clip(folder)), folder, DigestCache(folder / "digests"))


@torch.inference_mode()
def of_transformers(backbone: Backbone, pixels: Pixels, prompt: str) -> float:
    """Its `logits_per_image` without the learnt temperature."""
    model = CLIPModel.from_pretrained(backbone.path).eval()
    tokenizer = CLIPTokenizer.from_pretrained(backbone.path)
    tokens = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
    images = CLIPImageProcessorPil.from_pretrained(backbone.path)(pixels, return_tensors="pt")
    return float(model(**tokens, **images).logits_per_image / model.logit_scale.exp())


def test_similarity_is_transformers_own_and_gain_is_over_the_source(backbone: Backbone) -> None:
    metric = TextSimilarity(backbone, lambda: TextImageModel(backbone, CPU))
    a, b, c = picture(0), picture(1), picture(2)
    first, second = metric([Pair(a, b, "a red star", "a"), Pair(a, c, "a blue heart on sand", "a")])
    for row, result, prompt in ((first, b, "a red star"), (second, c, "a blue heart on sand")):
        assert row["clip_similarity"] == pytest.approx(of_transformers(backbone, result, prompt), abs=1e-6)
        source = of_transformers(backbone, a, prompt)
        assert row["text_gain"] == pytest.approx(row["clip_similarity"] - source, abs=1e-6)
    assert abs(first["clip_similarity"] - second["clip_similarity"]) > 1e-3


def test_with_a_mask_the_edited_part_is_compared_too(backbone: Backbone) -> None:
    metric = TextSimilarity(backbone, lambda: TextImageModel(backbone, CPU))
    mask = np.zeros((48, 40), bool)
    mask[10:30] = True
    plain, masked = metric([Pair(picture(0), picture(1), "x", "a"), Pair(picture(0), picture(1), "x", "a", mask)])
    assert "clip_similarity_inside" not in plain
    black = np.where(mask[..., None], picture(1), 0).astype(np.uint8)
    assert masked["clip_similarity_inside"] == pytest.approx(of_transformers(backbone, black, "x"), abs=1e-6)
    assert masked["clip_similarity"] == pytest.approx(plain["clip_similarity"], abs=1e-6)


def test_an_empty_mask_has_no_edited_part(backbone: Backbone) -> None:
    metric = TextSimilarity(backbone, lambda: TextImageModel(backbone, CPU))
    empty = np.zeros((48, 40), bool)
    (row,) = metric([Pair(picture(0), picture(1), "x", "a", empty)])
    assert row["clip_similarity_inside"] == EMPTY and isinstance(row["clip_similarity"], float)


def test_a_prompt_beyond_the_limit_is_cut_and_not_a_crash(backbone: Backbone) -> None:
    assert TextImageModel(backbone, CPU).texts(["a very long prompt " * 60]).shape == (1, 12)


def test_a_model_without_text_is_refused(tmp_path: Path) -> None:
    dino = locate("clip", "dino", save_dino(tmp_path / "dino").parent, DigestCache(tmp_path / "digests"))
    with pytest.raises(Unavailable, match="ViTModel has no text features"):
        TextImageModel(dino, CPU)
