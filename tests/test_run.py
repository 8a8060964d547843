"""The whole line on a tiny model: what is computed, what is not, and that the bytes never depend on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from running import TINY_SD, Project, program
from typer.testing import CliRunner

from pnp_batch.checkpoint import resolve
from pnp_batch.cli import app
from pnp_batch.cli.run import conclude
from pnp_batch.engines.run import Summary
from pnp_batch.manifest import load_manifest
from pnp_batch.plan import Plan
from pnp_batch.shapes.scenes import random_scene, render
from pnp_batch.store import ArtifactStore
from pnp_batch.store.files import size_of

PROMPTS = ["a bronze statue", "a pink toy"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def done(project: Project) -> Project:
    """Two pictures, two prompts each, finished."""
    project.write(
        [{"image": project.picture(f"{name}.png", seed)} | {"prompts": [*PROMPTS]} for seed, name in enumerate("ab")]
    )
    project.pnp("run")
    return project


def rewrite(project: Project, **defaults: object) -> None:
    content = yaml.safe_load(project.manifest.read_text())
    content["defaults"] |= defaults
    project.manifest.write_text(yaml.safe_dump(content))


def add_prompt(project: Project, prompt: object) -> None:
    content = yaml.safe_load(project.manifest.read_text())
    for each in content["inputs"]:
        each["prompts"].append(prompt)
    project.manifest.write_text(yaml.safe_dump(content))


def test_outputs_are_as_designed(done: Project) -> None:
    rows = done.rows()
    assert [row["prompt"] for row in rows] == PROMPTS * 2
    for row in rows:
        assert row["file_name"].startswith(f"images/{Path(row['source']).stem}--")
        assert row["key"][:10] in row["file_name"]
        with Image.open(done.output / row["file_name"]) as picture:
            settings = json.loads(picture.text["pnp-batch"])
        assert (
            settings["prompt"] == row["prompt"] and settings["key"] == row["key"] and settings["guidance_scale"] == 5.0
        )
        assert row["reconstruction_psnr"] <= row["vae_psnr"] + 1
    assert len({row["key"] for row in rows}) == 4
    assert (done.output / "report.html").is_file() and (done.output / "run.log").is_file()
    assert not (done.output / "failures.jsonl").exists() and not (done.output / "failed.yaml").exists()


def test_a_finished_run_repeated_computes_nothing_and_changes_no_byte(done: Project) -> None:
    before = {
        p: p.read_bytes() for p in done.output.rglob("*") if p.is_file() and p.name not in ("progress.json", "run.log")
    }
    assert "0 UNet rows" in done.pnp("run")
    assert before == {p: p.read_bytes() for p in before}
    assert "loaded" not in (done.output / "run.log").read_text().rsplit("run of", 1)[1]


def test_an_added_prompt_computes_only_itself(done: Project) -> None:
    add_prompt(done, "a marble bust")
    done.pnp("run")
    # 4 source steps (f: int(5 * 0.8)) of both pictures, and 2 guidance rows in 5 steps of both.
    assert done.progress()["rows"] == 2 * 4 + 2 * 2 * 5
    assert done.progress()["inverted"] == 0


def test_changed_thresholds_invert_nothing_again(done: Project) -> None:
    rewrite(done, pnp_f_t=0.4)
    done.pnp("run")
    assert done.progress()["inverted"] == 0 and done.progress()["translated"] == 4


def test_source_rows_are_computed_once_for_all_prompts_of_a_picture(project: Project) -> None:
    prompts = [f"a toy number {i}" for i in range(5)]
    project.write([{"image": project.picture("a.png"), "prompts": prompts}], run={"batch_size": 2})
    project.pnp("run")
    assert (
        project.progress()["rows"] == (9 + 5) + 4 + 5 * 2 * 5
    )  # 9 of the 10 inversion steps reach the noisiest sampling step


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_changes_a_result_by_one_grey_level_at_most(done: Project, batch_size: int, tmp_path: Path) -> None:
    other = Project(tmp_path / "other")
    other.folder.mkdir()
    inputs = [{"image": f"../{name}.png", "prompts": PROMPTS} for name in "ab"]
    other.write(inputs, run={"batch_size": batch_size})
    other.pnp("run")
    for row in done.rows():
        mine, theirs = (np.asarray(Image.open(p.output / row["file_name"]), np.int16) for p in (done, other))
        assert np.abs(mine - theirs).max() <= 1


def test_a_lost_result_is_made_again_to_the_byte(done: Project) -> None:
    pictures, tensors = done.pictures(), done.tensors()
    lost = done.rows()[2]
    (folder,) = done.store.glob(f"translate/*/{lost['key']}")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    (done.output / lost["file_name"]).unlink()
    done.pnp("run")
    assert done.pictures() == pictures and done.tensors() == tensors


def test_a_lost_result_is_made_again_to_the_byte_though_the_trajectory_of_another_of_its_batch_is_lost_too(
    project: Project,
) -> None:
    fill(project)
    pictures, tensors = project.pictures(), project.tensors()
    first, last = project.rows()[0], project.rows()[-1]
    (folder,) = project.store.glob(f"translate/*/{first['key']}")
    (other,) = project.store.glob(f"translate/*/{last['key']}/meta.json")
    trajectory = json.loads(other.read_text())["content"]["meta"]["trajectory"]
    shutil.rmtree(folder)
    shutil.rmtree(next(project.store.glob(f"invert/*/{trajectory}")))
    (project.output / first["file_name"]).unlink()
    project.pnp("run")
    assert project.pictures() == pictures and project.tensors() == tensors


def fill(project: Project) -> None:
    """Three pictures whose results share a batch."""
    project.write([{"image": project.picture(f"{i}.png", i), "prompts": PROMPTS} for i in range(3)])
    project.pnp("run")


def rot(shard: Path) -> None:
    """One bit turned; size and time as published, so that only the checksum can tell."""
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_result_that_rotted_silently_is_made_again_to_the_byte(project: Project) -> None:
    fill(project)
    pictures, tensors = project.pictures(), project.tensors()
    shutil.rmtree(project.output / "images")
    rot(sorted(project.store.glob("translate/*/*/result.safetensors"))[0])
    assert "corrupt translate artifact" in project.pnp("run")
    kept = {name: data for name, data in project.tensors().items() if not name.startswith("corrupt")}
    assert project.pictures() == pictures and kept == tensors


def test_a_trajectory_that_rotted_silently_is_made_again_and_the_batch_computed_as_it_was(project: Project) -> None:
    fill(project)
    pictures = project.pictures()
    for folder in (project.store / "translate", project.output / "images"):
        shutil.rmtree(folder)
    rot(sorted(project.store.glob("invert/*/*/trajectory.safetensors"))[0])
    assert "corrupt invert artifact" in project.pnp("run")
    assert project.pictures() == pictures


def test_a_prompt_added_later_keeps_its_batch_when_it_is_lost(done: Project) -> None:
    add_prompt(done, "a marble bust")
    done.pnp("run")
    tensors = done.tensors()
    lost = next(row for row in done.rows() if row["prompt"] == "a marble bust")
    (shard,) = done.store.glob(f"translate/*/{lost['key']}/result.safetensors")
    shard.unlink()
    done.pnp("run")
    kept = {name: data for name, data in done.tensors().items() if not name.startswith("corrupt")}
    assert kept == tensors


@pytest.mark.parametrize("stage", ["invert", "translate"])
def test_a_flipped_byte_is_noticed_reported_and_computed_again(done: Project, stage: str) -> None:
    tensors = done.tensors()
    shard = sorted(done.store.glob(f"{stage}/*/*/*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    assert f"corrupt {stage} artifact" in done.pnp("run")
    assert {name: data for name, data in done.tensors().items() if not name.startswith("corrupt")} == tensors
    assert "corrupt" not in done.pnp("run")


def test_silent_rot_is_noticed_when_the_artifact_is_read(done: Project) -> None:
    rot(next(done.store.glob("invert/*/*/trajectory.safetensors")))
    add_prompt(done, "a marble bust")
    assert "corrupt invert artifact" in done.pnp("run")
    assert len(done.rows()) == 6


def test_one_bad_item_never_stops_the_rest(project: Project) -> None:
    good = project.picture("good.png")
    (project.folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    (project.folder / "empty.png").touch()
    whole = (project.folder / good).read_bytes()
    (project.folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    names = ["corrupt.png", good, "empty.png", "torn.png"]
    project.write([{"image": name, "prompts": PROMPTS} for name in names])
    assert "6 failed" in project.pnp("run", code=1)
    assert {row["source"] for row in project.rows()} == {good}
    assert {(row["source"], row["prompt"]) for row in project.failures()} == {
        (name, prompt) for name in names if name != good for prompt in PROMPTS
    }
    for row in project.failures():
        assert row["stage"] and row["error"] and (project.output / row["traceback"]).read_text()


def test_failed_yaml_is_a_manifest_of_just_the_failed_items_with_the_same_names(project: Project) -> None:
    project.picture("photos/sub/good.png")
    broken = project.folder / "photos/sub/broken.png"
    broken.write_text("nonsense")
    project.write([{"images": "photos/", "prompts": [PROMPTS[0], {"prompt": PROMPTS[1], "pnp_f_t": 0.4}]}])
    project.pnp("run", code=1)
    project.picture("photos/sub/broken.png", seed=9)
    from typer.testing import CliRunner

    from pnp_batch.cli import app

    outcome = CliRunner().invoke(app, ["run", str(project.output / "failed.yaml")])
    assert outcome.exit_code == 0, outcome.output
    again = {row["file_name"] for row in project.rows()}
    assert sum(name.startswith("images/sub/broken--") for name in again) == 2
    project.pnp("run")  # and the original manifest agrees that all is there
    assert {row["file_name"] for row in project.rows()} == again and project.progress()["rows"] == 0


def test_status_counts_what_failed_at_every_stage(project: Project) -> None:
    (project.folder / "b.png").write_text("nonsense")
    inputs = [project.picture("a.png"), "b.png", project.picture("c.png", 1)]
    project.write([{"image": name, "prompts": PROMPTS} for name in inputs[:2]]).pnp("run", code=1)
    project.write([{"image": name, "prompts": PROMPTS} for name in inputs])
    lines = [line.split() for line in project.pnp("status").splitlines()]
    assert ["invert", "1", "1", "1"] in lines and ["translate", "2", "2", "2"] in lines


def test_retry_failed_tries_just_those(project: Project) -> None:
    names = [project.picture("a.png"), "b.png"]
    (project.folder / "b.png").write_text("nonsense")
    project.write([{"image": name, "prompts": PROMPTS} for name in names])
    project.pnp("run", code=1)
    project.picture("b.png", seed=1)
    project.pnp("run", "--retry-failed")
    assert project.progress()["trajectories"] == 1 and project.progress()["translated"] == 2
    assert project.failures() == [] and not (project.output / "failed.yaml").exists()
    assert len(project.rows()) == 4


def test_fail_fast_ends_the_run(project: Project) -> None:
    (project.folder / "broken.png").write_text("nonsense")
    good = project.picture("good.png")
    project.write([{"image": name, "prompts": PROMPTS} for name in ("broken.png", good)])
    assert "stopped" in project.pnp("run", "--fail-fast", code=1)
    assert not (project.output / "metadata.jsonl").exists()


def test_fail_fast_writes_what_was_computed_and_claims_nothing_of_what_it_did_not_look_at(project: Project) -> None:
    good = project.picture("good.png")
    (project.folder / "broken.png").write_text("nonsense")
    sizes = {"height": None, "width": None}
    project.write([{"image": good, "prompts": ["a cat", {"prompt": "a dog", "guidance_scale": 1e38}]}], defaults=sizes)
    assert "at least 1 of 2 results are there" in project.pnp("run", "--fail-fast", code=1)
    assert len(project.pictures()) == len(project.rows()) == 1
    inputs = [{"image": "broken.png", "prompts": PROMPTS}, {"image": good, "prompts": ["a cat"]}]
    said = project.write(inputs, defaults=sizes).pnp("run", "--fail-fast", code=1)
    assert "at least 0 of 3 results are there" in said and "1 result was not looked at" in said
    assert said.count("failed: broken.png") == 1
    assert [row["source"] for row in project.failures()].count("broken.png") == 2


def test_limit_takes_the_first_pictures_and_keeps_later_runs_consistent(project: Project) -> None:
    project.write([{"image": project.picture(f"{i}.png", i), "prompts": PROMPTS[:1]} for i in range(3)])
    project.pnp("run", "--limit", "2")
    assert [row["source"] for row in project.rows()] == ["0.png", "1.png"]
    project.pnp("run")
    assert len(project.rows()) == 3


def test_all_verbs_count_the_same_guidance_images(project: Project) -> None:
    """Settings that decide the inversion give a picture more than one trajectory, but leave it one picture."""
    prompts = [
        "x",
        {"prompt": "y", "num_inference_steps": 2},
        {"prompt": "z", "height": 32},
        {"prompt": "x", "seed": 1},
    ]
    inputs = [{"image": project.picture(f"{i}.png", i), "prompts": prompts[i:]} for i in range(2)]
    project.write([*inputs, {"image": "0.png", "prompts": ["w"]}])
    counted = "8 results of 3 guidance images"
    assert counted in project.pnp("validate")
    printed = project.pnp("run", "--dry-run")
    assert counted in printed and "to compute: 8 results, 7 trajectories" in printed
    status = json.loads(project.pnp("status", "--json"))
    assert (status["sources"], status["trajectories"], status["inverted"]) == (3, 7, 0)


def test_dry_run_computes_nothing_and_its_count_is_right(project: Project) -> None:
    project.write(
        [
            {"image": project.picture("a.png"), "prompts": PROMPTS},
            {"generate": {"prompt": "a horse", "seed": 1}, "prompts": ["a dog"]},
        ]
    )
    printed = project.pnp("run", "--dry-run")
    assert not (project.output / "metadata.jsonl").exists()
    counted = int(printed.split("UNet rows:")[1].split()[0])
    project.pnp("run")
    assert counted == project.progress()["rows"]
    assert "to compute: 0 results" in project.pnp("run", "--dry-run")


@pytest.mark.parametrize("steps", [4, 20])
def test_the_rows_of_a_fixed_point_inversion_are_expected_by_the_number_of_steps(project: Project, steps: int) -> None:
    defaults = {"num_inversion_steps": None, "num_inference_steps": steps, "height": 64, "width": 64}
    Image.fromarray(render(random_scene(0))[0]).save(project.folder / "scene.png")
    inputs = [{"image": "scene.png", "prompts": ["a gold star on night"]}]
    project.write(inputs, model="builtin:shapes", defaults=defaults)
    expected = int(project.pnp("run", "--dry-run").split("UNet rows:")[1].split()[0])
    project.pnp("run")
    assert expected == pytest.approx(project.progress()["rows"], rel=0.3)


def test_only_a_stage(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}])
    project.pnp("run", "--only", "invert")
    assert project.progress()["inverted"] == 1 and project.progress()["translated"] == 0
    project.pnp("run", "--only", "translate")
    assert project.progress()["inverted"] == 0 and project.progress()["translated"] == 2
    assert not (project.output / "metadata.jsonl").exists()
    project.pnp("run", "--only", "assemble")
    assert len(project.rows()) == 2
    assert "is not a stage" in project.pnp("run", "--only", "nonsense", code=2)


def test_status_counts_what_is_there(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}])
    assert "there are no results yet" in project.pnp("report", code=1) and not project.output.exists()
    assert "never ran" in project.pnp("status")
    before = json.loads(project.pnp("status", "--json"))
    assert (before["inverted"], before["translated"]) == (0, 0)
    project.pnp("run")
    after = json.loads(project.pnp("status", "--json"))
    assert (after["inverted"], after["translated"], after["assembled"], after["failed"]) == (1, 2, 2, 0)
    assert not after["run"]["running"]


def test_prompts_that_override_settings_work_side_by_side(project: Project) -> None:
    prompts = [
        "a toy",
        {"prompt": "a toy", "pnp_f_t": 0.2, "pnp_attn_t": 1.0},
        {"prompt": "a toy", "guidance_scale": 1.0},
        {"prompt": "a toy", "negative_prompt": "ugly", "negative_alpha": 0.5, "negative_schedule": "linear"},
        {"prompt": "a toy", "num_inference_steps": 10},
        {"prompt": "a toy", "pnp_f_layers": [5]},
        {"prompt": "a toy", "height": 128, "width": 64},
    ]
    project.write([{"image": project.picture("a.png"), "prompts": prompts}])
    project.pnp("run")
    assert len({data for data in project.pictures().values()}) == len(prompts)
    assert project.progress()["inverted"] == 3
    sizes = {Image.open(project.output / row["file_name"]).size for row in project.rows()}
    assert sizes == {(64, 64), (64, 128)}


def test_names_cannot_escape_or_collide(project: Project) -> None:
    prompts = ["../../etc/passwd", "a/b", "a b", "A  B", "." * 5, "x" * 300, "приве́т мир"]
    project.write(
        [
            {"image": project.picture("a.png"), "prompts": prompts},
            {"image": project.picture("sub/a.png", 1), "prompts": ["a b"]},
        ]
    )
    project.pnp("run")
    names = [row["file_name"] for row in project.rows()]
    assert len(set(names)) == 8
    for name in names:
        assert (project.output / name).resolve().parent == (project.output / "images").resolve()
    assert not [p for p in project.folder.rglob("*passwd*") if project.output not in p.parents]


def test_results_of_generated_pictures_say_how_these_were_made(project: Project) -> None:
    specs = [
        {"prompt": "a horse", "seed": 5},
        {"prompt": "a horse", "seed": 5, "guidance_scale": 3, "negative_prompt": "a"},
    ]
    project.write([{"generate": spec, "prompts": ["a zebra"]} for spec in specs]).pnp("run")
    rows = project.rows()
    assert [(row["generate"]["guidance_scale"], row["generate"]["negative_prompt"]) for row in rows] == [
        (7.5, ""),
        (3, "a"),
    ]
    for row in rows:
        assert row["generate"]["num_inference_steps"] == 5  # as many as of the result, where none are given
        assert not any(name.startswith(("inversion_method", "inversion_prompt", "num_inversion")) for name in row)
        with Image.open(project.output / row["file_name"]) as picture:
            assert json.loads(picture.text["pnp-batch"])["generate"] == row["generate"]


def test_generated_guidance_pictures(project: Project) -> None:
    spec = {"prompt": "a horse", "seed": 50, "guidance_scale": 5.0}
    project.write(
        [{"generate": spec, "prompts": ["a zebra"]}, {"generate": spec | {"seed": 51}, "prompts": ["a zebra"]}]
    )
    project.pnp("run")
    assert len(set(project.pictures().values())) == 2


def test_a_result_that_is_not_finite_fails_alone(project: Project) -> None:
    prompts = ["a toy", {"prompt": "a doll", "guidance_scale": 1e38}]
    project.write([{"image": project.picture("a.png"), "prompts": prompts}])
    project.pnp("run", code=1)
    assert [row["prompt"] for row in project.rows()] == ["a toy"]
    assert "NaN" in project.failures()[0]["error"]


def test_python_can_load_the_output_as_an_image_folder(done: Project) -> None:
    """`datasets` reads metadata.jsonl by these rules: one `file_name` a row, relative, every picture named once."""
    names = [row["file_name"] for row in done.rows()]
    assert sorted(names) == sorted(done.pictures())
    assert {len(row) for row in done.rows()} == {len(done.rows()[0])}


@pytest.fixture
def loud_model(tmp_path: Path) -> Path:
    """The tiny model with activations that float32 can hold and float16 cannot, as in Stable Diffusion 2.1."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "loud"
    shutil.copytree(TINY_SD, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.weight"] *= 1e5
    save_file(tensors, weights)
    return folder


def test_what_half_precision_turns_to_nan_is_made_in_float32_once_and_for_all(
    project: Project, loud_model: Path
) -> None:
    project.write(
        [{"image": project.picture("a.png"), "prompts": PROMPTS}], model=str(loud_model), run={"dtype": "float16"}
    )
    assert "trying float32" in project.pnp("run")
    assert [row["dtype"] for row in project.rows()] == ["float32"] * 2
    project.pnp("run")
    assert project.progress()["rows"] == 0 and len(project.pictures()) == 2
    assert json.loads(project.pnp("status", "--json"))["assembled"] == 2


def test_inversions_of_different_tolerance_never_share_a_batch(project: Project, tmp_path: Path) -> None:
    project.picture("a.png", 0), project.picture("b.png", 1)
    settings = {"num_inversion_steps": None, "inversion_method": "fixed-point"}
    inputs = [
        {"image": "a.png", "inversion_tolerance": 0.05, "prompts": ["a toy"]},
        {"image": "b.png", "inversion_tolerance": 0.0005, "prompts": ["a toy"]},
    ]
    project.write(inputs, defaults=settings)
    project.pnp("run")
    together = project.rows()[1]
    alone = Project(tmp_path / "alone")
    alone.folder.mkdir()
    alone.picture("b.png", 1)
    alone.write(inputs[1:], defaults=settings)
    alone.pnp("run")
    assert alone.rows()[0]["key"] == together["key"]
    assert alone.rows()[0]["inversion_rows"] == together["inversion_rows"]


def test_two_files_with_the_same_pixels_both_get_their_rows(project: Project) -> None:
    names = [project.picture("x/s.png"), project.picture("y/s.png")]
    project.write([{"image": name, "prompts": PROMPTS[:1]} for name in names])
    project.pnp("run")
    assert [row["source"] for row in project.rows()] == names and project.progress()["translated"] == 1


def test_two_files_with_the_same_pixels_both_fail_where_the_computation_does(project: Project) -> None:
    names = [project.picture("x/s.png"), project.picture("y/s.png")]
    project.write([{"image": name, "prompts": [{"prompt": "a doll", "guidance_scale": 1e38}]} for name in names])
    assert "2 failed" in project.pnp("run", code=1)
    assert sorted(row["source"] for row in project.failures()) == names


def test_a_model_that_cannot_be_loaded_is_nobodys_fault(project: Project, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY_SD, tmp_path / "broken")
    weights = tmp_path / "broken/unet/diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if name != "conv_in.weight"}, weights)
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}], model=str(tmp_path / "broken"))
    assert "conv_in.weight" in project.pnp("run", code=2)
    assert not project.failures()


