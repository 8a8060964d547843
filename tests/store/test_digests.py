from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pnp_batch.store import DigestCache
from pnp_batch.store.files import TEMP_PREFIX
from pnp_batch.store.keys import sha256


class Digest:
    """Digests a file and counts how often."""

    def __init__(self, cache: DigestCache, path: Path) -> None:
        self.cache, self.path, self.computed = cache, path, 0

    def __call__(self, what: str = "bytes") -> str:
        return self.cache.of(self.path, what, self._compute)

    def _compute(self) -> str:
        self.computed += 1
        return sha256(self.path.read_bytes())


@pytest.fixture
def digest(tmp_path: Path) -> Digest:
    path = tmp_path / "picture.png"
    path.write_bytes(b"one")
    return Digest(DigestCache(tmp_path / "digests"), path)


def test_a_file_is_read_once(digest, tmp_path):
    assert digest() == digest() == sha256(b"one")
    assert DigestCache(tmp_path / "digests").get(digest.path, "bytes") == sha256(b"one")
    assert digest.computed == 1
    assert digest("other") == sha256(b"one")
    assert digest.computed == 2


def test_a_changed_file_is_read_again(digest):
    digest()
    digest.path.write_bytes(b"longer")
    assert digest() == sha256(b"longer")


def test_a_changed_file_is_read_again_though_its_size_and_time_are_the_old_ones(digest):
    digest()
    before = digest.path.stat()
    while digest.path.stat().st_ctime_ns == before.st_ctime_ns:  # clocks of file systems tick every few milliseconds
        digest.path.write_bytes(b"two")
        os.utime(digest.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = digest.path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert digest() == sha256(b"two")


def test_another_file_in_its_place_is_read(digest, tmp_path):
    digest()
    (tmp_path / "new").write_bytes(b"two")
    shutil.copystat(digest.path, tmp_path / "new")
    (tmp_path / "new").replace(digest.path)
    assert digest() == sha256(b"two")


def test_a_file_that_changes_while_it_is_read_leaves_no_wrong_digest(digest):
    def compute() -> str:
        old = sha256(digest.path.read_bytes())
        digest.path.write_bytes(b"changed meanwhile")
        return old

    digest.cache.of(digest.path, "bytes", compute)
    assert digest.cache.get(digest.path, "bytes") is None


def test_a_damaged_entry_is_as_good_as_none(digest, tmp_path):
    digest()
    (entry,) = (path for path in (tmp_path / "digests").rglob("*") if path.is_file())
    whole = entry.read_bytes()
    for damaged in (b"", b"{}", b"\xff", whole[:70], *(whole[:i] + b"0" + whole[i + 1 :] for i in range(len(whole)))):
        entry.write_bytes(damaged)
        assert digest.cache.get(digest.path, "bytes") == (sha256(b"one") if damaged == whole else None)


def test_a_vanished_file_is_an_error(digest):
    digest()
    digest.path.unlink()
    with pytest.raises(FileNotFoundError):
        digest()


def test_nothing_half_written_stays(digest, tmp_path):
    digest()
    digest.cache.put(digest.path, "pixels", "0" * 64)
    assert digest.cache.get(digest.path, "pixels") == "0" * 64
    assert not list((tmp_path / "digests").rglob(f"{TEMP_PREFIX}*"))
