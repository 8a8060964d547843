"""`run --source / --prompt / --key`: just the results that are meant."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from running import Project

PROMPTS = ["a bronze statue", "a pink toy"]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    return project.write([{"image": project.picture(f"{n}.png", i), "prompts": PROMPTS} for i, n in enumerate("ab")])


def test_by_source_and_prompt(project: Project) -> None:
    project.pnp("run", "--source", "b.png")
    assert [(row["source"], row["prompt"]) for row in project.rows()] == [("b.png", prompt) for prompt in PROMPTS]
    project.pnp("run", "--source", "a.png", "--prompt", PROMPTS[1])
    assert project.rows()[-1]["source"] == "a.png" and len(project.rows()) == 3
    project.pnp("run", "--prompt", PROMPTS[0])
    assert len(project.rows()) == 4


def test_the_end_of_a_path_is_enough_where_it_is_the_only_one(project: Project) -> None:
    names = ["new/horse.png", "new/seahorse.png", "old/deep/cat.png", "old/cat.png"]
    inputs = [{"image": str(project.folder / project.picture(name, i)), "prompts": "x"} for i, name in enumerate(names)]
    project.write(inputs)
    project.pnp("run", "--source", "horse.png")
    project.pnp("run", "--source", "./deep/cat.png")
    whole = [str(project.folder / name) for name in names]
    assert [row["source"] for row in project.rows()] == [whole[0], whole[2]]
    said = project.pnp("run", "--source", "cat.png", code=2)
    assert f"'cat.png' may be any of {whole[3]}, {whole[2]}; write more of the path" in said
    assert "this manifest has no 'orse.png'" in project.pnp("run", "--source", "orse.png", code=2)


def test_the_command_of_the_report_makes_just_that_result_again(project: Project) -> None:
    project.pnp("run")
    row, pictures = project.rows()[2], project.pictures()
    commands = re.findall(r'data-copy="(pnp-batch run [^"]*)"', (project.output / "report.html").read_text())
    command = next(command for command in commands if row["key"][:16] in command)
    assert shlex.split(command)[:3] == ["pnp-batch", "run", str(project.manifest)]
    shutil.rmtree(project.store / "translate")
    shutil.rmtree(project.output / "images")
    said = project.pnp("run", *shlex.split(command)[3:])
    assert "1 of 1 result is there (1 computed now" in said
    assert list(project.pictures()) == [row["file_name"]]
    project.pnp("run", "--key", row["key"][:10].upper())
    project.pnp("run")
    assert set(project.pictures()) == set(pictures)


def test_the_other_failures_stay_listed(project: Project) -> None:
    for name in "ab":
        (project.folder / f"{name}.png").write_text("no picture")
    project.pnp("run", code=1)
    project.picture("a.png")
    project.pnp("run", "--source", "a.png")
    assert {row["source"] for row in project.failures()} == {"b.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "aa.png"], "--source: this manifest has no 'aa.png'; did you mean 'a.png'?"),
        (["--prompt", "a pink to"], "--prompt: this manifest has no 'a pink to'; did you mean 'a pink toy'?"),
        (["--key", ""], "the beginning of a key is four or more of the digits 0-9 and a-f, not ''"),
        (["--key", "00000000"], "no result of this manifest has --key '00000000'"),
        (["--source", "a.png", "--key", "00000000"], "no result of this manifest has --source 'a.png' and --key '0000"),
    ],
)
def test_nothing_that_fits_is_a_mistake(project: Project, options: list[str], message: str) -> None:
    assert message in project.pnp("run", *options, code=2)
    assert not (project.output / "progress.json").exists()