def test_failures_of_prompts_that_left_the_manifest_are_forgotten(project: Project) -> None:
    picture = project.picture("a.png")
    project.write([{"image": picture, "prompts": [{"prompt": "a doll", "guidance_scale": 1e38}]}])
    project.pnp("run", code=1)
    project.write([{"image": picture, "prompts": ["a doll"]}])
    project.pnp("run")
    assert not project.failures() and not list(project.output.glob("tracebacks/*"))


def test_collecting_garbage_keeps_what_the_manifest_names(done: Project) -> None:
    pictures = done.pictures()
    for name in "ab":
        (done.folder / f"{name}.png").touch()  # its digest is not known any more
    assert "in 0 places" in done.pnp("store gc", "--unused", "--dry-run")
    done.write([{"image": "a.png", "prompts": PROMPTS[:1]}])
    assert "in 4 places" in done.pnp("store gc", "--unused")  # three results and a trajectory
    done.pnp("run")
    assert done.progress()["rows"] == 0 and done.pictures() == pictures


@pytest.mark.parametrize("devices", ["auto", "cuda"])
def test_results_of_another_kind_of_machine_are_found_measured_and_kept(project: Project, devices: str) -> None:
    """A GPU computes in half precision, and the machine that looks at its results often has none."""
    inputs = [{"image": project.picture("a.png"), "prompts": PROMPTS}]
    project.write(inputs, run={"dtype": "float16"}).pnp("run")
    project.write(inputs, run={"devices": devices})
    counts = json.loads(project.pnp("status", "--json"))
    assert (counts["inverted"], counts["translated"], counts["assembled"]) == (1, 2, 2)
    assert project.pnp("evaluate") and (project.output / "metrics.jsonl").read_text().count("\n") == 2
    assert Path(project.pnp("inspect trajectory", "--timesteps", "2").strip()).is_file()
    (project.output / "progress.json").unlink()
    assert "in 0 places" in project.pnp("store gc", "--unused")


