"""Writing files so that no reader ever sees half of one."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

TEMP_PREFIX = ".tmp-"
_counter = itertools.count()


def temp_name() -> str:
    """A name no other writer uses: host, process and a counter. `is_stale_temp` reads it back."""
    return f"{TEMP_PREFIX}{socket.gethostname()}-{os.getpid()}-{next(_counter)}"


def is_stale_temp(path: Path) -> bool:
    """Whether a temporary file or folder was left by a process of this machine that is gone."""
    if not path.name.startswith(TEMP_PREFIX):
        return False
    host, pid, _ = path.name.removeprefix(TEMP_PREFIX).rsplit("-", 2)
    return host == socket.gethostname() and not _is_alive(int(pid))


def remove_stale_temps(paths: Iterable[Path]) -> None:
    """Removes those of the paths that killed processes of this machine left half-written."""
    for path in paths:
        if is_stale_temp(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes a whole file under a temporary name beside it and renames it once.

    There is no fsync: a kill cannot tear a rename, and what a power cut tears is caught by the checksums on reading.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(temp_name())
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
