"""A cache of file digests by path, inode, size and time, so that a repeated run need not read its inputs again.

One tiny file an entry: appends to one shared file are not safe on a network file system.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pnp_batch.errors import disk_errors_named
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import key_of


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
        try:
            return str(json.loads(self._entry(path, what).read_bytes())["digest"])
        except (FileNotFoundError, ValueError, KeyError):
            if not path.exists():
                raise FileNotFoundError(f"{path} has vanished") from None
            return None

    def put(self, path: Path, what: str, digest: str) -> None:
        """Notes a digest of a file as it is now."""
        with disk_errors_named(f"to {self.root}"):
            write_atomic(self._entry(path, what), json.dumps({"digest": digest}))

    def of(self, path: Path, what: str, compute: Callable[[], str]) -> str:
        """The noted digest, computed and noted where there is none."""
        digest = self.get(path, what)
        if digest is None:
            digest = compute()
            self.put(path, what, digest)
        return digest

    def _entry(self, path: Path, what: str) -> Path:
        stat = path.stat()
        identity = [str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, what]
        name = key_of({"identity": identity})
        return self.root / name[:2] / name
