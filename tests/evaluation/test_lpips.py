"""LPIPS against reference values and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pnp_batch.evaluation.backbones import locate
from pnp_batch.evaluation.lpips import NETWORKS, Lpips, LpipsModel, load_lpips
from pnp_batch.evaluation.values import Pair, Unavailable
from pnp_batch.store import DigestCache

CPU = torch.device("cpu")

# torchmetrics 1.9.0's LPIPS on torchvision 0.28.0's networks with the weights and pictures below.
REFERENCE = {
    "alex": [0.13003429770469666, 0.13173693418502808],
    "vgg": [0.10187938064336777, 0.10348987579345703],
    "squeeze": [0.12536470592021942, 0.1255829930305481],
}


def weights_of(network: str) -> dict[str, Tensor]:
    """Seeded weights under the authors' names; learnt weights are never negative."""
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LpipsModel(network).state_dict().items()}
    values = {name: rng.normal(0, 0.1, tuple(shape)).astype(np.float32) for name, shape in shapes.items()}
    return {name: torch.from_numpy(abs(v) if name.startswith("lin") else v) for name, v in values.items()}


def pictures() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(1)
    a, b = (torch.from_numpy(rng.random((2, 3, 64, 80), np.float32)) for _ in range(2))
    return a, b


@pytest.mark.parametrize("network", NETWORKS)
def test_agrees_with_torchmetrics_on_torchvision(network: str, tmp_path: Path) -> None:
    save_file(weights_of(network), tmp_path / "lpips.safetensors")
    model = load_lpips(locate("lpips", "lpips.safetensors", tmp_path, DigestCache(tmp_path / "digests")), CPU)
    np.testing.assert_allclose(model(*pictures()).numpy(), REFERENCE[network], rtol=1e-5)


def test_torchmetrics_own_names_are_understood(tmp_path: Path) -> None:
    theirs = {name.replace("net.slice1.", "net.slices.0."): tensor for name, tensor in weights_of("squeeze").items()}
    save_file(theirs, tmp_path / "model.safetensors")
    model = load_lpips(locate("lpips", ".", tmp_path, DigestCache(tmp_path / "digests")), CPU)
    np.testing.assert_allclose(model(*pictures()).numpy(), REFERENCE["squeeze"], rtol=1e-5)


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(Unavailable, match=r"other.safetensors holds no LPIPS v0.1 weights"):
        load_lpips(locate("lpips", "other.safetensors", tmp_path, DigestCache(tmp_path / "digests")), CPU)


def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"not at all")
    with pytest.raises(Unavailable, match="cannot be read"):
        load_lpips(locate("lpips", "broken.safetensors", tmp_path, DigestCache(tmp_path / "digests")), CPU)


def test_equal_pictures_are_at_zero_and_a_mask_hides_what_changed(tmp_path: Path) -> None:
    save_file(weights_of("alex"), tmp_path / "lpips.safetensors")
    backbone = locate("lpips", "lpips.safetensors", tmp_path, DigestCache(tmp_path / "digests"))
    metric = Lpips(backbone, lambda: load_lpips(backbone, CPU), CPU)
    source = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    changed = source.copy()
    changed[:32] = 0
    same, edited, tiny = metric(
        [
            Pair(source, source, "", "a"),
            Pair(source, changed, "", "a", mask),
            Pair(source[:16, :16], source[:16, :16], "", "b"),
        ]
    )
    assert same == {"lpips": 0.0}
    assert edited["lpips"] > 0 == edited["lpips_pie"]
    assert tiny == {"lpips": "the picture is smaller than 32x32"}
