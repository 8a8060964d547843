"""A cache of file digests by path, inode, size and times, so that a repeated run need not read its inputs again.

One tiny file an entry: appends to one shared file are not safe on a network file system.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from pnp_batch.errors import disk_errors_named
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import key_of, sha256

# Who only looks at another's results needs no cache; who is to make some is told by the first artifact that cannot be written.
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class DigestCache:
    """Digests below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, path: Path, what: str) -> str | None:
        """The digest noted for a file as it is now, or None.

        Args:
            path: The file.
            what: What was digested (the raw bytes, or the pixels at some size).

        Raises:
            OSError: The file cannot be looked at.
        """
        return _read(self._entry(path, what))

    def put(self, path: Path, what: str, digest: str) -> None:
        """Notes a digest of a file as it is now."""
        self._write(self._entry(path, what), digest)

    def of(self, path: Path, what: str, compute: Callable[[], str]) -> str:
        """The noted digest, computed and noted where there is none."""
        entry = self._entry(path, what)  # of the file as it is before it is read: it may change while that goes on
        digest = _read(entry)
        if digest is None:
            digest = compute()
            self._write(entry, digest)
        return digest

    def _entry(self, path: Path, what: str) -> Path:
        stat = path.stat()
        # Unlike mtime, ctime cannot be set back by the tools that copy a file with its times.
        identity = [str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, what]
        name = key_of({"identity": identity})
        return self.root / name[:2] / name

    def _write(self, entry: Path, digest: str) -> None:
        with disk_errors_named(f"to {self.root}"):
            try:
                write_atomic(entry, f"{digest} {_seal(entry, digest)}", temp_in=self.root)
            except OSError as error:
                if error.errno not in READ_ONLY:
                    raise


def _read(entry: Path) -> str | None:
    try:
        digest, seal = entry.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # a cache that cannot be read is no cache
        return None
    return digest if seal == _seal(entry, digest) else None


def _seal(entry: Path, digest: str) -> str:
    return sha256(f"{entry.name} {digest}".encode())