def test_a_device_that_is_not_here_stops_a_run_and_nothing_else(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}], run={"devices": "cuda:99"})
    assert "'cuda:99' cannot be used" in project.pnp("run", code=3)
    assert json.loads(project.pnp("status", "--json"))["translated"] == 0
    assert "to compute: 2 results" in project.pnp("run", "--dry-run")


@pytest.mark.parametrize("place", ["output_dir", "store"])
def test_a_file_where_a_folder_should_be_is_found_before_anything_starts(project: Project, place: str) -> None:
    (project.folder / "file").touch()
    where = {"output_dir": "file/x"} if place == "output_dir" else {"run": {"store": "file"}}
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}], **where)
    assert "is not a folder" in project.pnp("run", code=2)


def test_torn_and_foreign_lines_in_the_lists_do_no_harm(done: Project) -> None:
    for name in ("failures.jsonl", "metadata.jsonl"):
        with (done.output / name).open("a") as file:
            file.write('{"file_name": "x"}\nnot json\n{"torn')
    (done.output / "progress.json").write_text('{"torn')
    done.pnp("status")
    done.pnp("run")
    assert "never ran" not in done.pnp("status")


def test_a_dry_run_without_a_readable_picture(project: Project) -> None:
    (project.folder / "a.png").write_text("nonsense")
    project.write([{"image": "a.png", "prompts": PROMPTS}])
    assert "to compute: 2 results" in project.pnp("run", "--dry-run")


