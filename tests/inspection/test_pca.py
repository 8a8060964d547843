"""Principal components: those of numpy over all pictures at once, with colours that mean the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pnp_batch.inspection.pca import Moments, of_map


def rows(seed: int, count: int = 50) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        rng.normal(0, [8, 5, 3, 1, 0.5, 0.1], (count, 6)) @ np.linalg.qr(rng.normal(0, 1, (6, 6)))[0]
    )


def test_basis_over_pictures_is_the_pca_of_all_rows_together() -> None:
    parts = [rows(0), rows(1, 30), rows(2, 70)]
    moments = Moments()
    for part in parts:
        moments.add(part.float())
    basis = moments.basis()
    together = torch.cat(parts).float().double().numpy()
    _, values, vectors = np.linalg.svd(together - together.mean(0), full_matrices=False)
    np.testing.assert_allclose(basis.mean, together.mean(0), atol=1e-6)
    np.testing.assert_allclose(basis.deviations, values[:3] / len(together) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.abs(np.diag(basis.vectors.T.numpy() @ vectors[:3].T)), 1, atol=1e-6)


def test_the_same_feature_has_the_same_colour_in_every_picture() -> None:
    moments = Moments()
    moments.add(rows(0))
    moments.add(rows(1))
    basis = moments.basis()
    one = rows(0)[:1]
    assert torch.equal(basis.colours(torch.cat([one, rows(3)]))[0], basis.colours(torch.cat([rows(4), one]))[-1])
    assert basis.colours(basis.mean[None])[0].tolist() == pytest.approx([0.5] * 3)


def test_signs_follow_the_basis_of_the_timestep_before() -> None:
    moments = Moments()
    moments.add(rows(0))
    basis = moments.basis()
    flipped = moments.basis(like=type(basis)(basis.mean, -basis.vectors, basis.deviations))
    assert torch.equal(flipped.vectors, -basis.vectors)


def test_features_that_are_all_equal_are_grey_and_not_nan() -> None:
    moments = Moments()
    moments.add(torch.ones(10, 4))
    assert torch.allclose(moments.basis().colours(torch.ones(10, 4)), torch.full((10, 3), 0.5, dtype=torch.float64))
    assert torch.isfinite(of_map(torch.full((16, 16), 1 / 16))).all()


def test_places_that_attend_alike_have_one_colour() -> None:
    group = torch.arange(64) // 16
    attention = (group[:, None] == group[None]).float() / 16
    colours = of_map(attention)
    for number in range(4):
        assert torch.allclose(colours[group == number], colours[16 * number], atol=1e-6)
    assert len({tuple(np.round(colour, 2)) for colour in colours.numpy()}) == 4
    assert torch.equal(colours, of_map(attention))


def test_leading_components_of_a_map_are_those_of_numpy() -> None:
    attention = torch.softmax(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)) * 3, -1)
    centred = attention.double().numpy() - attention.double().numpy().mean(0)
    left, values, _ = np.linalg.svd(centred)
    scores = left[:, :3] * len(centred) ** 0.5
    expected = np.clip(0.5 + scores / 5, 0, 1)
    got = of_map(attention).numpy()
    for component in range(2):  # the third lies close to the fourth in random maps
        difference = min(
            np.abs(got[:, component] - e).max() for e in (expected[:, component], 1 - expected[:, component])
        )
        assert difference < 0.02 + 0.1 * values[3] / values[component]
