"""Structure distance: the keys are the last layer's, on DINO and DINOv2; other layouts are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import SIZE, save_clip, save_dino, save_dinov2
from torch import Tensor
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTImageProcessorPil, ViTModel

from pnp_batch.evaluation.backbones import Backbone, locate
from pnp_batch.evaluation.structure import KeyReader, StructureDistance, pie, self_similarity
from pnp_batch.evaluation.values import Pair, Unavailable
from pnp_batch.media.images import Pixels
from pnp_batch.store import DigestCache

CPU = torch.device("cpu")


def picture(seed: int, height: int = 40, width: int = 56) -> Pixels:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def located(folder: Path) -> Backbone:
    return locate("dino", str(folder), folder, DigestCache(folder.parent / "digests"))


def cosines(keys: Tensor) -> np.ndarray:
    """The definition, written out."""
    k = keys.double().numpy()
    return np.array([[u @ v / np.linalg.norm(u) / np.linalg.norm(v) for v in k] for u in k])


@torch.inference_mode()
def keys_by_hand(model: ViTModel, inputs: Tensor) -> Tensor:
    """Keys of the last layer out of the hidden state that goes into it."""
    hidden = model(pixel_values=inputs, output_hidden_states=True).hidden_states[-2]
    last = model.layers[-1]
    return last.attention.k_proj(last.layernorm_before(hidden))


@torch.inference_mode()
def test_distance_is_the_definition(tmp_path: Path) -> None:
    backbone = located(save_dino(tmp_path / "dino"))
    a, b = picture(0), picture(1)
    metric = StructureDistance(backbone, lambda: KeyReader(backbone, CPU), "structure_distance")
    (row,) = metric([Pair(a, b, "", "a")])
    model = AutoModel.from_pretrained(backbone.path).eval()
    processor = ViTImageProcessorPil.from_pretrained(backbone.path)
    keys = keys_by_hand(model, processor([a, b], return_tensors="pt")["pixel_values"])
    assert keys.shape == (2, 17, SIZE["hidden_size"])
    expected = ((cosines(keys[0]) - cosines(keys[1])) ** 2).mean()
    assert row["structure_distance"] == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_batch_of_one_source_and_other_shapes_keeps_every_pair(tmp_path: Path) -> None:
    backbone = located(save_dino(tmp_path / "dino"))
    for column in ("structure_distance", "structure_distance_pie"):
        metric = StructureDistance(backbone, lambda: KeyReader(backbone, CPU), column)
        pairs = [
            Pair(picture(0), picture(1), "", "a"),
            Pair(picture(2, 32, 32), picture(3, 32, 32), "", "b"),
            Pair(picture(0), picture(4), "", "a"),
            Pair(picture(0), picture(0), "", "a"),
        ]
        together = [row[column] for row in metric(pairs)]
        assert together == pytest.approx([metric([pair])[0][column] for pair in pairs], abs=1e-6)
        assert together[3] == pytest.approx(0, abs=1e-9)


def test_pie_bench_keeps_the_aspect_ratio_and_its_slip() -> None:
    assert pie([picture(0, 512, 512)]).shape == (1, 3, 224, 224)
    assert pie([picture(0, 100, 150)]).shape == (1, 3, 224, 336)
    assert pie([picture(0, 100, 400)]).shape == (1, 3, 120, 480)
    white = pie([np.full((64, 64, 3), 255, np.uint8)])  # its code forgets to divide by 255
    assert white[0, :, 0, 0].tolist() == pytest.approx(
        [(255 - 0.485) / 0.229, (255 - 0.456) / 0.224, (255 - 0.406) / 0.225]
    )


def test_pie_bench_resizes_without_antialiasing() -> None:
    """As torchvision 0.13 does with tensors: a bilinear sample sees four pixels, however much it shrinks."""
    lines = np.zeros((896, 896, 3), np.uint8)
    lines[::4] = 255  # sampled between rows 1 and 2 of every four
    (small,) = pie([lines])
    assert torch.allclose(small[0], torch.full((224, 224), -0.485 / 0.229))


@pytest.mark.parametrize(("height", "width", "expected"), [(512, 512, (224, 224)), (300, 301, (224, 224))])
def test_pie_bench_sizes_are_torchvisions(height: int, width: int, expected: tuple[int, int]) -> None:
    assert pie([picture(0, height, width)]).shape[-2:] == expected
    assert pie([picture(0, 1000, 333)]).shape[-2:] == (480, int(480 * 224 / int(224 * 1000 / 333)))


def test_dinov2_is_understood(tmp_path: Path) -> None:
    reader = KeyReader(located(save_dinov2(tmp_path / "dinov2")), CPU)
    assert reader.keys(reader.own([picture(0)])).shape == (1, 1 + 4, SIZE["hidden_size"])


def test_image_processor_of_the_published_checkpoints_is_read(tmp_path: Path) -> None:
    """`facebook/dino-vitb8` was saved by an old transformers."""
    folder = save_dino(tmp_path / "dino")
    old = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "size": 32,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    reader = KeyReader(located(folder), CPU)
    assert reader.own([picture(0)]).shape == (1, 3, 32, 32)


def test_register_tokens_and_other_models_are_refused(tmp_path: Path) -> None:
    config = Dinov2WithRegistersConfig(**SIZE, image_size=28, patch_size=14)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "registers")
    ViTImageProcessorPil().save_pretrained(tmp_path / "registers")
    with pytest.raises(Unavailable, match="has 4 register tokens; DINO and DINOv2 are understood"):
        KeyReader(located(tmp_path / "registers"), CPU)
    with pytest.raises(Unavailable, match="CLIPModel is no ViT whose keys are known"):
        KeyReader(located(save_clip(tmp_path / "clip")), CPU)


def test_self_similarity_is_one_on_the_diagonal() -> None:
    similarity = self_similarity(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(similarity.diagonal(dim1=1, dim2=2), torch.ones(2, 5))
    assert torch.equal(similarity, similarity.mT)
