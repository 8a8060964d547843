"""MSE, PSNR and SSIM against scikit-image and torchmetrics, whole and within masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from pnp_batch.evaluation.closed_forms import EMPTY, EQUAL, SMALL, ClosedForms, blackened, mse, psnr, ssim, ssim_map
from pnp_batch.evaluation.values import Pair
from pnp_batch.media.images import Pixels


def pictures(height: int, width: int, noise: float = 30) -> tuple[Pixels, Pixels]:
    rng = np.random.default_rng(height * width)
    a = rng.integers(0, 256, (height, width, 3), np.uint8)
    return a, np.clip(a + rng.normal(0, noise, a.shape), 0, 255).astype(np.uint8)


def of_skimage(a: Pixels, b: Pixels) -> float:
    return structural_similarity(
        a / 255, b / 255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, data_range=1
    )


@pytest.mark.parametrize("shape", [(64, 64), (11, 30), (37, 16)])
def test_agree_with_scikit_image(shape: tuple[int, int]) -> None:
    a, b = pictures(*shape)
    assert mse(a, b) == pytest.approx(mean_squared_error(a / 255, b / 255), rel=1e-12)
    assert psnr(mse(a, b)) == pytest.approx(peak_signal_noise_ratio(a / 255, b / 255, data_range=1), rel=1e-12)
    assert ssim(a, b) == pytest.approx(of_skimage(a, b), rel=1e-9)


def test_ssim_map_is_the_inside_of_that_of_torchmetrics() -> None:
    """torchmetrics averages the reflected border too, which no other implementation has."""
    a, b = pictures(48, 40)
    batch = (torch.from_numpy(p).permute(2, 0, 1)[None].double() / 255 for p in (a, b))
    _, full = structural_similarity_index_measure(*batch, data_range=1.0, return_full_image=True)
    inside = full[0, :, 5:-5, 5:-5].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(ssim_map(a, b), inside, rtol=1e-6)


def test_equal_pictures_have_no_psnr_and_full_ssim() -> None:
    a, _ = pictures(16, 16)
    (row,) = ClosedForms()([Pair(a, a, "", "a")])
    assert row == {"psnr": EQUAL, "mse": 0.0, "ssim": pytest.approx(1.0)}


def test_picture_smaller_than_the_window_has_no_ssim() -> None:
    assert ssim(*pictures(10, 40)) == SMALL


def test_outside_and_inside_of_a_mask_make_up_the_whole() -> None:
    a, b = pictures(32, 32)
    mask = np.zeros((32, 32), bool)
    mask[4:20, 8:16] = True
    (row,) = ClosedForms()([Pair(a, b, "", "a", mask)])
    share = mask.mean()
    assert row["mse"] == pytest.approx(share * row["mse_inside"] + (1 - share) * row["mse_outside"])
    assert row["mse_pie"] == pytest.approx((1 - share) * row["mse_outside"])
    centres = mask[5:-5, 5:-5]
    assert row["ssim_inside"] == pytest.approx(ssim_map(a, b)[centres].mean())


def test_pie_bench_columns_are_those_of_its_code() -> None:
    """Its code multiplies both pictures with the mask and takes the whole-picture metrics of torchmetrics."""
    a, b = pictures(32, 48)
    mask = np.zeros((32, 48), bool)
    mask[:, :20] = True
    (row,) = ClosedForms()([Pair(a, b, "", "a", mask)])
    black_a, black_b = (blackened(p, ~mask) for p in (a, b))
    assert not black_a[:, :20].any()
    assert row["ssim_pie"] == pytest.approx(of_skimage(black_a, black_b))
    assert row["psnr_pie"] == pytest.approx(peak_signal_noise_ratio(black_a / 255, black_b / 255, data_range=1))


def test_masks_that_leave_nothing_give_a_reason() -> None:
    a, b = pictures(16, 16)
    (row,) = ClosedForms()([Pair(a, b, "", "a", np.ones((16, 16), bool))])
    assert row["psnr_outside"] == row["ssim_outside"] == EMPTY
    assert row["psnr_pie"] == row["mse_pie"] == row["ssim_pie"] == EMPTY  # PIE-Bench's code gives "nan" there
    assert row["psnr_inside"] == row["psnr"]
