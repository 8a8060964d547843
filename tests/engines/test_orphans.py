"""What a process started ends with it, however it ends."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest
from runs import until

STARTS_TWO_AND_LOOKS_AFTER_ONE = """
import subprocess, sys
from pnp_batch.engines.orphans import descendants, no_orphans
one = subprocess.Popen(["sleep", "1000"])
(known,) = descendants()
other = subprocess.Popen(["sleep", "1000"])
with no_orphans([known]):
    print(one.pid, other.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_what_a_process_started_ends_with_it_and_nothing_else_does(killed: bool) -> None:
    command = [sys.executable, "-c", STARTS_TWO_AND_LOOKS_AFTER_ONE]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None and parent.stdout is not None
    one, other = (psutil.Process(int(number)) for number in parent.stdout.readline().split())
    if killed:
        parent.kill()
    parent.stdin.close()
    parent.wait()
    until(lambda: not _runs(one), 30, "the orphan has ended")
    assert _runs(other)
    other.kill()


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
