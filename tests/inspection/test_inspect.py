"""`pnp-batch inspect` on a real run: files, selection of inputs and layers, and what the pictures are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import Project

from pnp_batch.inspection.sheets import attention_map, places
from pnp_batch.store import ArtifactStore

INPUTS = [
    {"image": "a <b>.png", "prompts": ["a red star", "a blue heart"]},
    {"image": "wide.png", "prompts": ["x"], "width": 96},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    project = Project(folder)
    project.picture("a <b>.png", 1)
    project.picture("wide.png", 2, (96, 64))
    project.write(INPUTS).pnp("run")
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Project:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Project(tmp_path)


def inspected(project: Project, what: str, *options: str, code: int = 0) -> str:
    return project.pnp(f"inspect {what}", *options, code=code)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_features_of_every_input_on_one_page(project: Project) -> None:
    said = inspected(project, "features", "--timesteps", "3")
    folder = project.output / "inspect"
    assert said.split()[-1] == str(folder / "features.html")
    page = (folder / "features.html").read_text()
    assert "a &lt;b&gt;.png, layer 4, t = 401" in page
    assert "<b>" not in page
    assert page.count("<img ") == 2 * (1 + 4 * 3)  # the source, and layers 1, 4, 7, 11 at three timesteps
    assert "http" not in page
    cells = folder / "features/001-wide"
    assert size_of(cells / "layer-4--t-801.png") == (3, 2)  # layer 4 lies at a quarter of the 12x8 latent
    assert (folder / "features/001-wide.png").is_file()


def test_one_input_and_chosen_layers(project: Project) -> None:
    inspected(project, "features", "--input", "wide.png", "--layers", "5,8", "--timesteps", "2")
    page = (project.output / "inspect/features.html").read_text()
    assert page.count("<img ") == 1 + 2 * 2
    assert "layer 8" in page
    assert "b&gt;.png" not in page


def test_basis_is_over_all_inputs_whichever_are_shown(project: Project) -> None:
    inspected(project, "features", "--timesteps", "2")
    together = (project.output / "inspect/features/001-wide/layer-7--t-1.png").read_bytes()
    inspected(project, "features", "--timesteps", "2", "--input", "1")
    assert (project.output / "inspect/features/000-wide/layer-7--t-1.png").read_bytes() == together


def test_attention_of_the_models_own_layers(project: Project) -> None:
    inspected(project, "attention", "--input", "0", "--timesteps", "2")
    page = (project.output / "inspect/attention.html").read_text()
    assert page.count("<img ") == 1 + 8 * 2
    cell = np.asarray(Image.open(project.output / "inspect/attention/000-a-b/layer-11--t-801.png"))
    assert cell.shape == (8, 8, 3)
    assert cell.std() > 5


def test_trajectory_ends_where_the_run_ended(project: Project) -> None:
    inspected(project, "trajectory", "--input", "0", "--timesteps", "3")
    folder = project.output / "inspect/trajectory/000-a-b"
    last = np.asarray(Image.open(folder / "a-blue-heart--t-1.png"), np.int16)
    row = next(row for row in project.rows() if row["prompt"] == "a blue heart")
    result = np.asarray(Image.open(project.output / row["file_name"]), np.int16)
    assert np.abs(last - result).max() <= 1
    assert (folder / "guidance-image-inverted--t-801.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["features", "--input", "wide.pgn"], "there is no input 'wide.pgn'; did you mean wide.png?", 2),
        (["features", "--input", "7"], "inputs have numbers from 0 to 1", 2),
        (["features", "--layers", "12"], "Invalid value for --layers: there is no decoder layer 12", 2),
        (["attention", "--layers", "1"], "decoder layer 1 has no self-attention", 2),
        (["features", "--layers", "a"], "no list of numbers", 2),
        (["colours"], "is not one of features, attention, trajectory", 2),
    ],
)
def test_mistakes_are_named(project: Project, arguments: list[str], said: str, code: int) -> None:
    what, *options = arguments
    assert said in " ".join(inspected(project, what, *options, code=code).split())


def test_the_end_of_a_path_names_an_input(project: Project) -> None:
    inputs = [{"image": project.picture(f"{name}/horse.png", i), "prompts": "x"} for i, name in enumerate("ab")]
    project.write([*inputs, INPUTS[1] | {"image": str(project.folder / "wide.png")}]).pnp("run")
    for written, name in (("wide.png", str(project.folder / "wide.png")), ("b/horse.png", "b/horse.png")):
        inspected(project, "features", "--input", written, "--timesteps", "1")
        assert f"<h2>{name}</h2>" in (project.output / "inspect/features.html").read_text()
    said = inspected(project, "features", "--input", "horse.png", code=2)
    assert "--input: 'horse.png' may be any of a/horse.png, b/horse.png; write more of the path" in said


def test_an_input_whose_first_prompt_inverts_nothing_is_found(project: Project) -> None:
    sdedit = {"prompt": "a red star", "method": "sdedit"}
    inputs = [INPUTS[1] | {"prompts": [sdedit, "x"]}, INPUTS[0], {"image": "other.png", "prompts": [sdedit]}]
    project.picture("other.png", 3)
    project.write(inputs).pnp("run")
    inspected(project, "features", "--input", "wide.png", "--timesteps", "1")
    assert (project.output / "inspect/features/000-wide").is_dir()
    inspected(project, "features", "--input", "1", "--timesteps", "1")  # numbers are those of guidance images
    assert (project.output / "inspect/features/000-a-b").is_dir()
    assert "other.png is inverted for no prompt" in inspected(project, "features", "--input", "other.png", code=1)


def test_results_of_one_prompt_are_told_apart(project: Project) -> None:
    """By their settings on the page; and prompts that make the same file name overwrite none."""
    one = {"prompt": "a red star", "pnp_f_t": 0.2}
    more = {"prompt": "a red star", "num_inversion_steps": 50}
    inputs = [INPUTS[0] | {"prompts": ["a red star", one, "a blue heart", "A blue: heart", more]}]
    project.write(inputs).pnp("run")
    inspected(project, "trajectory", "--timesteps", "1")
    page = (project.output / "inspect/trajectory.html").read_text()
    for name in ("a red star (pnp_f_t 0.8)", "a red star (pnp_f_t 0.2)", "A blue: heart"):
        assert f'<th scope="row">{name}</th>' in page
    assert "<h2>a &lt;b&gt;.png (num_inversion_steps 10)</h2>" in page
    assert "<h2>a &lt;b&gt;.png (num_inversion_steps 50)</h2>" in page
    files = {path.name for path in (project.output / "inspect/trajectory/000-a-b").iterdir()}
    assert len(files) == 5


def test_more_inputs_than_a_page_holds_are_counted(project: Project) -> None:
    inputs = [{"generate": {"prompt": "a star", "seed": n}, "prompts": ["x"]} for n in range(52)]
    project.write(inputs, defaults={"num_inference_steps": 1, "num_inversion_steps": 1}).pnp("run", "--limit", "1")
    said = inspected(project, "features", "--timesteps", "1", "--layers", "4")
    assert "2 guidance images are not shown; name with --input" in said


def test_before_a_run_it_says_what_to_run(project: Project) -> None:
    shutil.rmtree(project.store / "invert")
    assert "there are no trajectories yet; make them with: pnp-batch run" in inspected(project, "features", code=1)
    assert "wide.png has no trajectory yet" in inspected(project, "features", "--input", "1", code=1)


def test_a_store_that_is_read_is_not_changed(project: Project) -> None:
    before = {str(p): p.stat().st_mtime_ns for p in project.store.rglob("*.safetensors")}
    inspected(project, "features", "--timesteps", "1")
    assert {str(p): p.stat().st_mtime_ns for p in project.store.rglob("*.safetensors")} == before
    assert not ArtifactStore(project.store).corrupt


def test_attention_map_is_what_the_attention_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(10, 8, generator=generator) for _ in range(3))
    full = attention_map(q, k, heads=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    assert torch.allclose(full @ v, expected, atol=1e-6)
    two = attention_map(q, k, heads=2)
    halves = [attention_map(q[:, part], k[:, part], heads=1) for part in (slice(4), slice(4, 8))]
    assert torch.allclose(two, (halves[0] + halves[1]) / 2, atol=1e-6)


def test_places_run_from_the_first_to_the_last() -> None:
    assert places(50, 6) == [0, 10, 20, 29, 39, 49]
    assert places(3, 6) == [0, 1, 2]
    assert places(5, 1) == [0]


@pytest.mark.parametrize("what", ["features", "attention", "trajectory"])
def test_an_input_with_several_step_counts_is_shown_once_for_each(project: Project, what: str) -> None:
    longer = {"prompt": "a red star", "num_inference_steps": 10}
    project.write([INPUTS[0] | {"prompts": ["a red star", longer]}, INPUTS[1]]).pnp("run")
    inspected(project, what, "--input", "0", "--layers", "7", "--timesteps", "1")
    page = (project.output / f"inspect/{what}.html").read_text()
    assert page.count("<h2>") == 2
    for steps in (5, 10):
        assert f"num_inference_steps {steps}" in page


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "feature"],
        ["inspect", "features", "--layers", "x"],
        ["inspect", "features", "--layers", "99"],
        ["evaluate"],
    ],
)
def test_mistakes_on_the_command_line_are_told_before_torch_is_imported(finished: Path, arguments: list[str]) -> None:
    manifest = Project(finished).manifest if len(arguments) > 1 else finished / "no such manifest.yaml"
    code = (
        "import atexit, sys; from pnp_batch.cli import main\n"
        "atexit.register(lambda: print({'torch', 'diffusers'} & set(sys.modules)))\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments, str(manifest)], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "set()\n", ended.stderr
