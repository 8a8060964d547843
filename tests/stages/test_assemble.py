"""Results that are written at once: whatever happens, files and rows are those of a run that wrote one after the other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from running import Project, hazardous, program, run_with_hazard, small_disk

from pnp_batch.ledger import Ledger
from pnp_batch.stages import threads

THREADS = 3
PROMPTS = [f"toy number {i}" for i in range(16)]
ONLY_ASSEMBLE = ("--only", "assemble")


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose results are in the store and not in the output folder."""
    project = Project(tmp_path_factory.mktemp("translated"))
    project.write([{"image": project.picture("a.png"), "prompts": PROMPTS}], run={"max_attempts": 3})
    project.pnp("run", "--only", "invert")
    project.pnp("run", "--only", "translate")
    return project.folder


@pytest.fixture(scope="module")
def one_by_one(translated: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """What one thread makes of it."""
    project = Project(shutil.copytree(translated, tmp_path_factory.mktemp("done") / "one-by-one"))
    project.pnp("run", *ONLY_ASSEMBLE)
    assert len(project.pictures()) == len(PROMPTS) and [row["prompt"] for row in project.rows()] == PROMPTS
    return project


@pytest.fixture
def project(translated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("OMP_NUM_THREADS", str(THREADS))
    return Project(shutil.copytree(translated, tmp_path / "project"))


def ledger_of(project: Project) -> Ledger:
    return Ledger(project.output / "ledger")


def damage(project: Project, key: str) -> None:
    """A flipped byte that neither size nor time tells of."""
    (path,) = (project.store / "translate" / key[:2] / key).glob("*.safetensors")
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_files_and_rows_are_those_of_one_thread_also_where_some_are_there_already(
    project: Project, one_by_one: Project
) -> None:
    project.pnp("run", *ONLY_ASSEMBLE)
    assert project.pictures() == one_by_one.pictures() and project.rows() == one_by_one.rows()
    for row in project.rows()[1::3]:
        (project.output / row["file_name"]).unlink()
    (project.output / "metadata.jsonl").unlink()
    project.pnp("run", *ONLY_ASSEMBLE)
    assert project.pictures() == one_by_one.pictures() and project.rows() == one_by_one.rows()


def test_pictures_with_the_same_pixels_share_results_but_not_files(project: Project) -> None:
    shutil.copy(project.folder / "a.png", project.folder / "b.png")
    project.write([{"images": ["a.png", "b.png"], "prompts": PROMPTS}])
    project.pnp("run")
    assert project.progress()["translated"] == 0 and len(project.pictures()) == 2 * len(PROMPTS)
    assert [row["file_name"] for row in project.rows()] == list(dict.fromkeys(r["file_name"] for r in project.rows()))


def test_corrupt_artifacts_cost_the_others_nothing_and_all_are_made_again_in_the_same_run(
    project: Project, one_by_one: Project
) -> None:
    for place in (1, 2, 9):
        damage(project, one_by_one.rows()[place]["key"])
    printed = project.pnp("run")
    assert printed.count("corrupt translate artifact") == 3
    assert project.pictures() == one_by_one.pictures() and not project.failures()
    assert sorted(row["file_name"] for row in project.rows()) == sorted(one_by_one.pictures())


def test_only_the_corrupt_ones_are_not_written(project: Project, one_by_one: Project) -> None:
    lost = [one_by_one.rows()[place]["prompt"] for place in (1, 2, 9)]
    for place in (1, 2, 9):
        damage(project, one_by_one.rows()[place]["key"])
    project.pnp("run", *ONLY_ASSEMBLE)
    assert [row["prompt"] for row in project.rows()] == [prompt for prompt in PROMPTS if prompt not in lost]


def test_a_folder_that_cannot_be_written_to_ends_the_run_and_blames_no_result(
    project: Project, one_by_one: Project
) -> None:
    (project.output / "images").write_text("in the way")
    assert "cannot write" in project.pnp("run", *ONLY_ASSEMBLE, code=3)
    assert not list(ledger_of(project).marks()) and not list(project.output.rglob(".tmp-*"))
    assert not project.failures()
    (project.output / "images").unlink()
    project.pnp("run", *ONLY_ASSEMBLE)
    assert project.pictures() == one_by_one.pictures() and project.rows() == one_by_one.rows()


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_whole(project: Project, one_by_one: Project) -> None:
    store = project.folder / "store"
    shutil.move(project.store, store)
    shutil.rmtree(project.output)
    with small_disk(project.output, "200k"):
        project.write([{"image": "a.png", "prompts": PROMPTS}], run={"store": str(store)})
        ballast = project.output / "ballast"
        ballast.write_bytes(bytes(100 * 1024))
        assert "No space left" in project.pnp("run", *ONLY_ASSEMBLE, code=3)
        there = project.pictures()
        assert there.items() < one_by_one.pictures().items() and not list(project.output.rglob(".tmp-*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(project.output)], check=True)
        project.pnp("run", *ONLY_ASSEMBLE)
        assert project.pictures() == one_by_one.pictures() and project.rows() == one_by_one.rows()


@pytest.mark.slow
def test_killed_with_several_results_in_hand_the_next_run_ends_with_the_same_bytes(
    project: Project, one_by_one: Project
) -> None:
    middle = one_by_one.rows()[7]["file_name"]
    assert run_with_hazard(project, f"kill {middle}", *ONLY_ASSEMBLE).returncode == -signal.SIGKILL
    in_hand = {mark.unit for mark in ledger_of(project).marks()}
    assert 1 < len(in_hand) <= threads.IN_HAND * THREADS  # so this bounds the memory, too, however large a package is
    assert middle not in project.pictures() and project.pictures().items() < one_by_one.pictures().items()
    project.pnp("run", *ONLY_ASSEMBLE)
    assert project.pictures() == one_by_one.pictures() and project.rows() == one_by_one.rows()
    assert not list(project.output.rglob(".tmp-*")) and not list(ledger_of(project).marks())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_every_file_with_its_row(project: Project, one_by_one: Project, number: signal.Signals) -> None:
    command = program("run", str(project.manifest), *ONLY_ASSEMBLE)
    process = subprocess.Popen(command, env=hazardous(f"wait {one_by_one.rows()[7]['file_name']}"))
    while not (project.output / one_by_one.rows()[6]["file_name"]).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 130
    assert {row["file_name"] for row in project.rows()} == {*project.pictures()}
    assert 7 < len(project.rows()) < len(PROMPTS) and not list(ledger_of(project).marks())
    project.pnp("run", *ONLY_ASSEMBLE)
    assert project.pictures() == one_by_one.pictures() and project.rows() == one_by_one.rows()


@pytest.mark.slow
def test_a_result_that_crashes_its_worker_is_left_out_in_the_end_and_those_in_hand_with_it_are_written(
    project: Project, one_by_one: Project
) -> None:
    poison = f"segfault {one_by_one.rows()[7]['file_name']}"
    for _ in range(4):  # twice with others, twice alone
        assert run_with_hazard(project, poison, *ONLY_ASSEMBLE).returncode == -signal.SIGSEGV
    ended = run_with_hazard(project, poison, *ONLY_ASSEMBLE)
    assert ended.returncode == 1
    (failure,) = project.failures()
    assert failure["prompt"] == PROMPTS[7] and failure["stage"] == "assemble" and "quarantined" in failure["error"]
    assert [row["prompt"] for row in project.rows()] == [prompt for prompt in PROMPTS if prompt != PROMPTS[7]]
    assert len(ledger_of(project).quarantined()) == 1
    project.pnp("run", "--retry-failed")
    assert project.pictures() == one_by_one.pictures()
