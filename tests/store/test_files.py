from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pnp_batch.store.files import TEMP_PREFIX, is_alive, is_stale_temp, remove_stale_temps, temp_name, write_atomic


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new/folder/file"
    write_atomic(path, "größe")
    write_atomic(path, b"bytes", temp_in=tmp_path)
    assert path.read_bytes() == b"bytes"
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "folder/inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_atomic(tmp_path / "folder", "x")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "file", "\ud800")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_names_of_temporaries_never_meet_and_tell_their_process():
    assert len({temp_name() for _ in range(100)}) == 100
    assert not is_stale_temp(Path(temp_name()))
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    assert is_stale_temp(Path(temp_name().replace(f"-{os.getpid()}-", f"-{child}-")))


def test_a_zombie_is_not_alive():
    child = subprocess.Popen(["sleep", "1000"])
    assert is_alive(os.getpid()) and is_alive(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid)
    child.wait()
    assert not is_alive(child.pid)


LOOKS_FOR_A_HIDDEN_PROCESS = """
import os, subprocess, sys
from pathlib import Path
from pnp_batch.store.files import is_alive
subprocess.run(["mount", "-t", "proc", "-o", "hidepid=2", "proc", "/proc"], check=True)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(Path("/proc", sys.argv[1]).exists(), is_alive(int(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_process_of_somebody_else_that_the_system_hides_is_alive():
    command = ["unshare", "--mount", sys.executable, "-c", LOOKS_FOR_A_HIDDEN_PROCESS, str(os.getpid())]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"HIDDEN PROCESSES ARE NOT TESTED: {ended.stderr}")
    assert ended.stdout == "False True\n"


@pytest.mark.parametrize(
    "name",
    ["file", TEMP_PREFIX, ".tmp-x", ".tmp-a-b-c", ".tmp-host-99999999999999999999-0a", ".tmp--1-0a", ".tmp-host-0-0a"],
)
def test_names_of_others_are_never_stale(name):
    assert not is_stale_temp(Path(name))


def test_stale_files_and_folders_go(tmp_path):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    stale = [tmp_path / temp_name().replace(f"-{os.getpid()}-", f"-{child}-") for _ in range(2)]
    stale[0].write_text("x")
    stale[1].mkdir()
    (stale[1] / "inside").write_text("x")
    (tmp_path / "file").write_text("x")
    remove_stale_temps(tmp_path.iterdir())
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
