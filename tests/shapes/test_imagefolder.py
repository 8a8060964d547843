"""`shapes render`: what it writes is what the scenes are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from pnp_batch.cli import app
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
    assert new == {"metadata.jsonl"}


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


def test_nothing_is_written_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in rendered(tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
