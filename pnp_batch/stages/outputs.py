"""The output folder: names that neither collide nor escape, files written whole, rows appended as results appear."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pnp_batch.errors import disk_errors_named
from pnp_batch.inputs import ROWS_FILE, slug
from pnp_batch.store.files import TEMP_PREFIX, remove_stale_temps, temp_name, write_atomic

log = logging.getLogger(__name__)

SHORT_KEY = 10
VERDICT = ("quality", "quality_attempt", "quality_reason", "quality_figures")
MAX_STEM_BYTES = 120  # with slug, key and suffix a name stays below the 255 bytes that file systems allow


class Rows(Protocol):
    """Takes rows of `metadata.jsonl`."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes one."""


class RowList(list[Mapping[str, Any]]):
    """Rows of a worker that is not the only one: whoever runs the workers writes them, since only one may append."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps a row."""
        self.append(row)


class Outputs:
    """One run's output folder.

    Args:
        root: The folder.
        rows: Who takes the rows of `metadata.jsonl`; the file itself if omitted.
    """

    def __init__(self, root: Path, rows: Rows | None = None) -> None:
        self.root = root
        self._file = RowFile(root / ROWS_FILE)
        self._rows = self._file if rows is None else rows

    def name(self, stem: PurePosixPath, prompt: str, key: str, folder: str = "images", suffix: str = ".png") -> str:
        """`images/<tree>/<stem>--<prompt-slug>-<short key>.png`, relative to the folder; `videos/...` likewise."""
        short = stem.name.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
        return str(PurePosixPath(folder, stem.parent, f"{short}--{slug(prompt)}-{key[:SHORT_KEY]}{suffix}"))

    def has_file(self, name: str) -> bool:
        """Whether a file is there; files are renamed into place, so one that is there is whole."""
        return (self.root / name).is_file()

    def write_file(self, name: str, data: bytes) -> None:
        """Writes a whole file.

        Raises:
            EnvironmentFailure: The disk is full or read-only.
        """
        with disk_errors_named(f"{name} to {self.root}"):
            write_atomic(self.root / name, data, temp_in=self.root)

    def has(self, name: str) -> bool:
        """Whether a file or a folder is there; both are renamed into place, so what is there is whole."""
        return (self.root / name).exists()

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for half-written files, gone at the end of the block."""
        folder = self.root / temp_name()
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def write_with(self, name: str, write: Callable[[Path], None]) -> None:
        """Lets `write` make a file (or a folder), and renames it into place.

        Raises:
            EnvironmentFailure: The disk is full or read-only.
        """
        target = self.root / name
        with disk_errors_named(f"{name} to {self.root}"), self.scratch() as folder:
            write(folder / target.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (folder / target.name).replace(target)

    def remove(self, name: str) -> None:
        """Removes a result: a file, or a folder of numbered frames, which stays with whatever else was put there."""
        path = self.root / name
        for file in path.glob("[0-9]*.png") if path.is_dir() else (path,):
            file.unlink(missing_ok=True)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()

    def remove_stale_temporaries(self) -> None:
        """Removes what killed processes of this machine left half-written."""
        for pattern in ("", "tracebacks/"):
            remove_stale_temps(self.root.glob(f"{pattern}{TEMP_PREFIX}*"))

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Appends a row to `metadata.jsonl`, unless there is one for this file and source with this verdict."""
        self._rows.add(row)

    def drop_superseded_rows(self) -> None:
        """Removes rows that were written again with another verdict (the manifest's `quality` changed)."""
        self._file.compact()

    def remove_rows(self, is_meant: Callable[[Mapping[str, Any]], bool]) -> None:
        """Removes some of the rows of `metadata.jsonl`."""
        self._file.replace(row for row in self.rows() if not is_meant(row))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of `metadata.jsonl` so far."""
        return self._file.read()

    def row_count(self) -> int:
        """How many rows there are so far."""
        return sum(1 for _ in self.rows())


class RowFile:
    """A JSON-lines file that only grows, one write a row; a line torn by a kill is cut off when it is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[int, int] | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row unless it is there; equal pictures of two sources share a file but not a row."""
        if self._known is None:
            self._repair()
            self._known = {_identity(known): _verdict(known) for known in self.read()}
        if self._known.get(_identity(row)) == _verdict(row):
            return
        self._known[_identity(row)] = _verdict(row)
        append_line(self.path, row)

    def compact(self) -> None:
        """Keeps of several rows for one file and source the last."""
        last = {_identity(row): number for number, row in enumerate(self.read())}
        kept = set(last.values())
        if not last or len(kept) == max(kept) + 1:
            return
        self.replace(row for number, row in enumerate(self.read()) if number in kept)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the file anew, whole or not at all; the rows may come out of it."""
        temporary = self.path.with_name(temp_name())
        with disk_errors_named(str(self.path)):
            try:
                with temporary.open("wb") as file:
                    file.writelines(map(line_of, rows))
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)

    def read(self) -> Iterator[dict[str, Any]]:
        """All whole rows."""
        if self.path.exists():
            with self.path.open("rb") as lines:
                for line in lines:
                    try:
                        yield json.loads(line.decode())  # one by one: a kill may tear the last one within a letter
                    except ValueError:
                        shown = line[:60].decode(errors="replace")
                        log.warning("%s: a line that is not JSON is passed over: %s...", self.path, shown)

    def _repair(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            end = file.seek(0, os.SEEK_END)
            while end:
                begin = max(end - 65536, 0)
                file.seek(begin)
                newline = file.read(end - begin).rfind(b"\n")
                if newline >= 0:
                    file.truncate(begin + newline + 1)
                    return
                end = begin
            file.truncate(0)


def _identity(row: Mapping[str, Any]) -> int:
    return hash((row.get("file_name"), row.get("source")))


def _verdict(row: Mapping[str, Any]) -> int:
    """What may change about a result that stays the same: how it was judged, and by which figures."""
    return hash(json.dumps([row.get(name) for name in VERDICT], sort_keys=True))


def line_of(row: Mapping[str, Any]) -> bytes:
    """A row as a JSON line; a name that is not UTF-8 stays valid JSON."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one JSON line in a single write.

    Raises:
        EnvironmentFailure: The disk is full or read-only.
    """
    with disk_errors_named(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(line_of(row))
