"""The quality gate on real runs: what it rejects, retries and flags, and that nothing of it depends on how a run went."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import Project, start, wait_for_changes
from safetensors.torch import load_file, save_file
from tiny_backbones import save_clip, save_dino, save_lpips

PROMPTS = ["a red star", "a blue heart"]
INPUTS = [{"image": "a.png", "prompts": PROMPTS}, {"image": "b.png", "prompts": PROMPTS}]
ALL_INJECTED = {"pnp_f_t": 1.0, "pnp_attn_t": 1.0}
BACKBONES = {"dino": "dino", "clip": "clip", "lpips": "lpips.safetensors"}


@pytest.fixture(scope="module")
def ungated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without a gate, with backbones beside it."""
    folder = tmp_path_factory.mktemp("run")
    project = Project(folder)
    for number, name in enumerate("ab"):
        project.picture(f"{name}.png", number + 1)
    save_dino(folder / "dino")
    save_clip(folder / "clip")
    save_lpips(folder / "lpips.safetensors")
    project.write(INPUTS, evaluation=BACKBONES).pnp("run")
    return folder


@pytest.fixture
def project(ungated: Path, tmp_path: Path) -> Project:
    """The same with nothing made yet."""
    shutil.copytree(ungated, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out")
    return Project(tmp_path)


@pytest.fixture(scope="module")
def psnr(ungated: Path) -> list[float]:
    """What the results reach at their own settings, by row."""
    return figures(Project(ungated))


@pytest.fixture(scope="module")
def better(ungated: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What they reach with everything injected."""
    folder = tmp_path_factory.mktemp("better")
    shutil.copytree(ungated, folder, dirs_exist_ok=True)
    project = Project(folder).write(INPUTS, defaults=ALL_INJECTED, evaluation=BACKBONES)
    project.pnp("run")
    return figures(project)


def figures(project: Project) -> list[float]:
    project.pnp("evaluate", "--json", str(project.folder / "scores.json"))
    return [row["psnr"] for row in json.loads((project.folder / "scores.json").read_text())]


def gated(project: Project, *options: str, code: int = 0, **quality: Any) -> str:
    project.write(INPUTS, evaluation=BACKBONES, quality=quality)
    return project.pnp("run", *options, code=code)


def verdicts(project: Project) -> dict[str, Any]:
    """What the store says about each verdict, by the key of the result that stands."""
    read = (json.loads(path.read_text())["content"]["meta"] for path in project.store.glob("judge/*/*/meta.json"))
    return {meta["chosen"]: meta for meta in read}


def between(one: list[float], other: list[float]) -> tuple[int, float]:
    """A result that is better in the second list, and a bound between its two figures."""
    row = int(np.argmax(np.subtract(other, one)))
    assert other[row] > one[row], "the tiny model gives no picture that more injection brings nearer to its source"
    return row, (one[row] + other[row]) / 2


def test_a_threshold_between_the_results_flags_those_below_it_and_exports_all(
    project: Project, ungated: Path, psnr: list[float]
) -> None:
    bound = float(np.mean(sorted(psnr)[1:3]))
    said = gated(project, min_psnr=bound)
    rows = project.rows()
    assert [row["quality"] for row in rows] == ["passed" if value >= bound else "flagged" for value in psnr]
    assert [row["quality_figures"]["psnr"] for row in rows] == pytest.approx(psnr)
    assert "quality: 2 passed (0 of them with a retry's settings), 2 flagged" in said
    flagged = next(row for row in rows if row["quality"] == "flagged")
    assert flagged["quality_reason"] == f"psnr {flagged['quality_figures']['psnr']:.4g} is below {bound:g}"
    assert project.pictures() == Project(ungated).pictures()  # a flagged result is a result


def test_what_fails_is_made_again_with_the_listed_settings_and_one_picture_is_exported(
    project: Project, psnr: list[float], better: list[float]
) -> None:
    number, bound = between(psnr, better)
    said = gated(project, min_psnr=bound, retry=[{"guidance_scale": 5.0}, {"seed": 3}, ALL_INJECTED])
    row = project.rows()[number]
    assert (row["quality"], row["quality_attempt"]) == ("passed", 3)
    assert (row["pnp_f_t"], row["pnp_attn_t"], row["seed"]) == (1.0, 1.0, 0)
    assert row["quality_figures"]["psnr"] == pytest.approx(better[number], rel=1e-3)
    assert len(project.rows()) == len(project.pictures()) == 4
    assert row["key"][:10] in row["file_name"]
    assert "of them with a retry's settings" in said
    attempts = verdicts(project)[row["key"]]["attempts"]
    assert [attempt["number"] for attempt in attempts] == [0, 2, 3]  # the first retry changes nothing: it was not made
    project.pnp("evaluate", "--json", str(project.folder / "scores.json"))
    assert json.loads((project.folder / "scores.json").read_text())[number]["key"] == row["key"]


def test_a_retry_of_another_size_is_measured_at_its_own_size_and_called_by_its_own_method(project: Project) -> None:
    (project.folder / "masks").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(project.folder / "masks/a.png")
    retry = {"method": "sdedit", "height": 96, "width": 128}  # inverts nothing, so it misses nothing
    evaluation = BACKBONES | {"masks": "masks", "metrics": ["mse", "structure_distance"]}
    quality = {"min_reconstruction_psnr": 99, "retry": [retry]}
    project.write(INPUTS[:1], evaluation=evaluation, quality=quality).pnp("run")
    assert {(row["method"], row["width"], row["height"]) for row in project.rows()} == {("sdedit", 128, 96)}
    shutil.rmtree(project.store / "invert")  # the source is decoded again, at the size of what stands
    said = project.pnp("evaluate", "--json", str(project.folder / "scores.json"), "--table")
    for row in json.loads((project.folder / "scores.json").read_text()):
        assert row["method"] == "sdedit"
        assert row["mse"] == pytest.approx((row["mse_inside"] + row["mse_outside"]) / 2)
    assert "| sdedit " in said and "| pnp " not in said


def test_masks_are_not_read_where_no_threshold_asks_for_them(project: Project) -> None:
    project.write(INPUTS, evaluation=BACKBONES | {"masks": "nowhere"}, quality={"min_psnr": 1})
    assert "4 passed" in project.pnp("run")


def test_a_second_run_makes_nothing(project: Project) -> None:
    gated(project, min_psnr=90, retry=[{"pnp_f_t": 0.4}])
    before = project.pictures(), project.tensors(), project.rows()
    assert len(list(project.store.glob("translate/*/*"))) == 8
    said = project.pnp("run")
    assert "0 UNet rows" in said and "4 flagged" in said
    assert (project.pictures(), project.tensors(), project.rows()) == before
    assert "loaded" not in (project.output / "run.log").read_text().rsplit("run of", 1)[1]


def test_a_winner_that_is_lost_is_made_again_to_the_byte(
    project: Project, psnr: list[float], better: list[float]
) -> None:
    number, bound = between(psnr, better)
    gated(project, min_psnr=bound, retry=[{"pnp_f_t": 0.4}, ALL_INJECTED])
    tensors, pictures, rows = project.tensors(), project.pictures(), project.rows()
    key = rows[number]["key"]
    shutil.rmtree(project.store / "translate" / key[:2] / key)
    shutil.rmtree(project.output / "images")
    project.pnp("run")
    assert (project.tensors(), project.pictures(), project.rows()) == (tensors, pictures, rows)


def test_an_added_prompt_judges_and_retries_only_itself(project: Project) -> None:
    gated(project, min_psnr=90, retry=[{"pnp_f_t": 0.4}])
    tensors, known = project.tensors(), set(verdicts(project))
    more = [INPUTS[0] | {"prompts": [*PROMPTS, "a gold ring"]}, INPUTS[1]]
    project.write(more, evaluation=BACKBONES, quality={"min_psnr": 90, "retry": [{"pnp_f_t": 0.4}]}).pnp("run")
    assert project.progress()["rows"] == (4 + 2 * 5) + (2 + 2 * 5)  # own settings and one retry, source rows included
    assert tensors.items() <= project.tensors().items()
    assert len(set(verdicts(project)) - known) == 1


def test_what_only_the_inversion_is_to_blame_for_is_not_retried_with_the_same_inversion(project: Project) -> None:
    retries = [{"pnp_f_t": 0.4}, {"num_inversion_steps": 50, "pnp_f_t": 0.4}]
    gated(project, min_reconstruction_psnr=99, retry=retries)
    tried = [[attempt["number"] for attempt in each["attempts"]] for each in verdicts(project).values()]
    assert tried == [[0, 2]] * 4
    assert len(list(project.store.glob("invert/*/*"))) == 4


def test_every_kind_of_threshold_is_measured(project: Project) -> None:
    project.write(
        INPUTS,
        evaluation=BACKBONES,
        quality={
            **{f"min_{name}": -99 for name in ("psnr", "ssim", "clip", "text_gain", "reconstruction_psnr")},
            **{f"max_{name}": 99 for name in ("mse", "lpips", "reconstruction_lpips")},
            "max_structure_distance": 4,
        },
    ).pnp("run")
    for row in project.rows():
        assert row["quality"] == "passed"
        assert len(row["quality_figures"]) == 9
        assert all(isinstance(value, float) for value in row["quality_figures"].values())


def test_what_cannot_be_measured_is_said_and_neither_passes_nor_is_retried(project: Project) -> None:
    generated = {"generate": {"prompt": "a star", "num_inference_steps": 5}, "prompts": ["a gold star"]}
    quality = {"min_reconstruction_psnr": 1, "retry": [{"pnp_f_t": 0.4}]}
    said = project.write([*INPUTS, generated], evaluation=BACKBONES, quality=quality).pnp("run")
    assert "4 passed" in said and "1 could not be judged" in said
    (row,) = (row for row in project.rows() if row["quality"] == "not judged")
    assert row["prompt"] == "a gold star" and "nothing was inverted" in row["quality_reason"]
    assert row["quality_figures"] == {"reconstruction_psnr": None}


def test_a_figure_that_is_nan_misses_every_threshold(project: Project) -> None:
    file = project.folder / "dino/model.safetensors"
    save_file({name: tensor * math.nan for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert "4 flagged" in gated(project, max_structure_distance=4)
    assert project.rows()[0]["quality_reason"] == "structure_distance nan is no number, not 4"


def test_other_thresholds_are_other_verdicts_on_the_same_results(project: Project) -> None:
    gated(project, min_psnr=90)
    tensors = project.tensors()
    assert "4 passed" in gated(project, min_psnr=1)
    assert project.progress()["rows"] == 0
    assert [row["quality"] for row in project.rows()] == ["passed"] * 4
    project.write(INPUTS).pnp("run")
    assert not any("quality" in row for row in project.rows())
    assert len(project.rows()) == 4 and project.tensors() == tensors


def test_missing_weights_are_said_before_anything_starts(project: Project) -> None:
    project.write(INPUTS, evaluation={"clip": "no-such-owner/no-such-model"}, quality={"min_clip": 0.2})
    for options in ([], ["--dry-run"]):
        said = project.pnp("run", *options, code=3)
        assert "quality.min_clip_similarity needs the weights of evaluation.clip: cannot get the weights" in said
    assert not (project.output / "progress.json").exists() and not project.store.joinpath("invert").exists()


def test_weights_of_the_wrong_kind_stop_the_run_and_keep_what_is_done(project: Project) -> None:
    project.write(INPUTS, evaluation={"clip": "dino"}, quality={"min_clip": 0.2})
    assert "quality.min_clip_similarity cannot be measured: dino: ViTModel has no text features" in project.pnp(
        "run", code=3
    )
    assert not project.output.joinpath("images").exists()
    gated(project, min_clip=-1)
    assert project.progress()["translated"] == 0


def test_a_stage_without_the_gate_says_nothing_of_quality(project: Project) -> None:
    assert "4 flagged" in gated(project, min_psnr=90)
    for stage in ("invert", "assemble"):
        assert "quality:" not in project.pnp("run", "--only", stage)
    assert "quality: 0 passed (0 of them with a retry's settings), 4 flagged" in project.pnp(
        "run", "--only", "translate"
    )


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"max_clip": 1}, "unknown key 'max_clip'; more is better: min_clip"),
        ({"min_clip": 24}, "quality.min_clip_similarity: this is at most 1, not times 100: write 0.24 (got 24"),
        ({"min_ssim": 101}, "quality.min_ssim: this is at most 1 (got 101"),
        ({"max_structure_distance": 60}, "this is at most 4, not times 1000: write 0.06 (got 60"),
        ({"retry": [{"pnp_f_t": 0.5}]}, "quality names no threshold"),
        ({"min_psnr": 20, "retry": [{}]}, "a retry needs at least one setting"),
        ({"min_psnr": 20, "retry": [{"strength": 0.5}]}, "PnP has no strength"),
        ({"min_psnr": 20, "retry": [{"num_inversion_steps": 7}]}, "quality.retry.0.num_inversion_steps"),
        ({"min_psnr": 20, "retry": [{"pnp_f_layers": [99]}]}, "quality.retry.0.pnp_f_layers"),
        ({"max_lpips": 0.5}, "LPIPS needs weights"),
    ],
)
def test_mistakes_are_named_with_their_place(project: Project, quality: Mapping[str, Any], message: str) -> None:
    project.write(INPUTS, quality=quality)
    said = project.pnp("validate", code=2)
    assert message in said
    assert f"{project.manifest}:" in said


def test_a_reconstruction_that_is_not_measured_cannot_be_a_threshold(project: Project) -> None:
    project.write(INPUTS, quality={"min_reconstruction_psnr": 20}, run={"reconstruction": "skipped"})
    assert "the reconstruction is not measured" in project.pnp("run", code=2)


def test_dry_run_says_what_the_gate_may_cost_and_status_what_it_found(project: Project) -> None:
    project.write(INPUTS, evaluation=BACKBONES, quality={"min_psnr": 90, "retry": [{"pnp_f_t": 0.4}]})
    said = project.pnp("run", "--dry-run")
    assert "quality:    4 results to judge; 0 have their verdict" in said
    assert f"at most {2 * (2 + 2 * 2 * 5)} UNet rows" in said
    project.pnp("run")
    assert "quality: 0 passed, 4 flagged, 0 not judged" in project.pnp("status")
    assert json.loads(project.pnp("status", "--json"))["judged"] == {"flagged": 4}
    said = project.pnp("run", "--dry-run")
    assert "0 results to judge; 4 have their verdict" in said and "UNet rows and" not in said


def test_freeing_space_keeps_verdicts_and_attempts(project: Project) -> None:
    gated(project, min_psnr=90, retry=[{"pnp_f_t": 0.4}, {"num_inversion_steps": 50, "pnp_f_t": 0.4}])
    before = sorted(project.store.glob("[ijte]*/*/*"))
    project.pnp("store gc", "--unused")
    assert sorted(project.store.glob("[ijte]*/*/*")) == before


def test_a_corrupt_attempt_is_made_again(project: Project, psnr: list[float], better: list[float]) -> None:
    number, bound = between(psnr, better)
    gated(project, min_psnr=bound, retry=[ALL_INJECTED])
    tensors, key = project.tensors(), project.rows()[number]["key"]
    shard = project.store / "translate" / key[:2] / key / "result.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "corrupt translate artifact" in project.pnp("run")
    assert {name: data for name, data in project.tensors().items() if not name.startswith("corrupt")} == tensors


def test_failed_yaml_is_judged_by_the_same_rule(project: Project) -> None:
    (project.folder / "broken.png").write_text("no picture")
    inputs = [*INPUTS, {"image": "broken.png", "prompts": PROMPTS}]
    quality = {"min_psnr": 1, "max_lpips": 99, "retry": [{"pnp_f_layers": [4]}]}
    project.write(inputs, evaluation=BACKBONES, quality=quality).pnp("run", code=1)
    project.picture("broken.png", 7)
    failed = Project(project.output)
    shutil.move(project.output / "failed.yaml", failed.manifest)
    failed.pnp("run")
    assert [row["quality"] for row in project.rows()] == ["passed"] * 6


@pytest.mark.slow
@pytest.mark.parametrize("changes", [2, 5, 9, 14])
def test_killed_at_many_moments_the_bytes_and_verdicts_are_those_of_an_undisturbed_run(
    project: Project, tmp_path_factory: pytest.TempPathFactory, psnr: list[float], changes: int
) -> None:
    quality = {"min_psnr": float(np.mean(psnr)), "retry": [{"pnp_f_t": 0.4}, ALL_INJECTED]}
    undisturbed = Project(tmp_path_factory.mktemp("undisturbed"))
    shutil.copytree(project.folder, undisturbed.folder, dirs_exist_ok=True)
    for each in (project, undisturbed):
        each.write(
            INPUTS,
            evaluation=BACKBONES,
            quality=quality,
            run={"checkpoint_seconds": 0, "batch_size": 3},
        )
    undisturbed.pnp("run")
    exits = []
    while not exits or exits[-1] != 0:
        process = start(project)
        if len(exits) < 20 and wait_for_changes(project, process, changes):
            process.kill()
        process.join()
        exits.append(process.exitcode)
    assert exits.count(-signal.SIGKILL) >= 2
    assert project.pictures() == undisturbed.pictures()
    assert project.tensors() == undisturbed.tensors()
    assert verdicts(project) == verdicts(undisturbed)
