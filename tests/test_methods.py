"""Methods in an ordinary manifest: what each needs, what each has in its keys, what it refuses."""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import TINY_SD, Project
from safetensors.numpy import load_file, save_file

import pnp_batch
from pnp_batch.errors import ItemError, ManifestError, NonFiniteError
from pnp_batch.inputs import Source, Translation
from pnp_batch.manifest import METHODS_OF, Settings
from pnp_batch.methods import METHODS
from pnp_batch.plan import Job, trajectory_key, translation_key, unit_id

PROMPT = "a red car"
ALL: list[dict[str, Any]] = [
    {"prompt": PROMPT},
    {"prompt": PROMPT, "method": "ddim"},
    {"prompt": PROMPT, "method": "p2p"},
    {"prompt": PROMPT, "method": "sdedit", "sdedit_strength": 0.4},
    {"prompt": PROMPT, "method": "sdedit", "sdedit_strength": 0.8},
    {"prompt": PROMPT, "method": "text-to-image"},
]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.picture("a.png", 1)
    made.picture("b.png", 2)
    return made


def written(project: Project, prompts: list[Any], inputs: dict[str, Any] | None = None, **defaults: Any) -> Project:
    """A manifest of two pictures; 5 sampling and 10 inversion steps, as long as something is inverted."""
    entries = [{"image": name, "prompts": prompts, **(inputs or {})} for name in ("a.png", "b.png")]
    return project.write(entries, defaults={"inversion_prompt": "a blue car", **defaults})


def test_every_method_runs_from_one_manifest(project: Project) -> None:
    written(project, ALL).pnp("run")
    rows = project.rows()
    assert sorted(row["method"] for row in rows) == sorted(2 * [prompt.get("method", "pnp") for prompt in ALL])
    assert len(set(project.pictures().values())) == 12
    for row in rows:
        own = {name for name, known in METHODS_OF.items() if row["method"] in known}
        assert {name for name in METHODS_OF if name in row} == own - {"consistency"}  # which is about videos
    assert "a.png" in (project.output / "report.html").read_text()
    assert project.pnp("inspect trajectory", "--timesteps", "2").endswith("trajectory.html\n")
    assert "0 were corrupt" in project.pnp("store verify")
    assert "freed 0.0 MB in 0 places" in project.pnp("store gc", "--unused")


def test_a_dry_run_counts_the_rows_that_a_run_computes(project: Project) -> None:
    for prompt in ALL[:3]:
        shutil.rmtree(project.output, ignore_errors=True)
        written(project, [prompt])
        counted = int(project.pnp("run", "--dry-run").split("UNet rows:")[1].split()[0])
        project.pnp("run")
        assert project.progress()["rows"] == counted, prompt


def test_what_only_wants_the_picture_inverts_nothing(project: Project) -> None:
    project.write([{"image": "a.png", "prompts": ALL[3:]}])
    project.manifest.write_text(project.manifest.read_text().replace("  num_inversion_steps: 10\n", ""))
    # two rows at 2 of 5 steps, at 4 and at all of them
    assert "UNet rows:  22 (0 inversion, 0 source, 22 target)" in project.pnp("run", "--dry-run")
    project.pnp("run")
    assert project.progress()["rows"] == 22
    assert not list((project.store / "invert").rglob("trajectory.safetensors"))
    assert len(list((project.store / "invert").rglob("preview.safetensors"))) == 1


def test_a_method_more_costs_only_itself(project: Project) -> None:
    written(project, ALL[:1]).pnp("run")
    before, rows = project.tensors(), project.progress()["rows"]
    written(project, ALL[:2]).pnp("run")
    assert before.items() <= project.tensors().items()
    assert project.progress()["rows"] == 2 * 5 * 2 < rows
    written(project, ALL).pnp("run")
    assert before.items() <= project.tensors().items()


