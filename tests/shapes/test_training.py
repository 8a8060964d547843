"""`shapes train`: a few steps of the real thing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from tiny_sdxl import write_tiny_sdxl
from typer.testing import CliRunner

from pnp_batch.checkpoint import resolve
from pnp_batch.cli import app
from pnp_batch.diffusion.model import load_model
from pnp_batch.shapes.scenes import HELD_OUT
from pnp_batch.shapes.training import Training, _generator, _normalise, planned, wordings

FEW = ["--scenes", "64", "--batch-size", "4", "--every", "100", "--dtype", "float32"]


def trained(folder: Path, *options: str, code: int = 0) -> str:
    outcome = CliRunner().invoke(app, ["shapes", "train", str(folder), *FEW, *options])
    assert outcome.exit_code == code, outcome.output
    return outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("start", [(), ("--from", "builtin:shapes")])
def test_what_it_writes_is_a_diffusers_pipeline_that_pnp_runs_on(tmp_path: Path, start: tuple[str, ...]) -> None:
    said = trained(tmp_path / "model", *start, "--vae-steps", "2", "--unet-steps", "2")
    assert "vae 2/2" in said
    assert "unet 2/2" in said
    grids = {path.name for path in (tmp_path / "model/training/samples").glob("*.png")}
    before = {"vae-00000.png"} if start else set()
    assert grids == {"vae-00002.png", "unet-00002.png", *before}
    assert ("VAE after 0 steps" in said) == bool(start)
    checkpoint = resolve(str(tmp_path / "model"), tmp_path)
    assert checkpoint.layers == resolve("builtin:shapes", tmp_path).layers
    model = load_model(checkpoint, torch.device("cpu"), "float32")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None, local_files_only=True)
    ours, theirs = (dict(each.named_parameters()) for each in (model.text_encoder, pipeline.text_encoder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)


@pytest.mark.slow
def test_going_on_from_a_model_leaves_its_latents_as_they_are(tmp_path: Path) -> None:
    trained(tmp_path / "model", "--from", "builtin:shapes", "--vae-steps", "2", "--unet-steps", "0")
    before, after = (
        AutoencoderKL.from_pretrained(resolve(name, tmp_path).weights / "vae").state_dict()
        for name in ("builtin:shapes", str(tmp_path / "model"))
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


@pytest.mark.slow
def test_a_training_that_is_repeated_changes_nothing(tmp_path: Path) -> None:
    options = ("--from", "builtin:shapes", "--vae-steps", "0", "--unet-steps", "2")
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    trained(tmp_path / "model", *options)
    first = weights.read_bytes()
    assert "unet 2/2" not in trained(tmp_path / "model", *options)
    assert weights.read_bytes() == first


TINY_SD = Path(__file__).parents[1] / "conformance/tiny-sd"


@pytest.mark.slow
def test_a_model_without_layers_of_its_own_can_be_gone_on_from(tmp_path: Path) -> None:
    shutil.copytree(resolve("builtin:shapes", tmp_path).weights, tmp_path / "start")
    (tmp_path / "start/pnp.json").unlink()
    trained(tmp_path / "model", "--from", str(tmp_path / "start"), "--vae-steps", "0", "--unet-steps", "0")
    assert not (tmp_path / "model/pnp.json").exists()
    assert resolve(str(tmp_path / "model"), tmp_path).layers == ((4,), (4, 5, 6, 7, 8, 9, 10, 11))


def test_a_model_of_another_size_is_refused_at_once(tmp_path: Path) -> None:
    said = trained(tmp_path / "model", "--from", str(TINY_SD), code=2)
    assert "paints pictures of 128x128 pixels; scenes have 64x64" in said
    assert not (tmp_path / "model").exists()


def test_a_model_of_two_text_encoders_is_refused_at_once(tmp_path: Path) -> None:
    said = trained(tmp_path / "model", "--from", str(write_tiny_sdxl(tmp_path / "sdxl")), code=2)
    assert "is a Stable Diffusion XL; what is trained here has one text encoder" in said
    assert not (tmp_path / "model").exists()


def test_nothing_is_trained_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("mine")
    assert "not empty" in trained(tmp_path, "--vae-steps", "0", "--unet-steps", "0", code=2)
    for place in ("model_index.json", "model_index.json/below"):
        assert "is a file" in trained(tmp_path / place, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["model_index.json"]
    assert (tmp_path / "model_index.json").read_text() == "mine"


@pytest.mark.parametrize("seed", [HELD_OUT, HELD_OUT - 63])
def test_held_out_scenes_are_never_learnt_from(tmp_path: Path, seed: int) -> None:
    said = trained(tmp_path / "model", "--vae-steps", "0", "--unet-steps", "0", "--seed", str(seed), code=2)
    assert "held out" in said


def run_with(tmp_path: Path, seed: int) -> Training:
    others = {"seed": seed, "half": False, "batch": 8, "say": print}
    return planned(tmp_path, None, 64, 1, 1, None, devices="cpu", **others)


def test_another_seed_draws_other_wordings_and_noise(tmp_path: Path) -> None:
    one, other = run_with(tmp_path, 0), run_with(tmp_path, 8)
    same = torch.arange(8)  # the scenes 8 to 15 of both
    assert wordings(one, 3, same + 8) == wordings(one, 3, same + 8)
    assert wordings(one, 3, same + 8) != wordings(other, 3, same)
    assert _generator(one, 3).initial_seed() != _generator(other, 3).initial_seed()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "nowhere" in trained(tmp_path / "model", "--from", str(tmp_path / "nowhere"), code=2)


def test_normalised_latents_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks).eval()
    pictures = torch.rand(6, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        picture = vae.decode(before.mean).sample
        _normalise(vae, before.mean)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, picture, atol=1e-4)
    scaled = after.mean * vae.config.scaling_factor
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(scaled.std((0, 2, 3)), torch.ones(4), atol=1e-3)
    relative = (after.std * vae.config.scaling_factor) / (before.std / before.mean.std((0, 2, 3)).view(1, -1, 1, 1))
    assert torch.allclose(relative, torch.ones_like(relative), atol=1e-3)
