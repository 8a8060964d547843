"""Two runs at once: on one output folder, on one store, and on a file system without locks."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import Project, hazardous, program
from runs import SLOWLY, assert_same, nothing_done_twice, planned, started

NO_FLOCK = [sys.executable, str(Path(__file__).parent / "no_flock.py")]


@pytest.mark.slow
def test_work_that_is_done_twice_is_noticed(tmp_path: Path) -> None:
    """Of the batch of a lost result the others are made again, which leaves no trace in the store."""
    project = planned(tmp_path / "project")
    with started(project) as run:
        assert run.wait() == 0, run.printed
    with nothing_done_twice(project), started(project) as run:
        assert run.wait() == 0, run.printed
    shutil.rmtree(next(project.store.glob("translate/??/*")))
    with pytest.raises(AssertionError), nothing_done_twice(project), started(project) as run:
        assert run.wait() == 0, run.printed


@pytest.mark.slow
def test_two_runs_that_share_a_store_both_end_with_the_bytes_of_one(tmp_path: Path, undisturbed: Project) -> None:
    store = tmp_path / "shared/store"
    first, second = (planned(tmp_path / name, store=str(store)) for name in ("first", "second"))
    with started(first) as one, started(second) as other:
        assert one.wait() == 0 and other.wait() == 0, one.printed + other.printed
    for project in (first, second):
        assert project.pictures() == undisturbed.pictures()
    made = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*.safetensors")}
    assert made == undisturbed.tensors() and not list(store.rglob(".tmp-*"))
    assert "0 were corrupt" in first.pnp("store verify")


@pytest.mark.slow
def test_without_flock_a_lock_file_does(tmp_path: Path, undisturbed: Project) -> None:
    if why := subprocess.run([*NO_FLOCK, "true"], capture_output=True, text=True).stderr:
        pytest.skip(f"A FILE SYSTEM WITHOUT LOCKS IS NOT TESTED: {why}")
    project = planned(tmp_path / "project")
    command = [*NO_FLOCK, *program("run", str(project.manifest))]
    killed = subprocess.Popen(command, env=hazardous(SLOWLY), stderr=subprocess.PIPE, text=True)
    while not project.store.exists():
        assert killed.poll() is None
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 3 and "another run is working" in refused.stderr and ".lock" in refused.stderr
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "has no locks" in ended.stderr
    assert_same(project, undisturbed)