@pytest.mark.parametrize("stage", ["translate", "invert"])
def test_what_is_lost_is_made_again_to_the_byte(project: Project, stage: str) -> None:
    written(project, ALL).pnp("run")
    pictures, tensors = project.pictures(), project.tensors()
    for artifact in sorted((project.store / stage).glob("*/*"))[::2]:
        shutil.rmtree(artifact)
    shutil.rmtree(project.output / "images")
    for lost in sorted((project.store / "translate").glob("*/*"))[::3]:
        shutil.rmtree(lost)
    project.pnp("run")
    assert project.pictures() == pictures
    assert project.tensors() == tensors


def test_a_generated_guidance_image_serves_every_method(project: Project) -> None:
    spec = {"generate": {"prompt": "a blue car", "seed": 3}, "prompts": ALL}
    project.write([spec]).pnp("run")
    assert len(set(project.pictures().values())) == len(ALL)


def refusal(project: Project, prompts: list[Any], inputs: dict[str, Any] | None = None, **defaults: Any) -> str:
    return written(project, prompts, inputs, **defaults).pnp("validate", code=2)


def test_a_setting_the_method_does_not_know_is_refused_where_it_stands(project: Project) -> None:
    said = refusal(project, [{"prompt": PROMPT, "method": "sdedit", "pnp_f_t": 0.5}, PROMPT])
    assert "pnp_f_t means nothing to `method: sdedit`; it belongs to pnp" in said
    said = refusal(project, [PROMPT], {"sdedit_strength": 0.5})
    assert "inputs.0.sdedit_strength: sdedit_strength means nothing to `method: pnp`; it belongs to sdedit" in said
    said = refusal(project, [PROMPT], p2p_cross_replace=0.5)
    assert "defaults.p2p_cross_replace" in said
    assert "1 problem found" in said
    said = refusal(project, [{"prompt": PROMPT, "method": "text-to-image"}])
    assert "inversion_prompt means nothing to `method: text-to-image`; it belongs to pnp and ddim and p2p" in said


def test_a_setting_that_any_prompt_below_knows_is_welcome(project: Project) -> None:
    written(project, ALL[:4], sdedit_strength=0.3, p2p_self_replace=0.2, pnp_f_t=0.7).pnp("validate")


def test_p2p_needs_a_cell_to_take_over(project: Project) -> None:
    said = refusal(project, [{"prompt": PROMPT, "method": "p2p", "p2p_self_cells": 0}])
    assert "inputs.0.prompts.0.p2p_self_cells" in said
    written(project, [{"prompt": PROMPT, "method": "p2p", "p2p_self_cells": 16}]).pnp("validate")


def test_p2p_wants_the_words_of_the_source(project: Project) -> None:
    said = refusal(project, [{"prompt": PROMPT, "method": "p2p"}], inversion_prompt="")
    assert "compares the prompt with the words of the source: write inversion_prompt" in said


def test_a_swap_of_words_needs_as_many_of_them(project: Project) -> None:
    said = refusal(project, [{"prompt": "a very red car", "method": "p2p", "p2p_edit": "replace"}])
    assert "swaps words one for one" in said
    written(project, [{"prompt": "a very red car", "method": "p2p", "p2p_edit": "refine"}]).pnp("validate")


def test_strength_points_to_its_place(project: Project) -> None:
    said = refusal(project, [{"prompt": PROMPT, "strength": 0.5}])
    assert "pnp_f_t" in said
    assert "sdedit_strength" in said


def test_keys_of_pnp_are_what_they_were_before_there_were_other_methods() -> None:
    settings = Settings(
        guidance_scale=5.0, pnp_f_t=0.9, negative_prompt="ugly", seed=3, inversion_prompt="a horse"
    ).settled()
    translation = Translation("a bronze horse", settings, ("inputs", 0, "prompts", 0))
    source = Source("horse.png", PurePosixPath("horse"), Path("/pictures/horse.png"), None, ("inputs", 0))
    trajectory = trajectory_key(Job(source, (512, 512), settings, (translation,)), "0" * 64, "1" * 64, "float16")
    assert trajectory == "cceab431e5525f8599699b4f2a48971b1566eb6e0012a52e84aa91daf5c80459"
    key = translation_key(translation, trajectory, ((4,), (4, 5)))
    assert key == "223e3a855b01df91ddc17cdc08ca9dabea2db9b27fdbac467737aa034c387aca"
    listed_as = unit_id(source, translation)  # no key: what lists of failures call it
    assert listed_as == "da638f371d6f397268f226816b9b1841a9a087fd9ce59872a62dd88de1ece73c"