def test_the_wrong_device_is_a_wrong_word(done: Project) -> None:
    assert "auto, all, cpu, cuda" in done.pnp("run", "--devices", "toaster", code=2)


def test_status_of_a_large_plan_is_what_its_run_counted(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}]).pnp("run")
    path, source = project.output / "progress.json", project.folder / "a.png"
    path.write_text(json.dumps(project.progress() | {"translations": 30_000, "done": 29_998, "failed": 2}))
    source.rename(project.folder / "away")  # a plan that were made now would fail
    printed = project.pnp("status")
    assert "29998 done, 2 failed, 0 to go through" in printed and "--exact" in printed and "last run:" in printed
    project.pnp("status", "--exact", code=2)
    project.pnp("status", "--json", code=2)
    path.write_text(
        json.dumps(project.progress() | {"done": 2})
    )  # it was stopped: what lay there before is not counted
    project.pnp("status", code=2)
    path.write_text(json.dumps(project.progress() | {"done": 29_998}))
    rewrite(project, guidance_scale=6.0)  # another manifest, whose results are not these
    project.pnp("status", code=2)
    (project.folder / "away").rename(source)
    assert "stage" in project.pnp("status")


def test_a_run_in_the_folder_of_its_pictures_takes_nothing_of_its_own_for_an_input(project: Project) -> None:
    project.picture("a.png")
    (project.folder / "a.txt").write_text("a cat")
    (project.folder / "frames").mkdir()
    project.picture("frames/0.png", 1)
    clip = {"video": "frames", "container": "frames", "prompts": ["a dog"]}
    project.write([{"images": "."}, clip | {"container": "gif"}, clip], output_dir=".")
    (project.folder / "frames/0.txt").write_text("a horse")
    first = project.pnp("run")
    project.pnp("inspect trajectory", "--input", "a.png", "--timesteps", "1")
    assert "4 of 4 results" in first
    assert "4 of 4 results are there (0 computed now" in project.pnp("run")


