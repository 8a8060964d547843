"""Real kills of real processes: whatever the moment, a finished run has the bytes of an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import Project, hazardous, program, small_disk, start, wait_for_changes

INPUTS = [{"prompts": ["a bronze statue", "a pink toy", "a marble bust"]} for _ in range(3)]
# These kills are nobody's fault, however often they hit the same batch.
CHECKPOINT_AT_EVERY_STEP = {"checkpoint_seconds": 0, "batch_size": 4}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make(tmp_path / "disturbed")


def make(folder: Path) -> Project:
    folder.mkdir()
    project = Project(folder)
    inputs = [{"image": project.picture(f"{i}.png", i)} | each for i, each in enumerate(INPUTS)]
    return project.write(inputs, defaults={"num_inversion_steps": 50}, run=CHECKPOINT_AT_EVERY_STEP)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make(tmp_path_factory.mktemp("kill") / "undisturbed")
    process = start(project)
    process.join()
    assert process.exitcode == 0
    return project


@pytest.mark.slow
@pytest.mark.parametrize("changes", [1, 3, 7, 12, 20])
def test_killed_at_many_moments_and_finished_the_bytes_are_those_of_an_undisturbed_run(
    project: Project, undisturbed: Project, changes: int
) -> None:
    exits = []
    while not exits or exits[-1] != 0:
        process = start(project)
        if len(exits) < 25 and wait_for_changes(project, process, changes):
            process.kill()
        process.join()
        exits.append(process.exitcode)
        assert exits[-1] in (0, -signal.SIGKILL)
    assert exits.count(-signal.SIGKILL) >= 2
    assert project.pictures() == undisturbed.pictures()
    assert project.tensors() == undisturbed.tensors()
    assert [row["file_name"] for row in project.rows()] == [row["file_name"] for row in undisturbed.rows()]
    assert not list(project.output.rglob(".tmp-*"))
    project.pnp("store gc")  # a kill between the last publish and the tidying leaves a saved loop behind
    assert not list(project.store.glob("checkpoints/*")) and project.tensors() == undisturbed.tensors()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_status_works_meanwhile(project: Project) -> None:
    command = [sys.executable, "-m", "pnp_batch.cli"]
    project.write(
        [{"image": "0.png", "prompts": ["a toy"]}], defaults={"num_inversion_steps": 999, "height": 256, "width": 256}
    )
    process = subprocess.Popen([*command, "run", str(project.manifest)], stderr=subprocess.PIPE, text=True)
    while not (project.output / "progress.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert "running (process" in project.pnp("status")
    assert "another run is working" in project.pnp("run", code=3)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate()
    assert process.returncode == 130
    assert "run" in printed and str(project.manifest) in printed and "Go on" in printed
    assert "not running" in project.pnp("status")
    assert "interrupted; 0 of 1 results are there" in (project.output / "run.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_results_of_a_batch_waits_until_all_of_it_is_written(
    project: Project, undisturbed: Project, number: signal.Signals
) -> None:
    process = subprocess.Popen(program("run", str(project.manifest)), env=hazardous("wait /translate/"))
    while not (there := results_in(project)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == 130
    assert len(there) < 3 and len(results_in(project)) == 3  # the prompts of the first picture share a batch
    project.pnp("run")
    assert project.pictures() == undisturbed.pictures() and project.tensors() == undisturbed.tensors()


def results_in(project: Project) -> list[Path]:
    return list(project.store.rglob("translate/??/[!.]*"))


@pytest.mark.slow
def test_a_full_disk_ends_with_a_clear_message_and_an_intact_store(project: Project, undisturbed: Project) -> None:
    with small_disk(project.output, "2m"):
        project.write(
            [{"image": f"{i}.png"} | each for i, each in enumerate(INPUTS)],
            defaults={"num_inversion_steps": 50},
            run=CHECKPOINT_AT_EVERY_STEP,
        )
        (project.output / "ballast").write_bytes(bytes(2 * 2**20 - 150_000))
        printed = project.pnp("run", code=3)
        assert "No space left" in printed and "run the same command again" in printed
        assert not [p for p in project.output.rglob(".tmp-*")]
        assert "0 were corrupt" in project.pnp("store verify")
        (project.output / "ballast").unlink()
        project.pnp("run")
        assert project.pictures() == undisturbed.pictures()


@pytest.mark.slow
def test_results_that_may_not_be_written_to_can_be_looked_at(project: Project, tiny_sd: Path) -> None:
    """As those of a colleague, whose cache does not know the digests of a model that lies elsewhere here."""
    with small_disk(project.output, "20m"):
        inputs = [{"image": "0.png"} | INPUTS[0]]
        project.write(inputs).pnp("run")
        subprocess.run(["mount", "-o", "remount,ro", str(project.output)], check=True)
        project.write(inputs, model=str(shutil.copytree(tiny_sd, project.folder / "model")))
        assert json.loads(project.pnp("status", "--json"))["assembled"] == len(project.pictures())
        assert "would remove 0 results" in project.pnp("prune", "--dry-run")
        assert "Read-only file system" in project.pnp("run", code=3)
