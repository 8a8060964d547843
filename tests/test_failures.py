"""What failed stays listed until it is done, is called what it was called, and can be tried again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from running import TINY_SD, Project, program
from typer.testing import CliRunner

from pnp_batch.cli import app

TOO_MUCH = {"prompt": "a doll", "guidance_scale": 1e38}  # no number of any precision holds what comes of it


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "project").mkdir()
    return Project(tmp_path / "project")


def run_failed(project: Project, code: int = 0) -> None:
    outcome = CliRunner().invoke(app, ["run", str(project.output / "failed.yaml")])
    assert outcome.exit_code == code, outcome.output


def test_a_stage_that_goes_well_leaves_the_failures_of_later_ones_listed(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": [TOO_MUCH]}])
    project.pnp("run", code=1)
    failures = project.failures()
    project.pnp("run", "--only", "invert")
    assert project.failures() == failures and len(failures) == 1
    assert "0 of 1 result is there" in project.pnp("run", "--retry-failed", code=1)


def test_lists_that_were_torn_within_a_letter_do_no_harm(project: Project) -> None:
    (project.folder / "ü.png").write_text("nonsense")
    project.write([{"image": name, "prompts": ["ein Pferd"]} for name in ("ü.png", project.picture("ä.png"))])
    project.pnp("run", code=1)
    whole = project.failures(), project.rows()
    for name, letter in (("failures.jsonl", "ü"), ("metadata.jsonl", "ä")):
        path = project.output / name
        path.write_bytes(path.read_bytes().split(letter.encode())[0] + letter.encode()[:1])
    project.pnp("status")
    project.pnp("report")
    project.pnp("run", code=1)
    assert (project.failures(), project.rows()) == whole


def test_in_failed_yaml_a_picture_is_called_as_in_the_manifest(project: Project) -> None:
    (project.folder / "model").symlink_to(TINY_SD)
    names = [project.picture("photos/good.png"), "photos/sub/b.png", "other/c.png", str(project.folder / "d.png")]
    inputs = [{"images": "photos"}, {"image": names[2]}, {"images": names[3:]}]
    for name in names[1:]:
        project.picture(name, seed=1)  # the same pixels: three rows nevertheless
        (project.folder / name).write_text("nonsense")
    project.write([each | {"prompts": ["a doll"]} for each in inputs], model="model", run={"store": "kept"})
    project.pnp("run", code=1)
    failed = (project.output / "failed.yaml").read_bytes()
    run_failed(project, code=1)
    assert [row["source"] for row in project.failures()] == names[1:]
    assert (project.output / "failed.yaml").read_bytes() == failed
    for name in names[1:]:
        project.picture(name, seed=1)
    run_failed(project)
    project.pnp("run")
    assert sorted(row["source"] for row in project.rows()) == sorted(names)
    assert not project.failures() and not project.store.exists()


def test_a_project_that_was_moved_knows_its_failures(project: Project) -> None:
    (project.folder / "a.png").write_text("nonsense")
    project.write([{"image": "a.png", "prompts": ["a doll"]}])
    project.pnp("run", code=1)
    moved = Project(project.folder.rename(project.folder.with_name("moved")))
    moved.picture("a.png")
    said = moved.pnp("run", "--retry-failed")
    assert "1 of 1 result is there" in said and "left alone" not in said
    assert not moved.failures()


def test_listed_failures_that_the_manifest_no_longer_names_are_not_passed_over_in_silence(project: Project) -> None:
    (project.folder / "a.png").write_text("nonsense")
    project.write([{"image": "a.png", "prompts": ["a doll", "a toy"]}])
    project.pnp("run", code=1)
    project.write([{"image": "a.png", "prompts": ["a doll", "a cat"]}])
    assert "1 of 2 listed failures: no result of this manifest" in project.pnp("run", "--retry-failed", code=1)
    assert len(project.failures()) == 2


def test_one_file_under_two_names_is_one_result(project: Project) -> None:
    names = [project.picture("a.png"), str(project.folder / "a.png")]
    project.write([{"image": name, "prompts": ["a doll"]} for name in names])
    assert "already translated to 'a doll'" in project.pnp("validate", code=2)


def test_a_file_that_is_gone_does_not_keep_failed_yaml_from_the_others(project: Project) -> None:
    project.picture("photos/good.png")
    (project.folder / "photos/broken.png").write_text("nonsense")
    (project.folder / "photos/dangling.png").symlink_to("nowhere")
    os.mkfifo(project.folder / "photos/pipe.png")
    project.write([{"images": "photos", "prompts": ["a doll"]}])
    project.pnp("run", code=1)
    failed = [row["source"] for row in project.failures()]
    assert failed == [f"photos/{name}.png" for name in ("broken", "dangling", "pipe")]
    (project.folder / "photos/pipe.png").unlink()
    project.picture("photos/broken.png", seed=1)
    run_failed(project, code=1)
    assert [row["source"] for row in project.failures()] == failed[1:]
    assert {row["source"] for row in project.rows()} == {"photos/good.png", "photos/broken.png"}


def test_failures_in_a_folder_whose_name_is_no_text_are_listed_like_any_other(project: Project) -> None:
    odd = Project(project.folder / os.fsdecode(b"\xff"))
    odd.folder.mkdir()
    (odd.folder / "a.png").write_text("nonsense")
    odd.write([{"image": "a.png", "prompts": ["a doll"]}])
    for _ in range(2):  # the second one reads what the first one wrote
        ended = subprocess.run(
            program("run", str(odd.manifest)), env={**os.environ, "LC_ALL": "C"}, capture_output=True
        )
        assert ended.returncode == 1, ended.stderr
    (failure,) = odd.failures()
    assert failure["source"] == "a.png" and (odd.output / failure["traceback"]).read_text()
