"""What a disk can do, measured, and how much of it the artifacts of a stage may take."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pnp_batch.errors import disk_errors_named
from pnp_batch.store.artifacts import META, ArtifactStore

SAMPLE_BYTES = 32_000_000


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second that a file system writes and reads."""

    write: float
    read: float


def bandwidth(folder: Path) -> Bandwidth:
    """Times one file of 32 MB, written through to the disk and read back (from the disk where the system lets go of its cache).

    Args:
        folder: A folder of the file system, or where one will be; the file has no name.

    Raises:
        EnvironmentFailure: The file system cannot be written to.
    """
    data = os.urandom(SAMPLE_BYTES)
    folder = next(each for each in (folder, *folder.parents) if each.exists())
    with disk_errors_named(f"a sample to {folder}"), tempfile.TemporaryFile(dir=folder) as file:
        begin = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began_reading = time.perf_counter()
        file.read()
        read = time.perf_counter()
    return Bandwidth(SAMPLE_BYTES / (written - begin), SAMPLE_BYTES / (read - began_reading))


def mark_used(path: Path) -> None:
    """Notes that an artifact was used now, for `make_room`."""
    os.utime(path / META)


def make_room(store: ArtifactStore, stage: str, needed: int, budget: int, keep: Collection[str] = ()) -> bool:
    """Removes the least recently used artifacts of a stage until others fit into a budget.

    Args:
        store: The store.
        stage: The stage.
        needed: Bytes that are about to be added.
        budget: Bytes that all artifacts of the stage together may take.
        keep: Keys of those that stay, however long ago they were used.

    Returns:
        Whether there is room now. Nothing is removed where there cannot be.
    """
    found = sorted(_artifacts(store.root / stage))
    total = sum(size for _, size, _ in found)
    can_go = [(size, path) for _, size, path in found if path.name not in keep]
    if total - sum(size for size, _ in can_go) + needed > budget:
        return False
    for size, path in can_go:
        if total + needed <= budget:
            break
        store.remove(path)
        total -= size
    return True


def _artifacts(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Time of last use, size and path of every artifact of a stage."""
    for meta in folder.glob(f"??/*/{META}"):
        try:
            size = sum(file.stat().st_size for file in meta.parent.iterdir())
            yield meta.stat().st_mtime_ns, size, meta.parent
        except FileNotFoundError:
            continue  # another worker made room with it