@pytest.mark.parametrize("method", METHODS)
def test_a_key_depends_on_the_settings_of_its_own_method_alone(method: str) -> None:
    others = {
        "pnp_f_t": 0.1,
        "sdedit_strength": 0.1,
        "p2p_edit": "refine",
        "p2p_cross_replace": 0.1,
        "p2p_self_replace": 0.1,
        "p2p_self_cells": 16,
    }
    plain = Settings(method=method)
    for name, value in others.items():
        changed = plain.model_copy(update={name: value})
        keys = {translation_key(Translation(PROMPT, s, ()), "t", ((), ())) for s in (plain, changed)}
        assert len(keys) == (2 if method in METHODS_OF[name] else 1), name


def test_methods_are_open_to_python(project: Project) -> None:
    picture = Image.open(project.folder / "a.png")
    same: dict[str, Any] = {"model": TINY_SD, "height": 64, "width": 64, "num_inference_steps": 5}
    made = pnp_batch.translate(picture, PROMPT, method="sdedit", sdedit_strength=0.6, **same)
    assert made.inversion == {}
    assert len(made.sampling) == 5
    with pytest.raises(ManifestError, match="means nothing to `method: sdedit`"):
        pnp_batch.translate(picture, PROMPT, method="sdedit", pnp_f_t=0.5, **same)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"num_inference_steps": 5, "num_inversion_steps": 7},
            ManifestError,
            "num_inversion_steps: .*step counts that",
        ),
        ({"pnp_f_layers": [99]}, ManifestError, "pnp_f_layers: there is no decoder layer 99"),
        ({"prompt": ["a cat"]}, ManifestError, "the prompt must be text"),
        ({"prompt": " "}, ManifestError, "the prompt must be text"),
        ({"image": np.zeros((64, 64, 1), np.uint8)}, ItemError, r"not \(64, 64, 1\)"),
        ({"image": np.zeros((0, 0, 3), np.uint8)}, ItemError, "no pixels: 0x0"),
        ({"image": b"bytes"}, ItemError, "not bytes"),
    ],
)
def test_what_python_gives_wrongly_is_named(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    given = {"image": np.zeros((64, 64, 3), np.uint8), "prompt": PROMPT, "model": TINY_SD} | changes
    with pytest.raises(error, match=said):
        pnp_batch.translate(**given)


def test_a_picture_that_is_cut_off_is_named_to_python(project: Project) -> None:
    whole = (project.folder / "a.png").read_bytes()
    with Image.open(BytesIO(whole[: len(whole) // 2])) as picture, pytest.raises(ItemError, match="not a readable"):
        pnp_batch.translate(picture, PROMPT, TINY_SD)


def test_an_all_black_result_is_no_result_for_python_either(project: Project) -> None:
    model = shutil.copytree(TINY_SD, project.folder / "black")
    weights = load_file(model / "vae/diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] -= 100
    save_file(weights, model / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(NonFiniteError, match="all black"):
        pnp_batch.translate(project.folder / "a.png", PROMPT, model, height=64, width=64, num_inference_steps=5)


def test_what_failed_comes_as_a_manifest_that_is_valid(project: Project) -> None:
    (project.folder / "a.png").write_bytes(b"no picture")
    written(project, ALL[3:5], pnp_f_t=0.7, method="sdedit").pnp("validate", code=2)  # for nobody uses pnp_f_t
    entries = [
        {"image": "a.png", "prompts": ALL[3:5]},
        {"image": "b.png", "inversion_prompt": "a blue car", "prompts": ALL[:1]},
    ]
    project.write(entries, defaults={"pnp_f_t": 0.7}).pnp("run", code=1)
    assert {row["prompt"] for row in project.failures()} == {PROMPT}
    failed = Project(project.output)
    failed.manifest.write_text((project.output / "failed.yaml").read_text())
    assert "2 results of 1 guidance image" in failed.pnp("validate")
