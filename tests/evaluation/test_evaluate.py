"""`pnp-batch evaluate` on real runs with tiny backbones: the contract, the cache, missing weights, NaN, masks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from films import film
from PIL import Image
from running import Project
from safetensors.torch import load_file, save_file
from tiny_backbones import save_clip, save_dino, save_lpips
from typer.testing import CliRunner

from pnp_batch.cli import app
from pnp_batch.evaluation.closed_forms import mse, psnr, ssim
from pnp_batch.store import ArtifactStore

CONTRACT = {
    *("file_name", "source", "prompt", "method", "psnr", "mse", "ssim", "lpips", "structure_distance"),
    *("clip_similarity", "text_gain", "shift_x", "shift_y", "scale", "reconstruction_psnr"),
}
BACKBONES = {"dino": "dino", "clip": "clip", "lpips": "lpips.safetensors"}
INPUTS = [
    {"image": "a.png", "prompts": ["a red star", "a blue heart"]},
    {"image": "wide.png", "prompts": ["a red star"], "width": 96},
    {"generate": {"prompt": "a star", "seed": 1, "num_inference_steps": 5}, "prompts": ["a gold star"]},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with backbones beside it."""
    folder = tmp_path_factory.mktemp("run")
    project = Project(folder)
    project.picture("a.png", 1)
    project.picture("wide.png", 2, (96, 64))
    save_dino(folder / "dino")
    save_clip(folder / "clip")
    save_lpips(folder / "lpips.safetensors")
    project.write(INPUTS).pnp("run")
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Project:
    """A copy of it to change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Project(tmp_path)


def evaluated(project: Project, *options: str, **evaluation: Any) -> tuple[list[dict[str, Any]], str]:
    project.write(INPUTS, evaluation=evaluation)
    said = project.pnp("evaluate", "--json", str(project.folder / "scores.json"), *options)
    return json.loads((project.folder / "scores.json").read_text()), said


def kept(project: Project) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (project.store / "evaluate").rglob("meta.json")}


def test_one_row_per_result_with_every_number(project: Project) -> None:
    rows, said = evaluated(project, **BACKBONES)
    by_file = {row["file_name"]: row for row in project.rows()}
    assert [row["file_name"] for row in rows] == list(by_file)
    store = ArtifactStore(project.store)
    for row in rows:
        assert set(row) >= CONTRACT
        meta = by_file[row["file_name"]]
        assert (row["source"], row["prompt"], row["method"]) == (meta["source"], meta["prompt"], "pnp")
        artifact = store.find("translate", meta["key"])
        assert artifact is not None
        trajectory = store.find("invert", artifact.meta["trajectory"])
        assert trajectory is not None
        source = trajectory.load("preview")["source"]
        result = np.asarray(Image.open(project.output / row["file_name"]))
        assert row["mse"] == pytest.approx(mse(source, result))
        assert row["psnr"] == pytest.approx(psnr(row["mse"]))
        assert row["ssim"] == pytest.approx(ssim(source, result))
        if meta.get("reconstruction_psnr") is not None:  # there rounded for reading
            assert row["reconstruction_psnr"] == psnr(mse(source, trajectory.load("preview")["reconstruction"]))
            assert row["reconstruction_psnr"] == pytest.approx(meta["reconstruction_psnr"], abs=0.006)
        assert all(
            isinstance(row[name], float) for name in ("structure_distance", "lpips", "clip_similarity", "text_gain")
        )
    assert rows[-1]["reconstruction_psnr"] is None
    reason = "nothing was inverted: a generated guidance image"
    assert f"reconstruction_psnr, reconstruction_lpips: not computed for 1 result: {reason}" in said


def test_second_time_computes_nothing_and_says_the_same(project: Project) -> None:
    rows, _ = evaluated(project, **BACKBONES)
    before = kept(project)
    # Closed forms, alignment, LPIPS, structure, text, PSNR and LPIPS of the reconstruction.
    assert len(before) == len(rows) * 7
    assert evaluated(project, **BACKBONES)[0] == rows
    assert kept(project) == before


def test_other_weights_are_other_numbers(project: Project) -> None:
    rows, _ = evaluated(project, **BACKBONES)
    file = project.folder / "dino/model.safetensors"
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    again, _ = evaluated(project, **BACKBONES)
    for old, new in zip(rows, again, strict=True):
        assert old["structure_distance"] != new["structure_distance"]
        assert old["clip_similarity"] == new["clip_similarity"]


def test_without_weights_the_rest_is_computed_and_the_reason_said_once(project: Project) -> None:
    rows, said = evaluated(project, dino="no-such-owner/no-such-model", clip="dino")
    assert all(row["structure_distance"] is row["lpips"] is row["clip_similarity"] is None for row in rows)
    assert all(isinstance(row["ssim"], float) for row in rows)
    for part in (
        "cannot get the weights 'no-such-owner/no-such-model'",
        "no weights are named",
        "has no text features",
    ):
        assert said.count(part) == 1


def test_a_folder_that_is_not_there_is_named(project: Project) -> None:
    rows, said = evaluated(project, dino="./weights", metrics=["structure_distance"])
    assert rows[0]["structure_distance"] is None
    assert f"there is no {project.folder / 'weights'}, and './weights' is no hub id" in said


def test_a_backbone_that_fails_on_the_pictures_costs_only_its_own_column(project: Project) -> None:
    config = project.folder / "clip/config.json"
    config.write_text(config.read_text().replace('"num_channels": 3', '"num_channels": 4'))
    rows, said = evaluated(project, clip="clip", metrics=["clip_similarity", "psnr"])
    assert rows[0]["clip_similarity"] is None
    assert rows[0]["psnr"] is not None
    assert "clip_similarity" in said


def test_pickled_weights_are_refused(project: Project) -> None:
    (project.folder / "dino/model.safetensors").rename(project.folder / "dino/pytorch_model.bin")
    rows, said = evaluated(project, dino="dino", metrics=["structure_distance"])
    assert rows[0]["structure_distance"] is None
    assert "holds no .safetensors file" in said


def test_only_the_metrics_that_are_asked_for(project: Project) -> None:
    rows, said = evaluated(project, metrics=["psnr"], dino="nothing")
    assert rows[0]["psnr"] is not None
    assert rows[0]["ssim"] is None
    assert "ssim" not in said
    assert "nothing" not in said


def test_nan_is_counted_and_is_null_in_json(project: Project) -> None:
    file = project.folder / "dino/model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    for _ in range(2):  # computed, then read from the store
        rows, said = evaluated(project, dino="dino", metrics=["structure_distance"])
        assert [row["structure_distance"] for row in rows] == [None] * 4
        assert rows[0]["nan"] == ["structure_distance"]
        line = next(line for line in said.splitlines() if "structure_distance" in line)
        assert line.split()[-3:] == ["0", "4", "0"]


def test_half_precision_weights_are_computed_in_float32(project: Project) -> None:
    file = project.folder / "dino/model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    config = project.folder / "dino/config.json"
    config.write_text(config.read_text().replace('"float32"', '"float16"'))
    rows, _ = evaluated(project, dino="dino", metrics=["structure_distance"])
    assert all(isinstance(row["structure_distance"], float) for row in rows)


def test_masks_of_a_folder(project: Project) -> None:
    (project.folder / "masks").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[:20] = 255
    Image.fromarray(mask).save(project.folder / "masks/a.png")
    rows, said = evaluated(project, masks="masks", **BACKBONES)
    share = 20 / 64
    whole = share * rows[0]["mse_inside"] + (1 - share) * rows[0]["mse_outside"]
    assert whole == pytest.approx(rows[0]["mse"])
    assert rows[0]["lpips_pie"] < rows[0]["lpips"]
    assert rows[2]["mse_inside"] is None
    assert "evaluation.masks holds none for the source" in said


def test_a_mask_over_everything_leaves_pie_bench_no_number(project: Project) -> None:
    (project.folder / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(project.folder / "masks/a.png")
    rows, said = evaluated(project, "--table", masks="masks", **BACKBONES)
    for name in ("psnr_pie", "mse_pie", "ssim_pie", "lpips_pie", "mse_outside"):
        assert rows[0][name] is None
    assert rows[0]["mse_inside"] == rows[0]["mse"] and rows[0]["clip_similarity_inside"] is not None
    assert "the mask leaves nothing there" in said


def test_a_mask_that_cannot_be_read_costs_only_its_own_columns(project: Project) -> None:
    (project.folder / "masks").mkdir()
    (project.folder / "masks/a.png").write_text("no picture")
    Image.new("L", (96, 64)).save(project.folder / "masks/wide.png")
    rows, said = evaluated(project, masks="masks", metrics=["mse", "lpips"])
    assert all(isinstance(row["mse"], float) for row in rows)
    assert rows[0]["mse_outside"] is None and rows[2]["mse_outside"] == pytest.approx(rows[2]["mse"])
    assert "a.png" in said and "for 2 results" in said
    assert "lpips_pie" in rows[0]


def test_what_costs_the_whole_picture_its_number_costs_the_part_outside_the_mask_its_own(project: Project) -> None:
    (project.folder / "masks").mkdir()
    Image.new("L", (64, 64)).save(project.folder / "masks/a.png")
    rows, said = evaluated(project, masks="masks", metrics=["lpips"])
    assert rows[0]["lpips_pie"] is None
    assert "lpips_pie: not computed for 2 results: no weights are named" in said


def test_a_mapping_file_of_another_kind_is_a_mistake_in_the_manifest(project: Project) -> None:
    (project.folder / "mapping_file.json").write_text("[]")
    project.write(INPUTS, evaluation={"masks": "mapping_file.json"})
    assert "is not PIE-Bench's mapping_file.json" in project.pnp("evaluate", code=2)


def test_a_reconstruction_that_was_not_sampled_back_is_called_so(project: Project) -> None:
    shutil.rmtree(project.output)
    project.write(INPUTS, run={"reconstruction": "skipped"}, evaluation={"metrics": ["reconstruction_psnr"]})
    project.pnp("run")
    said = project.pnp("evaluate")
    reason = "the inversion was not sampled back (run.reconstruction: skipped)"
    assert f"reconstruction_psnr: not computed for 3 results: {reason}" in said
    assert "not computed for 1 result: nothing was inverted" in said


def test_a_lost_inversion_is_called_so_and_nothing_is_kept_of_it(project: Project) -> None:
    shutil.rmtree(project.store / "invert")
    wanted = {"metrics": ["psnr", "reconstruction_psnr"]}
    rows, said = evaluated(project, **wanted)
    assert rows[0]["psnr"] is not None and rows[0]["reconstruction_psnr"] is None
    assert "the store no longer holds the inversion" in said
    project.write(INPUTS, evaluation=wanted).pnp("run")
    shutil.rmtree(project.store / "translate")
    project.pnp("run")
    assert isinstance(evaluated(project, **wanted)[0][0]["reconstruction_psnr"], float)


def test_masks_that_are_not_there_are_a_mistake_in_the_manifest(project: Project) -> None:
    project.write(INPUTS, evaluation={"masks": "nowhere"})
    said = project.pnp("evaluate", code=2)
    assert "evaluation.masks: no such folder or mapping file" in said


def test_unknown_words_are_mistakes_in_the_manifest(project: Project) -> None:
    project.write(INPUTS, evaluation={"metrics": ["psrn"], "dinos": "x"})
    said = project.pnp("evaluate", code=2)
    assert "did you mean 'psnr'" in said
    assert "did you mean 'dino'" in said


def test_a_file_that_cannot_be_written_is_said_before_the_work(project: Project) -> None:
    (project.folder / "file").write_text("")
    for name in (".", "file/scores.json"):
        project.write(INPUTS, evaluation={"metrics": ["psnr"]})
        said = project.pnp("evaluate", "--json", str(project.folder / name), code=2)
        assert "cannot be a file: name one in a folder" in " ".join(said.split())
    assert not (project.store / "evaluate").exists()


def test_the_reports_commands_work_from_any_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    outcome = CliRunner().invoke(app, ["report", "manifest.yaml"])
    assert outcome.exit_code == 0
    assert f"pnp-batch run {project.manifest} --key" in (project.output / "report.html").read_text()


def test_videos_are_left_out_and_it_is_said(project: Project) -> None:
    film(project.folder / "clip.mp4", seconds=0.2, sound=False)
    clip = {"video": "clip.mp4", "prompts": ["a red star"]}
    project.write([clip, *INPUTS], evaluation={"metrics": ["psnr"]})
    assert "1 video is left out: only pictures are measured" in project.pnp("evaluate")
    project.write([clip])
    assert "there is nothing to measure: this manifest has no pictures" in project.pnp("evaluate", code=1)


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.picture("a.png")
    project.write(INPUTS[:1])
    assert "there are no results yet" in project.pnp("evaluate", code=1)


def test_a_corrupt_result_is_named_and_the_others_are_measured(project: Project) -> None:
    key = project.rows()[0]["key"]
    shard = project.store / "translate" / key[:2] / key / "result.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    rows, _ = evaluated(project, metrics=["psnr"])
    assert len(rows) == 3  # set aside: the next run makes it again


def test_freeing_space_keeps_the_numbers_of_results_that_are_named(project: Project) -> None:
    evaluated(project, metrics=["psnr"])
    numbers = len(kept(project))
    assert numbers == 4
    project.pnp("store gc", "--unused")
    assert len(kept(project)) == numbers
    project.write(INPUTS[:1]).pnp("store gc", "--unused")
    assert len(kept(project)) == 2


def test_without_the_trajectory_the_source_is_decoded_again(project: Project) -> None:
    rows, _ = evaluated(project, metrics=["psnr"])
    shutil.rmtree(project.store / "evaluate")
    shutil.rmtree(project.store / "invert")
    again, said = evaluated(project, metrics=["psnr"])
    assert [row["psnr"] for row in again[:3]] == [row["psnr"] for row in rows[:3]]
    assert again[3]["psnr"] is None  # a generated guidance image is nowhere else
    assert "a picture cannot be read" in said


def test_table_in_the_layout_of_pie_bench(project: Project) -> None:
    _, said = evaluated(project, "--table", **BACKBONES)
    assert "| Method | Structure distance x10³ ↓ | PSNR ↑" in said
    assert "| pnp " in said