@pytest.mark.parametrize("model", ["./nowhere", "owner/name"])  # the one is wrong, the other cannot be had
def test_what_is_wrong_with_the_model_and_with_the_pictures_is_said_at_once(project: Project, model: str) -> None:
    project.write([{"image": "gone.png", "prompts": PROMPTS}], model=model)
    outcome = subprocess.run(
        program("validate", str(project.manifest)),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 2 and "2 problems found" in outcome.stderr
    assert ": model: " in outcome.stderr and "no such file" in outcome.stderr


@pytest.mark.parametrize("place", ["long" * 100, "new/" + "long" * 100, "deep/" * 1000])
def test_places_with_names_that_are_too_long_are_found_before_anything_starts(project: Project, place: str) -> None:
    inputs = [{"image": project.picture("a.png"), "prompts": ["a cat"]}]
    project.write(inputs, output_dir=place)
    assert project.pnp("validate", code=2).count("does not allow names as long as this") == 1
    project.write(inputs, run={"store": place})
    assert "run.store: the file system does not allow names" in project.pnp("run", code=2)


@pytest.mark.parametrize("verb", ["status", "report", "store ls"])
def test_verbs_that_check_no_manifest_name_a_place_with_too_long_a_name(project: Project, verb: str) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": ["a cat"]}], output_dir="long" * 100)
    assert "File name too long" in project.pnp(verb, code=3)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
@pytest.mark.parametrize("keys", [{"output_dir": "/proc/nothing/x"}, {"run": {"store": "/proc/nothing/x"}}])
def test_a_place_where_nothing_can_be_made_is_the_machines_fault(project: Project, keys: dict[str, Any]) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": ["a cat"]}], **keys)
    for verb in ("run", "status", "evaluate"):
        assert "stopped: /proc/nothing: No such file or directory" in project.pnp(verb, code=3)


def test_init_makes_the_folder_and_writes_over_nothing(project: Project) -> None:
    new, link = project.folder / "new/folder/x.yaml", project.folder / "link.yaml"
    assert f"wrote {new}" in initialised(new, code=0)
    assert new.read_text().startswith("#")
    link.symlink_to("nowhere")
    for taken in (new, project.folder, link):
        assert "exists; name another file" in initialised(taken, code=2)
    assert "cannot be a file" in initialised(new / "x.yaml", code=2)
    assert "File name too long" in initialised(project.folder / ("x" * 300), code=3)


def initialised(path: Path, code: int) -> str:
    outcome = CliRunner().invoke(app, ["init", str(path)])
    assert outcome.exit_code == code, outcome.output
    return " ".join(outcome.output.replace("\u2502", "").split())


def test_the_store_is_listed_and_cleared_while_others_remove_from_it(done: Project) -> None:
    one, other = sorted(done.store.glob("translate/??/*"))[:2]
    (one / "link").symlink_to("nowhere")
    assert "translate          4 artifacts" in done.pnp("store ls")
    done.write([{"image": "a.png", "prompts": [PROMPTS[0]]}])
    (done.store / "corrupt").mkdir()
    (done.store / "corrupt/link").symlink_to(done.store)  # what it leads to stays
    assert "would free" in done.pnp("store gc", "--unused", "--dry-run")
    done.pnp("store gc", "--unused")
    assert len([*done.store.glob("translate/??/*")]) == 1
    assert not [*done.store.glob("*/.tmp-*"), *done.store.glob("corrupt/*")]
    gone = ArtifactStore(done.store)
    gone.remove(other)  # as the one who was slower
    gone.remove(other)
    assert size_of(other) == 0


def test_verify_says_of_each_corrupt_artifact_once(done: Project) -> None:
    for shard in done.store.glob("translate/??/*/result.safetensors"):
        shard.write_bytes(b"no tensors")
    said = subprocess.run(program("store", "verify", str(done.manifest)), capture_output=True, text=True)
    assert said.returncode == 1
    assert "0 were corrupt" not in said.stdout
    assert len(said.stderr.splitlines()) == 4
    assert said.stderr.count("corrupt translate artifact") == 4


def test_a_run_whose_words_nobody_reads_ends_as_any_other(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": ["a cat"]}])
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(program("run", str(project.manifest)), stdout=writing, stderr=writing)
    os.close(writing)
    assert process.wait() == 0
    assert (project.output / "report.html").exists()
    assert len(project.pictures()) == 1


def test_a_run_that_leaves_a_result_undone_without_a_failure_is_no_success(
    done: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(done.manifest)
    plan = Plan(manifest, resolve(manifest.model, manifest.base))
    counted = dict.fromkeys(("failed", "inverted", "translated", "rows", "passed", "saved", "flagged", "not_judged"), 0)
    summary = Summary(translations=4, done=3, seconds=1.0, corrupt=(), **counted)
    assert conclude(plan, summary, complete=True) == 1
    assert "1 result is not there" in capsys.readouterr().err
    assert conclude(plan, summary, complete=False) == 0


def test_the_version_is_to_be_had() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"pnp-batch {version('pnp-batch')}\n"
