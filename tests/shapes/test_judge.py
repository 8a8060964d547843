"""The judge that the benchmark rests on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pnp_batch.cli import app
from pnp_batch.errors import ModelError
from pnp_batch.shapes.judge import WEIGHTS, accuracy, iou, load_judge, read
from pnp_batch.shapes.scenes import HELD_OUT, VOCABULARY, random_scene, render, sample_scenes


def test_it_is_right_on_scenes_it_never_saw() -> None:
    figures = accuracy(load_judge(), count=64)
    assert figures["mask_iou"] > 0.93
    assert all(figures[part] >= 0.98 for part in VOCABULARY)


def test_it_reads_the_sample_scenes() -> None:
    scenes = list(sample_scenes().values())
    for scene, reading in zip(scenes, read(load_judge(), [render(scene)[0] for scene in scenes]), strict=True):
        assert reading.words == {part: getattr(scene, part) for part in VOCABULARY}
        assert iou(reading.mask, render(scene)[1] > 127) > 0.9


def test_a_reading_does_not_depend_on_its_neighbours() -> None:
    pictures = [render(random_scene(HELD_OUT + i))[0] for i in range(70)]
    together, alone = read(load_judge(), pictures), [read(load_judge(), [picture])[0] for picture in pictures[62:66]]
    for one, other in zip(together[62:66], alone, strict=True):
        assert one.words == other.words
        assert iou(one.mask, other.mask) > 0.99


def test_intersection_over_union() -> None:
    left, right = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert iou(left, right) == 1.0
    left[:, :2] = right[:, 1:3] = True
    assert iou(left, right) == pytest.approx(1 / 3)


def test_all_weights_stay_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.parent.rglob("*.safetensors")) < 20e6


def judge(*arguments: str, code: int = 0) -> str:
    outcome = CliRunner().invoke(app, ["shapes", "judge", *arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome.output


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_training_one_from_the_command_line(tmp_path: Path, dtype: str) -> None:
    target = tmp_path / "judge.safetensors"
    said = judge(str(target), "--steps", "2", "--dtype", dtype, "--devices", "cpu")
    assert "judge 2/2" in said
    assert "mask IoU" in said
    assert ("the faster is used" in said) == (dtype == "auto")
    assert load_judge(target).mask.weight.shape == load_judge().mask.weight.shape


@pytest.mark.parametrize("place", [".", "file/judge.safetensors"])
def test_a_judge_is_written_to_a_file(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be a file" in judge(str(tmp_path / place), "--steps", "1", code=2)


def test_what_is_no_judge_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no weights")
    unet = WEIGHTS.parent / "pipeline/unet/diffusion_pytorch_model.safetensors"
    for path in (tmp_path / "missing", tmp_path / "text", tmp_path, unet):
        with pytest.raises(ModelError, match="is no judge"):
            load_judge(path)
