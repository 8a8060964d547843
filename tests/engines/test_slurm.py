"""Engine `slurm` on a real Slurm: preempted, cancelled, out of time or killed, a run ends with the bytes of a local one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from running import Project
from runs import (
    ARTIFACTS,
    PICTURES,
    PROMPTS,
    SLOWLY,
    assert_others_done,
    assert_same,
    nothing_done_twice,
    planned,
    started,
    until,
)
from slurm_cluster import SlurmCluster, missing, slurm_cluster

from pnp_batch.ledger import Ledger

pytest.importorskip("submitit")

RESULTS = PICTURES * len(PROMPTS)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    if why := missing():
        pytest.skip(f"NO SLURM HERE, ITS ENGINE IS NOT TESTED: {why}")
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path: Path, slurm: SlurmCluster) -> Iterator[Project]:
    yield planned(tmp_path / "slurm", engine="slurm", slurm={"tasks": 2, "partition": "main", "time": 10})
    until(lambda: not slurm.call("squeue", "--noheader").strip(), 90, "the queue is empty")


def array_of(slurm: SlurmCluster) -> str:
    """The number of the one array that is in the queue."""
    (number,) = set(slurm.call("squeue", "-h", "-o", "%F", "--partition=main,cheap").split())
    return number


def hurry(number: str) -> None:
    """Else Slurm waits two minutes with the tasks that it requeued."""
    for task in range(2):
        subprocess.run(["scontrol", "update", f"JobId={number}_{task}", "StartTime=now"], capture_output=True)


@pytest.mark.slow
def test_an_array_gives_the_bytes_of_a_local_run_and_the_script_is_the_one_that_was_shown(
    project: Project, undisturbed: Project
) -> None:
    shown = project.pnp("run", "--dry-run")
    assert not project.output.exists() or not project.pictures()
    with started(project) as run:
        assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)
    (script,) = (project.output / "slurm/logs").glob("[0-9]*_submission.sh")
    assert (
        re.sub("pnp-batch-[0-9a-f]{8}", "pnp-batch-preview", script.read_text()) in shown
        and "#SBATCH --array=0-1%2" in shown
    )
    assert f"({RESULTS} computed now, {PICTURES} inversions" in run.printed
    with started(project) as run:  # nothing is left: nothing is submitted
        assert run.wait() == 0 and "submitted" not in run.printed


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "segfault", "hang"])
def test_a_task_that_dies_is_followed_by_another_array(
    tmp_path: Path, project: Project, undisturbed: Project, how: str
) -> None:
    project = planned(
        tmp_path / "again", engine="slurm", unit_timeout=5, slurm={"tasks": 2, "partition": "main", "time": 10}
    )
    victim = undisturbed.rows()[5]["key"]
    with started(project, hazard=f"{how} /{victim}", once=tmp_path / "hit") as run:
        run.until_there(tmp_path / "hit")
        with nothing_done_twice(project):
            assert run.wait() == 0, run.printed
    assert run.printed.count("submitted job array") == 2
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_a_poisoned_result_is_left_out_and_all_others_are_done(project: Project, undisturbed: Project) -> None:
    victim = undisturbed.rows()[0]
    with started(project, hazard=f"kill /{victim['key']}") as run:
        run.until_some_are_done()
        with nothing_done_twice(project):
            assert run.wait() == 1, run.printed
    assert f"{RESULTS - 1} of {RESULTS} results are there" in run.printed
    assert_others_done(project, undisturbed, victim)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["main", "cheap"])
def test_preempted_tasks_stop_in_time_and_nobody_is_blamed(
    tmp_path: Path, project: Project, undisturbed: Project, slurm: SlurmCluster, partition: str
) -> None:
    """With a time of grace the tasks have ended when it is over; without one Slurm kills and requeues them."""
    project = planned(tmp_path / "preempted", engine="slurm", slurm={"tasks": 2, "partition": partition, "time": 10})
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        number = array_of(slurm)
        slurm.call("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 5")
        until(lambda: "urgent R" in slurm.call("squeue", "-h", "-o", "%P %t"), 60, "the urgent job runs")
        assert not list(Ledger(project.output / "ledger").marks())
        until(lambda: "urgent" not in slurm.call("squeue", "-h", "-o", "%P"), 60, "the urgent job is over")
        hurry(number)
        with nothing_done_twice(project):
            assert run.wait() == 0, run.printed
    assert run.printed.count("submitted job array") == (1 if partition == "cheap" else 2)
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_tasks_whose_time_is_over_go_on_in_another_array(
    project: Project, undisturbed: Project, slurm: SlurmCluster
) -> None:
    with started(project, hazard=f"wait5 {ARTIFACTS}") as run:
        run.until_some_are_done()
        for job in slurm.wait_for("RUNNING"):
            slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        with nothing_done_twice(project):
            assert run.wait() == 0, run.printed
    assert run.printed.count("submitted job array") >= 2
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_an_array_that_somebody_cancels_is_followed_by_another(
    project: Project, undisturbed: Project, slurm: SlurmCluster
) -> None:
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        slurm.call("scancel", "--partition=main")
        with nothing_done_twice(project):
            assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_an_array_whose_driver_was_killed_goes_on_and_the_next_run_waits_for_it(
    project: Project, undisturbed: Project
) -> None:
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        run.process.kill()
        run.process.communicate()
    assert "task 0 on" in project.pnp("status")
    with nothing_done_twice(project), started(project) as run:
        assert run.wait() == 0, run.printed
    assert "goes on; waiting for it" in run.printed and "submitted" not in run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_an_array_is_found_though_its_folder_has_got_another_path(
    tmp_path: Path, project: Project, undisturbed: Project, slurm: SlurmCluster
) -> None:
    """Its tasks write to the old path, so it is cancelled; what must not be is a second one beside it."""
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        number = array_of(slurm)
        run.process.kill()
        run.process.communicate()
    (tmp_path / "link").symlink_to(project.folder)
    with started(Project(tmp_path / "link"), hazard=SLOWLY) as run:
        until(lambda: set(slurm.call("squeue", "-h", "-o", "%F").split()) - {number}, 120, "another array is there")
        assert array_of(slurm) != number
        assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_tasks_that_crashed_while_no_driver_lived_have_left_strikes(
    tmp_path: Path, project: Project, undisturbed: Project, slurm: SlurmCluster
) -> None:
    ledger, victim = Ledger(project.output / "ledger"), undisturbed.rows()[5]["key"]
    with started(project, hazard=f"hang /{victim}", once=tmp_path / "hit") as run:
        run.until_there(tmp_path / "hit")
        run.process.kill()
        run.process.communicate()
        for process in run.processes():
            with suppress(psutil.NoSuchProcess):  # it ended with the one before
                process.kill()
    until(lambda: not slurm.call("squeue", "--noheader").strip(), 90, "the array has ended")
    (mark,) = (mark for mark in ledger.marks() if victim in mark.unit)
    assert not ledger.strikes(mark.unit)
    with started(project, hazard=SLOWLY) as run:
        run.until_there(ledger.root / "dead" / mark.writer)
        assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


STANDS_FOR_SBATCH = """#!/bin/sh
{sbatch} {options} "$@"
kill -{signal} $PPID
sleep 1
"""


@contextmanager
def signalling_sbatch(folder: Path, number: signal.Signals, options: str = "") -> Iterator[None]:
    """Within the block `sbatch` sends its caller a signal as soon as an array is submitted."""
    program = folder / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(STANDS_FOR_SBATCH.format(sbatch=shutil.which("sbatch"), options=options, signal=int(number)))
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        yield


@pytest.mark.slow
def test_ctrl_c_in_the_moment_of_submission_cancels_the_array(
    project: Project, slurm: SlurmCluster, tmp_path: Path
) -> None:
    with signalling_sbatch(tmp_path, signal.SIGINT, "--hold"), started(project) as run:
        assert run.wait() == 130, run.printed
    assert (project.output / "slurm/array.json").exists() and not slurm.call("squeue", "--noheader").strip()


@pytest.mark.slow
def test_an_array_whose_driver_is_killed_in_the_moment_of_submission_is_found(
    project: Project, undisturbed: Project, tmp_path: Path
) -> None:
    """submitit had not handed its tasks their work yet: they end, and what is left goes into another array."""
    with signalling_sbatch(tmp_path, signal.SIGKILL), started(project, hazard=SLOWLY) as run:
        run.process.communicate()
        assert run.process.returncode == -signal.SIGKILL
    with started(project) as run:
        assert run.wait() == 0, run.printed
    assert "goes on; waiting for it" in run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_the_loss_of_a_node_loses_nothing(project: Project, undisturbed: Project, slurm: SlurmCluster) -> None:
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done(4)
        number = array_of(slurm)
        with nothing_done_twice(project), slurm.node_lost("n2"):
            hurry(number)
            assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_ctrl_c_cancels_the_array(project: Project, undisturbed: Project, slurm: SlurmCluster) -> None:
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130, run.printed
    assert not slurm.call("squeue", "--noheader").strip()
    assert not list(Ledger(project.output / "ledger").marks())
    with nothing_done_twice(project), started(project) as run:
        assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_what_slurm_refuses_is_said(tmp_path: Path, slurm: SlurmCluster) -> None:
    project = planned(tmp_path / "slurm", engine="slurm", slurm={"partition": "nowhere"})
    with started(project) as run:
        assert run.wait() == 3
    assert "Slurm refuses the job array" in run.printed and "nvalid partition" in run.printed
