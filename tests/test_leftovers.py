"""Results that left the manifest: counted, marked, and removed on request; whatever is still asked for stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import Project

from pnp_batch.engines.run import only_run

KEY = "0123456789abcdef" * 4
PROMPTS = ["a bronze statue", "a pink toy"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_results_whose_prompt_left_the_manifest_are_counted_marked_and_removed(project: Project) -> None:
    picture = project.picture("a.png")
    project.write([{"image": picture, "prompts": PROMPTS}]).pnp("run")
    everything = project.pictures()
    project.write([{"image": picture, "prompts": PROMPTS[:1]}])
    said = "1 result in the folder is no longer in the manifest"
    assert said in project.pnp("status") and json.loads(project.pnp("status", "--json"))["leftovers"] == 1
    assert said in project.pnp("run")
    page = (project.output / "report.html").read_text()
    assert page.count('<p class="leftover">') == 1 and '<select id="manifest">' in page

    would = project.pnp("prune", "--dry-run")
    assert "a-pink-toy" in would and "would remove 1 result" in would and project.pictures() == everything
    assert "removed 1 result" in project.pnp("prune")
    assert [row["prompt"] for row in project.rows()] == PROMPTS[:1] and len(project.pictures()) == 1
    assert 'id="manifest"' not in (project.output / "report.html").read_text()
    assert "no longer" not in project.pnp("status")

    project.write([{"image": picture, "prompts": PROMPTS}]).pnp("run")  # out of the store
    assert project.progress()["rows"] == 0 and project.pictures() == everything


def test_leftovers_can_be_looked_for_while_a_run_is_at_work(project: Project) -> None:
    picture = project.picture("a.png")
    project.write([{"image": picture, "prompts": PROMPTS}]).pnp("run")
    project.write([{"image": picture, "prompts": PROMPTS[:1]}])
    with only_run(project.output):
        assert "would remove 1 result" in project.pnp("prune", "--dry-run")
        assert "another run" in project.pnp("prune", code=3)


def test_what_is_asked_for_stays_whoever_made_it(project: Project) -> None:
    """Other dtypes, attempts of the quality gate, generated pictures, sizes and layers that the model decides."""
    inputs = [
        {"image": project.picture("a.png"), "prompts": [PROMPTS[0], {"prompt": PROMPTS[0], "height": 32}]},
        {"image": project.picture("b.png", 1), "prompts": [{"prompt": "a cat", "method": "sdedit"}]},
        {"image": "b.png", "num_inversion_steps": 10, "prompts": [{"prompt": "a dog", "inversion_tolerance": 0.1}]},
        {"generate": {"prompt": "a cup", "seed": 3}, "prompts": ["a jug"]},
    ]
    rule = {"min_psnr": 10, "retry": [{"guidance_scale": 1, "width": 96}]}
    project.write(inputs, quality=rule).pnp("run")
    project.write(inputs, quality=rule, run={"dtype": "bfloat16"}).pnp("run")
    assert len(project.rows()) == 10
    assert any(row["width"] == 96 for row in project.rows())
    inputs[2]["prompts"] = ["a dog"]  # the tolerance means nothing to ddim and is in no key
    project.write(inputs, quality=rule)
    assert "removed 0 results" in project.pnp("prune") and len(project.rows()) == 10


def test_a_result_stays_by_whatever_path_its_picture_is_named_now(project: Project) -> None:
    """Pictures and videos; once a run wrote the rows of their new names, those of the old ones go, and the files stay."""
    for n in range(2):
        project.picture(f"frames/{n}.png", n)
    kinds = [("image", project.picture("a.png")), ("video", "frames")]
    project.write([{kind: str(project.folder / name), "prompts": PROMPTS[:1]} for kind, name in kinds]).pnp("run")
    files = {path for path in project.output.glob("*/*--*")}
    project.write([{kind: name, "prompts": PROMPTS[:1]} for kind, name in kinds])
    assert "no longer" not in project.pnp("status") and "removed 0 results" in project.pnp("prune")
    assert "2 results in the folder" in project.pnp("run")
    assert "removed 2 results" in project.pnp("prune")
    assert {row["source"] for row in project.rows()} == {"a.png", "frames"} and len(project.rows()) == 2
    assert len(files) == 2 and all(path.exists() for path in files)


def test_a_result_stays_whose_row_an_earlier_version_wrote(project: Project) -> None:
    """It said how a generated picture would have been inverted, and not how it was generated."""
    project.write([{"generate": {"prompt": "a cup"}, "prompts": PROMPTS[:1]}]).pnp("run")
    (row,) = project.rows()
    del row["generate"]
    (project.output / "metadata.jsonl").write_text(json.dumps(row | {"inversion_prompt": ""}) + "\n")
    assert "removed 0 results" in project.pnp("prune")


def test_a_file_stays_for_whoever_else_needs_it_and_foreign_rows_and_files_are_left_alone(project: Project) -> None:
    project.picture("x/a.png")
    project.picture("y/a.png")  # the same pixels and name: the same file
    project.write([{"image": f"{folder}/a.png", "prompts": PROMPTS[:1]} for folder in "xy"]).pnp("run")
    (project.output / "images/mine.png").write_bytes(b"mine")
    foreign = [{"file_name": "images/mine.png"}, {"file_name": f"images/../../a--b-{KEY[:10]}.png", "key": KEY}, {}]
    with (project.output / "metadata.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in foreign)
    files = project.pictures()
    project.write([{"image": "y/a.png", "prompts": PROMPTS[:1]}])
    assert "removed 1 result" in project.pnp("prune")
    assert project.pictures() == files and [row.get("source") for row in project.rows()] == [
        "y/a.png",
        None,
        None,
        None,
    ]


def test_results_of_a_picture_that_cannot_be_read_any_more_stay(project: Project) -> None:
    inputs = [{"image": project.picture("a.png"), "prompts": PROMPTS, "missing": "fail"}]
    project.write(inputs, defaults={"height": None, "width": None}).pnp("run")
    (project.folder / "a.png").unlink()
    assert "removed 0 results" in project.pnp("prune")


def test_the_list_of_failures_is_no_measure_of_what_is_asked_for(project: Project) -> None:
    (project.folder / "b.png").write_text("nonsense")
    project.write([{"image": name, "prompts": PROMPTS} for name in (project.picture("a.png"), "b.png")])
    project.pnp("run", code=1)
    failed = Project(project.folder)
    (project.folder / "again.yaml").write_text((project.output / "failed.yaml").read_text())
    from typer.testing import CliRunner

    from pnp_batch.cli import app

    for verb in ("run", "status", "prune"):
        outcome = CliRunner().invoke(app, [verb, str(project.output / "failed.yaml")])
        assert "no longer" not in outcome.output, outcome.output
    assert len(failed.rows()) == 2


def test_videos_are_results_as_well(project: Project) -> None:
    (project.folder / "frames").mkdir()
    for n in range(2):
        project.picture(f"frames/{n}.png", n)
    clips = [{"video": "frames", "container": kind, "prompts": ["a dog"]} for kind in ("gif", "frames")]
    project.write(clips).pnp("run")
    assert "removed 0 results" in project.pnp("prune")
    folder = next((project.output / "videos").glob("frames--a-dog-??????????"))
    (folder / "notes.txt").write_text("mine")
    project.write(clips[:1])
    assert "removed 1 result" in project.pnp("prune")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert [row["container"] for row in project.rows()] == ["gif"]
    project.write([{**clips[0], "max_frames": 1}])
    assert "would remove 1 result" in project.pnp("prune", "--dry-run")


def test_the_manifests_of_one_folder_are_pruned_together(project: Project) -> None:
    picture = project.picture("a.png")
    manifests = [Project(project.folder), project]
    project.write([{"image": picture, "prompts": PROMPTS[:1]}]).pnp("run")
    other = manifests[0].manifest.rename(project.folder / "other.yaml")
    project.write([{"image": picture, "prompts": PROMPTS[1:]}]).pnp("run")
    assert "removed 0 results" in project.pnp("prune", str(other))
    assert "removed 1 result" in project.pnp("prune")


def test_the_report_of_a_folder_whose_pictures_are_gone_marks_nothing(project: Project) -> None:
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}]).pnp("run")
    (project.folder / "a.png").unlink()
    assert "are not marked" in project.pnp("report")
