"""The implicit inversion: it gives back the picture, in few calls, and says so where it does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import pnp_batch
from pnp_batch.checkpoint import BUILTIN, resolve
from pnp_batch.diffusion import trajectories
from pnp_batch.diffusion.fixed_point import Inversion, fixed_point_invert
from pnp_batch.diffusion.inversion import ddim_invert, reconstruct
from pnp_batch.diffusion.model import DiffusionModel, load_model
from pnp_batch.diffusion.steps import plain_loop
from pnp_batch.diffusion.trajectories import of_pictures
from pnp_batch.manifest import Settings
from pnp_batch.media.images import Pixels
from pnp_batch.methods.pnp import Target, translate
from pnp_batch.shapes.scenes import random_scene, render

SCENES = 3


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return load_model(resolve("builtin:shapes", Path.cwd()), torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    return [render(random_scene(seed))[0] for seed in range(SCENES)]


@pytest.fixture(scope="module")
def clean(model: DiffusionModel, pictures: list[Pixels]) -> torch.Tensor:
    return torch.cat([model.encode_image(picture) for picture in pictures])


@pytest.fixture(scope="module")
def inversion(model: DiffusionModel, clean: torch.Tensor) -> Inversion:
    return fixed_point_invert(model, clean, [""] * SCENES, model.checkpoint.schedule.timesteps(50), 1e-3)


def round_trip(model: DiffusionModel, kept: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    back = reconstruct(model, kept[:, 0], [""] * len(clean), model.checkpoint.schedule.timesteps(50))
    return (back - clean).square().flatten(1).mean(1).sqrt()


def test_it_comes_back_far_better_than_the_plain_rule_at_about_the_same_cost(
    model: DiffusionModel, clean: torch.Tensor, inversion: Inversion
) -> None:
    plain = ddim_invert(model, clean, [""] * SCENES, 50, model.checkpoint.schedule.timesteps(50))
    error, plain_error = round_trip(model, inversion.kept, clean), round_trip(model, plain, clean)
    assert (error < 0.01).all() and (error < plain_error / 5).all()
    assert (inversion.calls <= 70).all() and all(inversion.solved)


def test_the_sum_of_residuals_is_no_optimist(model: DiffusionModel, clean: torch.Tensor, inversion: Inversion) -> None:
    estimated = inversion.drift.square().flatten(1).mean(1).sqrt()
    assert (estimated >= round_trip(model, inversion.kept, clean)).all() and (estimated < 0.05).all()


def test_neighbours_in_a_batch_change_nothing(model: DiffusionModel, clean: torch.Tensor, inversion: Inversion) -> None:
    alone = fixed_point_invert(model, clean[:1], [""], model.checkpoint.schedule.timesteps(50), 1e-3)
    assert alone.calls[0] == inversion.calls[0]
    assert torch.allclose(alone.kept[0], inversion.kept[0], atol=1e-3)


@pytest.mark.parametrize("grey", [0, 127, 255])
def test_flat_pictures_invert_too(model: DiffusionModel, grey: int) -> None:
    flat = model.encode_image(np.full((64, 64, 3), grey, np.uint8))
    inversion = fixed_point_invert(model, flat, [""], model.checkpoint.schedule.timesteps(50), 1e-3)
    assert round_trip(model, inversion.kept, flat).item() < 0.05


NEVER = Settings(num_inference_steps=5, inversion_method="fixed-point", inversion_tolerance=1e-9)  # float32 cannot


def test_a_picture_that_does_not_converge_says_so_and_is_kept_where_it_samples_back_well(
    model: DiffusionModel, pictures: list[Pixels]
) -> None:
    before = model.rows
    (trajectory,) = of_pictures(model, pictures[:1], [""], NEVER, plain_loop)
    assert trajectory.errors["inversion_converged"] is False and trajectory.errors["inverted_by"] == "fixed-point"
    assert trajectory.errors["inversion_rows"] == model.rows - before < 100  # what the way out took, too
    assert trajectory.errors["reconstruction_is_estimated"] is False and trajectory.is_finite


def test_where_it_samples_back_poorly_ddim_is_tried_too_and_the_better_one_kept(
    model: DiffusionModel, pictures: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    (before,) = of_pictures(model, pictures[:1], [""], NEVER, plain_loop)
    monkeypatch.setattr(trajectories, "GOOD_FIDELITY", np.inf)  # everything is poor
    rows = model.rows
    (trajectory,) = of_pictures(model, pictures[:1], [""], NEVER, plain_loop)
    assert 500 < trajectory.errors["inversion_rows"] == model.rows - rows
    assert trajectory.errors["inverted_by"] == "fixed-point" and np.array_equal(trajectory.latents, before.latents)
    nothing = torch.zeros_like(torch.from_numpy(before.latents))[None]
    clean = model.encode_image(pictures[0])
    chosen = trajectories._by_safer_scheme(model, clean, [""], NEVER, nothing, plain_loop)
    assert chosen.how[0]["inverted_by"] == "ddim" and chosen.kept.abs().max() > 1


def test_who_names_a_number_of_inversion_steps_gets_the_authors_scheme() -> None:
    assert Settings().settled().inversion_method == "fixed-point"
    assert Settings(num_inversion_steps=50).settled().inversion_method == "ddim"
    assert Settings(inversion_method="ddim").settled().num_inversion_steps == 999


@pytest.mark.parametrize("steps", [4, 10])
def test_few_large_steps_are_solved_too(model: DiffusionModel, clean: torch.Tensor, steps: int) -> None:
    timesteps = model.checkpoint.schedule.timesteps(steps)
    inversion = fixed_point_invert(model, clean, [""] * SCENES, timesteps, 1e-3)
    back = reconstruct(model, inversion.kept[:, 0], [""] * SCENES, timesteps)
    assert all(inversion.solved) and (back - clean).square().mean().sqrt() < 0.03


@pytest.mark.parametrize(
    "scheduler",
    [
        {"steps_offset": 0},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"set_alpha_to_one": True},
    ],
)
def test_other_noise_schedules(tmp_path: Path, pictures: list[Pixels], scheduler: dict[str, object]) -> None:
    """A grid with timestep 0 has a step of length nothing; at zero terminal SNR x / sqrt(a) is not defined."""
    folder = tmp_path / "model"
    shutil.copytree(Path(pnp_batch.__file__).parent / BUILTIN["builtin:shapes"], folder)
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    model = load_model(resolve(str(folder), tmp_path), torch.device("cpu"), "float32")
    (trajectory,) = of_pictures(model, pictures[:1], [""], Settings(num_inference_steps=20).settled(), plain_loop)
    assert trajectory.is_finite
    kept = torch.from_numpy(trajectory.latents)[None]
    target = Target(
        0, "a red star on grass", Settings(num_inference_steps=20, guidance_scale=3.0), *model.checkpoint.layers
    )
    (result,) = translate(model, kept, [""], [[target]])
    assert torch.isfinite(result[0]).all()
