from __future__ import annotations

from pnp_batch.stages.videos import _figures

FOUND = {
    "reconstruction_psnr": 50.0,
    "reconstruction_is_estimated": True,
    "inverted_by": "fixed-point",
    "inversion_residual": 0.001,
    "inversion_converged": None,
}
NOT_FOUND = {
    "reconstruction_psnr": 40.0,
    "reconstruction_is_estimated": False,
    "inverted_by": "ddim",
    "inversion_residual": None,
    "inversion_converged": False,
}


def test_a_videos_row_speaks_of_all_its_frames() -> None:
    mixed = {
        "reconstruction_psnr": 45.0,
        "reconstruction_is_estimated": True,
        "inverted_by": "ddim, fixed-point",
        "inversion_residual": 0.001,
        "inversion_converged": False,
    }
    assert _figures([FOUND, NOT_FOUND]) == mixed | {"frame_reconstruction_psnr": [50.0, 40.0]}
    assert _figures([NOT_FOUND, FOUND]) == mixed | {"frame_reconstruction_psnr": [40.0, 50.0]}


def test_of_frames_that_agree_it_says_what_each_says() -> None:
    assert _figures([FOUND] * 3) == FOUND | {"frame_reconstruction_psnr": [50.0] * 3}
