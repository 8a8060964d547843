"""The reference results of the authors' own script, reproduced through the Python front door and through the CLI."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

import pnp_batch
from pnp_batch.cli import app
from pnp_batch.store import ArtifactStore

DATA = Path(__file__).parents[1] / "conformance"
TOLERANCE = 1e-4  # relative L2, as the reference's README states


def parameters(case: str) -> dict[str, object]:
    values = yaml.safe_load((DATA / f"{case}.yaml").read_text())
    return values | {"model": str(DATA / values["model"]), "image": str(DATA / values["image"])}


def assert_same_picture(path_or_image: Path | Image.Image, case: str) -> None:
    image = path_or_image if isinstance(path_or_image, Image.Image) else Image.open(path_or_image)
    expected = np.asarray(Image.open(DATA / f"{case}.png").convert("RGB"), np.int16)
    assert np.abs(np.asarray(image, np.int16) - expected).max() <= 1


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", ["case-a", "case-b"])
def test_front_door_reproduces_every_reference_tensor(case: str) -> None:
    result = pnp_batch.translate(**parameters(case), device="cpu")
    for name, expected in load_file(DATA / f"{case}.safetensors").items():
        kind, timestep = name.split(".")
        assert relative_error(getattr(result, kind)[int(timestep)].numpy(), expected) < TOLERANCE, name
    assert_same_picture(result.image, case)


@pytest.mark.parametrize("case", ["case-a", "case-b"])
def test_cli_reproduces_the_reference(case: str, tmp_path: Path) -> None:
    settings = parameters(case)
    model, image, prompt = (settings.pop(key) for key in ("model", "image", "prompt"))
    manifest = {
        "model": model,
        "output_dir": "out",
        "defaults": settings,
        "inputs": [{"image": image, "prompts": [prompt]}],
    }
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    outcome = CliRunner().invoke(app, ["run", str(tmp_path / "manifest.yaml"), "--devices", "cpu"])
    assert outcome.exit_code == 0, outcome.output
    (row,) = map(json.loads, (tmp_path / "out/metadata.jsonl").read_text().splitlines())
    assert_same_picture(tmp_path / "out" / row["file_name"], case)
    _assert_latents(ArtifactStore(tmp_path / "out/store"), row["key"], case)


def _assert_latents(store: ArtifactStore, key: str, case: str) -> None:
    expected = load_file(DATA / f"{case}.safetensors")
    translation = store.find("translate", key)
    assert translation is not None
    assert relative_error(translation.load("result")["latent"][None], expected["sampling.0001"]) < TOLERANCE
    trajectory = store.find("invert", translation.meta["trajectory"])
    assert trajectory is not None
    kept = trajectory.load("trajectory")
    for timestep, latent in zip(kept["timesteps"], kept["latents"], strict=True):
        if f"inversion.{timestep:04}" in expected:
            assert relative_error(latent[None], expected[f"inversion.{timestep:04}"]) < TOLERANCE
