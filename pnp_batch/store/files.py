"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil

TEMP_PREFIX = ".tmp-"
FORGOTTEN_SECONDS = 86_400.0
_TEMP_NAME = re.compile(re.escape(TEMP_PREFIX) + r"(?P<host>.+)-(?P<pid>\d{1,9})-[0-9a-f]+")


def temp_name() -> str:
    """A name no other writer uses: host, process and a random token. `is_stale_temp` reads it back.

    The token is for containers, whose hosts and processes are often called the same.
    """
    return f"{TEMP_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def is_stale_temp(path: Path) -> bool:
    """Whether a temporary file or folder was left by a process of this machine that is gone."""
    match = _TEMP_NAME.fullmatch(path.name)
    return match is not None and match["host"] == socket.gethostname() and not is_alive(int(match["pid"]))


def is_forgotten_temp(path: Path) -> bool:
    """Whether a temporary file or folder, of whatever machine, was not written to for so long that nobody will any more."""
    try:
        return _TEMP_NAME.fullmatch(path.name) is not None and time.time() - path.stat().st_mtime > FORGOTTEN_SECONDS
    except FileNotFoundError:
        return False


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs. A zombie does not: the first process of a container may never wait for it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:  # many shared machines show nobody the processes of others
        return True


def remove_stale_temps(paths: Iterable[Path]) -> None:
    """Removes those of the paths that killed processes of this machine left half-written."""
    for path in filter(is_stale_temp, paths):
        _remove(path)


def remove_temps_of(processes: Collection[str], root: Path) -> None:
    """Removes what processes that are gone, as `<host>-<pid>`, left half-written in a folder or right below its folders."""
    for path in (*root.glob(f"{TEMP_PREFIX}*"), *root.glob(f"*/{TEMP_PREFIX}*")):
        match = _TEMP_NAME.fullmatch(path.name)
        if match is not None and f"{match['host']}-{match['pid']}" in processes:
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder. What vanishes meanwhile has none; a link counts itself."""
    try:
        found = path.lstat()
        return sum(map(size_of, path.iterdir())) if stat.S_ISDIR(found.st_mode) else found.st_size
    except FileNotFoundError:
        return 0


def write_atomic(path: Path, data: bytes | str, temp_in: Path | None = None) -> None:
    """Writes a whole file under a temporary name and renames it once.

    There is no fsync: a kill cannot tear a rename, and what a power cut tears is caught by the checksums on reading.

    Args:
        path: The file; its folder is made.
        data: All of it.
        temp_in: Where the temporary stands, on the same file system; beside the file if omitted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (temp_in or path.parent) / temp_name()
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
