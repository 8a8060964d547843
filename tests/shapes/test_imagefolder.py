"""`shapes render`: what it writes is what the scenes are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pnp_batch.cli import app
from pnp_batch.shapes.clips import clip
from pnp_batch.shapes.imagefolder import rendering, write_clips, write_scenes
from pnp_batch.shapes.scenes import VOCABULARY, caption, random_scene, render


def rendered(folder: Path, *options: str, code: int = 0) -> str:
    outcome = CliRunner().invoke(app, ["shapes", "render", str(folder), *options])
    assert outcome.exit_code == code, outcome.output
    return outcome.output


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rendered(tmp_path / name, "--count", "5", "--seed", "40")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    rendered(tmp_path / "c", "--count", "2", "--seed", "43")
    new = {name for name, data in files(tmp_path / "c").items() if files(tmp_path / "a").get(name) != data}
    assert new == {"metadata.jsonl", ".rendering"}


def test_rows_say_what_the_pictures_show(tmp_path: Path) -> None:
    rendered(tmp_path / "a", "--count", "3", "--seed", "7", "--size", "32")
    rows = [json.loads(line) for line in (tmp_path / "a/metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [7, 8, 9]
    for row in rows:
        scene = random_scene(row["seed"])
        picture, mask = render(scene, 32)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / row["file_name"])), picture)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a" / row["mask_file_name"])), mask)
        assert row["caption"] == caption(scene)
        assert {part: row[part] for part in VOCABULARY} == {part: getattr(scene, part) for part in VOCABULARY}


def test_clips_move_as_their_rows_say(tmp_path: Path) -> None:
    for name in ("a", "b"):
        rendered(tmp_path / name, "--clips", "--count", "2", "--frames", "5", "--seed", "3")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    rows = [json.loads(line) for line in (tmp_path / "a/metadata.jsonl").read_text().splitlines()]
    for row in rows:
        made = clip(row["seed"], 5)
        reader = imageio_ffmpeg.read_frames(str(tmp_path / "a" / row["file_name"]))
        meta = next(reader)
        assert (meta["size"], meta["fps"]) == ((64, 64), 8)
        frames = [np.frombuffer(frame, np.uint8).reshape(64, 64, 3) for frame in reader]
        assert len(frames) == 5
        for frame, truth in zip(frames, made.frames, strict=True):
            assert np.abs(frame.astype(int) - truth).mean() < 8
        masks = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a" / row["masks"]).glob("*.png"))]
        assert np.array_equal(np.stack(masks), made.masks)
        assert np.allclose(row["motion"], made.motion)


def test_nothing_is_written_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in rendered(tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "names", "about"),
    [
        ((), lambda folder: write_scenes(folder, 4), "4 scenes from seed 0, size 64"),
        (
            ("--clips", "--frames", "3"),
            lambda folder: write_clips(folder, 4, frames=3),
            "4 clips from seed 0, size 64, 3 frames",
        ),
    ],
)
def test_a_rendering_that_was_stopped_goes_on(
    tmp_path: Path, options: tuple[str, ...], names: Callable[[Path], Iterator[str]], about: str
) -> None:
    with pytest.raises(KeyboardInterrupt), rendering(tmp_path / "a", about):
        for _, _ in zip(range(2), names(tmp_path / "a"), strict=False):
            pass
        raise KeyboardInterrupt
    first = min(path for path in (tmp_path / "a").rglob("*0000.*") if path.is_file())
    before = first.stat().st_mtime_ns
    assert "not empty" in rendered(tmp_path / "a", "--count", "5", *options, code=2)  # this would be another folder
    rendered(tmp_path / "a", "--count", "4", *options)
    rendered(tmp_path / "b", "--count", "4", *options)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert first.stat().st_mtime_ns == before
    assert "all there already" in rendered(tmp_path / "a", "--count", "4", *options)
    assert "not empty" in rendered(tmp_path / "a", "--count", "3", *options, code=2)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_is_no_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in rendered(tmp_path / place, "--count", "1", code=2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "lost"),
    [((), ("images/00000000.png", "masks/00000001.png")), (("--clips",), ("videos/00000000.mp4", "masks/00000001"))],
)
def test_what_was_removed_of_a_rendering_is_drawn_again(
    tmp_path: Path, options: tuple[str, ...], lost: tuple[str, ...]
):
    rendered(tmp_path / "a", "--count", "3", *options)
    whole = files(tmp_path / "a")
    for name in lost:
        path = tmp_path / "a" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
        assert "all there" not in rendered(tmp_path / "a", "--count", "3", *options)
        assert files(tmp_path / "a") == whole
