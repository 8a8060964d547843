"""Runs of engines in tests: one small plan, its bytes from an undisturbed local run, and runs that somebody interferes with."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from running import Project, hazardous, program

from pnp_batch.ledger import Ledger

PICTURES = 8
PROMPTS = ["a pink toy", "a bronze statue"]
BATCH = {"batch_size": 2}
PATIENCE_SECONDS = 240
ARTIFACTS = "/store/(invert|translate)/"
SLOWLY = f"wait {ARTIFACTS}"  # every artifact takes a second more


def planned(folder: Path, **run: Any) -> Project:
    """Eight pictures, two prompts each: four parts of two pictures."""
    folder.mkdir()
    project = Project(folder)
    inputs = [{"image": project.picture(f"{i}.png", i), "prompts": PROMPTS} for i in range(PICTURES)]
    return project.write(inputs, run={**BATCH, **run})


def assert_same(project: Project, undisturbed: Project) -> None:
    """The very results of an undisturbed local run: every byte, every row, nothing else, and nobody blamed."""
    assert project.pictures() == undisturbed.pictures()
    assert project.tensors() == undisturbed.tensors()
    names = sorted(row["file_name"] for row in project.rows())
    assert names == sorted(row["file_name"] for row in undisturbed.rows())
    assert not project.failures() and not list(project.output.rglob(".tmp-*"))
    assert not list(Ledger(project.output / "ledger").marks())


@dataclass
class Started:
    """A run in a process of its own, and whatever it started."""

    project: Project
    process: subprocess.Popen[str]
    token: str
    printed: str = field(default="")

    def wait(self) -> int:
        """Its exit code; nothing that it started may be left."""
        self.printed = self.process.communicate(timeout=PATIENCE_SECONDS)[0]
        until(lambda: not self.processes(), 30, "everything that the run started has ended")
        return self.process.returncode

    def processes(self) -> list[psutil.Process]:
        """All processes of its session and those that inherited its environment, but for zombies, whose parents are to blame."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                is_ours = os.getsid(process.pid) == self.process.pid or self.token in process.environ().values()
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def until_some_are_done(self, count: int = 2) -> None:
        """Waits until results appear while the run goes on."""
        self._until(lambda: len(self.project.pictures()) >= count, f"{count} results are there")

    def until_there(self, path: Path) -> None:
        """Waits until a file appears while the run goes on."""
        self._until(path.exists, f"{path} is there")

    def _until(self, condition: Callable[[], object], what: str) -> None:
        def met() -> object:
            assert self.process.poll() is None, self.process.communicate()[0]
            return condition()

        until(met, PATIENCE_SECONDS, what)


@contextmanager
def started(project: Project, *options: str, hazard: str = "", once: Path | None = None) -> Iterator[Started]:
    """Starts `pnp-batch run`."""
    token = f"pnp-test-{secrets.token_hex(8)}"
    process = subprocess.Popen(
        program("run", str(project.manifest), *options),
        env={**watched(hazard, once), "PNP_TEST": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield Started(project, process, token)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def watched(hazard: str, once: Path | None = None) -> dict[str, str]:
    """An environment in which an artifact is poisoned and every published one is noted; see counted/sitecustomize.py."""
    environment = hazardous(hazard, once)
    counted = Path(__file__).parent / "counted"
    return {**environment, "PYTHONPATH": f"{counted}{os.pathsep}{environment['PYTHONPATH']}"}


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)


@contextmanager
def nothing_done_twice(project: Project) -> Iterator[None]:
    """What is finished when the block begins is not made again within it; what was in hand then may be."""
    before = _published(project)
    finished = set(before) - {mark.unit for mark in Ledger(project.output / "ledger").marks()}  # marks are read last
    assert finished
    yield
    assert not finished & set(_published(project)[len(before) :])


def _published(project: Project) -> list[str]:
    """The units that were published, in order; one that is made again is there again, though the first artifact stays."""
    return (project.folder / "published").read_text().splitlines()


def assert_others_done(project: Project, undisturbed: Project, victim: Mapping[str, Any]) -> None:
    """All results but the poisoned one are there, with their own bytes where they share no batch with it."""
    others = {name: data for name, data in undisturbed.pictures().items() if name != victim["file_name"]}
    assert project.pictures().keys() == others.keys()
    mates = {row["file_name"] for row in undisturbed.rows() if row["source"] == victim["source"]}
    assert {name for name, data in project.pictures().items() if data != others[name]} <= mates
    assert [failure["prompt"] for failure in project.failures()] == [victim["prompt"]]
    assert "died 4 times" in project.failures()[0]["error"]  # twice with its batch, twice alone
