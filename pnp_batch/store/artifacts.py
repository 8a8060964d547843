"""The artifact store: `<root>/<stage>/ab/<key>/` with safetensors shards and `meta.json`.

An artifact is built in a temporary folder of its stage and renamed once, so it is either whole or not there. `meta.json`
says what made it and holds size, time and checksum of every shard. There is no index: the file system is the truth, and
several machines may use one store.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from pnp_batch.errors import EnvironmentFailure, disk_errors_named
from pnp_batch.store.files import TEMP_PREFIX, is_forgotten_temp, is_stale_temp, remove_stale_temps, temp_name
from pnp_batch.store.keys import canonical_json, sha256

log = logging.getLogger(__name__)

Tensors = Mapping[str, np.ndarray[Any, Any]]

META = "meta.json"
FORMAT = 1

# Reading fails with these while the bytes are all right, so nothing may be set aside because of them.
PASSING_ERRORS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT}


class CorruptArtifact(Exception):
    """An artifact's bytes are not the ones that were published."""


@dataclass(frozen=True)
class Artifact:
    """A published artifact: its folder and what its `meta.json` says.

    Attributes:
        path: Its folder.
        meta: What made it, as given to `publish`.
        shards: For each shard file name: size in bytes, mtime in ns and sha256.
    """

    path: Path
    meta: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Any]]

    @property
    def key(self) -> str:
        """Its content key."""
        return self.path.name

    @property
    def names(self) -> list[str]:
        """Names of its shards, sorted."""
        return sorted(name.removesuffix(".safetensors") for name in self.shards)

    def load(self, shard: str) -> dict[str, np.ndarray[Any, Any]]:
        """Reads one shard and checks every byte of it.

        Raises:
            CorruptArtifact: The bytes are not the published ones.
            EnvironmentFailure: The file system does not answer.
        """
        name = f"{shard}.safetensors"
        data = _read(self.path / name)
        if name not in self.shards or sha256(data) != self.shards[name]["sha256"]:
            raise CorruptArtifact(f"{name} does not match its checksum")
        return safetensors.numpy.load(data)

    def looks_untouched(self) -> bool:
        """Whether size and time of every shard are as published: one `stat` each, nothing is read."""
        return all(_stamp(self.path / name) == (s["size"], s["mtime_ns"]) for name, s in self.shards.items())

    def verify(self) -> None:
        """Reads everything.

        Raises:
            CorruptArtifact: Something differs from what was published.
        """
        for name in self.names:
            self.load(name)


class ArtifactStore:
    """All artifacts below one folder. Safe for many processes and machines at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.corrupt: dict[tuple[str, str], str] = {}

    def folder(self, stage: str, key: str) -> Path:
        """Where an artifact lies or would lie."""
        return self.root / stage / key[:2] / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, or None where there is none.

        A shard whose size or time changed since it was published is read and checked; a corrupt artifact is set aside
        and reported, so that it is made again.
        """
        path = self.folder(stage, key)
        try:
            artifact = _open(path)
            if artifact and not artifact.looks_untouched():
                artifact.verify()
        except CorruptArtifact as error:
            self.set_aside(path, str(error))
            return None
        return artifact

    def publish(self, stage: str, key: str, shards: Mapping[str, Tensors], meta: Mapping[str, Any]) -> Artifact:
        """Writes an artifact and makes it visible in one rename.

        If someone else published the same key first, theirs stays: it is the same content.

        Args:
            stage: Name of the stage that made it.
            key: Its content key.
            shards: Tensors by name, for each shard by name.
            meta: What made it; plain JSON values.

        Raises:
            EnvironmentFailure: The disk is full or read-only. Nothing half-written stays behind.
        """
        with self.draft(stage, key) as draft:
            for name, tensors in shards.items():
                draft.add(name, tensors)
            return draft.publish(meta)

    @contextmanager
    def draft(self, stage: str, key: str) -> Iterator[Draft]:
        """An artifact that grows shard by shard, for those that are too big to be held; gone unless it is published.

        Args:
            stage: Name of the stage that makes it.
            key: Its content key.

        Raises:
            EnvironmentFailure: The disk is full or read-only. Nothing half-written stays behind.
        """
        temporary = self.root / stage / temp_name()
        with disk_errors_named(f"{stage} {key[:12]} to {self.root}"):
            try:
                temporary.mkdir(parents=True)
                yield Draft(self, temporary, self.folder(stage, key))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def make_visible(self, temporary: Path, final: Path) -> Artifact | None:
        """Renames; gives the artifact that someone else published first, if there is one."""
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(final)
        except OSError as error:  # renaming a folder onto a full one fails, which is just the check that is wanted
            if theirs := self.find(final.parent.parent.name, final.name):
                return theirs
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            temporary.rename(final)  # theirs was corrupt and is set aside
        return None

    def load(self, artifact: Artifact, shard: str) -> dict[str, np.ndarray[Any, Any]]:
        """Reads and checks one shard of an artifact; a corrupt one is set aside and reported.

        Raises:
            CorruptArtifact: It has to be made again.
        """
        try:
            return artifact.load(shard)
        except CorruptArtifact as error:
            self.set_aside(artifact.path, str(error))
            raise

    def set_aside(self, path: Path, reason: str) -> None:
        """Moves a corrupt artifact out of the way (never deletes it) and reports it."""
        target = (
            self.root / "corrupt" / f"{path.parent.parent.name}-{path.name}-{temp_name().removeprefix(TEMP_PREFIX)}"
        )
        try:
            with disk_errors_named(f"to {target.parent}"):
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
        except FileNotFoundError:
            return  # another worker met it first
        stage, key = path.parent.parent.name, path.name
        message = f"corrupt {stage} artifact {key[:12]} ({reason}); set aside in {target}, to be made again"
        self.corrupt[stage, key] = message
        log.warning(message)

    def was_corrupt(self, stage: str, key: str) -> bool:
        """Whether this store object set the artifact aside."""
        return (stage, key) in self.corrupt

    def check(self, stage: str, path: Path) -> bool:
        """Reads every byte of an artifact; a corrupt one is set aside. Gives whether it is intact."""
        try:
            if artifact := _open(path):
                artifact.verify()
        except CorruptArtifact as error:
            self.set_aside(path, str(error))
        return not self.was_corrupt(stage, path.name)

    def garbage(self, used: set[str] | None = None) -> Iterator[Path]:
        """What can go without losing a result: half-built, corrupt, saved loops; and where `used` is given, other keys."""
        yield from (path for path in self._temporaries() if is_stale_temp(path) or is_forgotten_temp(path))
        yield from (path for folder in ("corrupt", "checkpoints") for path in self.root.glob(f"{folder}/[!.]*"))
        if used is not None:
            yield from (path for _, path in self.all() if path.name not in used)

    def remove(self, path: Path) -> None:
        """Removes something of the store, at once for everybody else; what is gone already was removed by another.

        Raises:
            EnvironmentFailure: It cannot be removed.
        """
        aside = self.root / path.relative_to(self.root).parts[0] / temp_name()
        with disk_errors_named(f"to {self.root}"):
            try:
                path.rename(aside)
            except FileNotFoundError:
                return
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)  # what NFS keeps for a reader is a stale temporary from now on
            else:
                aside.unlink()

    def remove_stale_temporaries(self) -> None:
        """Removes what killed processes of this machine left half-built."""
        remove_stale_temps(self._temporaries())

    def _temporaries(self) -> Iterator[Path]:
        """Everything half-built, of this and of other machines: a look into few folders, however many artifacts."""
        return self.root.glob(f"*/{TEMP_PREFIX}*")

    def about(self, stage: str, name: str, keys: Collection[str]) -> Iterator[str]:
        """Keys of a stage's artifacts whose `meta` says, under a name, that they belong to one of some other artifacts."""
        for path in self.root.glob(f"{stage}/??/*/{META}"):
            try:
                owner = json.loads(path.read_bytes())["content"]["meta"][name]
            except (OSError, ValueError, KeyError):
                continue  # corrupt: nobody misses it
            if owner in keys:
                yield path.parent.name

    def all(self) -> Iterator[tuple[str, Path]]:
        """Stage and folder of every artifact."""
        for path in self.root.glob("*/??/*"):
            if len(path.name) == 64 and path.is_dir():  # digests are files of such names
                yield path.parent.parent.name, path


class Draft:
    """An artifact in the making; see `ArtifactStore.draft`."""

    def __init__(self, store: ArtifactStore, temporary: Path, final: Path) -> None:
        self._store, self._temporary, self._final = store, temporary, final
        self._stamps: dict[str, Mapping[str, Any]] = {}

    def add(self, shard: str, tensors: Tensors) -> None:
        """Writes one shard."""
        self._stamps[f"{shard}.safetensors"] = _write_shard(self._temporary, shard, tensors)

    def publish(self, meta: Mapping[str, Any]) -> Artifact:
        """Makes it visible in one rename; see `ArtifactStore.publish`."""
        text = canonical_json({"format": FORMAT, "shards": self._stamps, "meta": meta})
        (self._temporary / META).write_text(_sealed(text), encoding="utf-8")
        content = json.loads(text)
        theirs = self._store.make_visible(self._temporary, self._final)
        return theirs or Artifact(self._final, content["meta"], content["shards"])


def _write_shard(folder: Path, name: str, tensors: Tensors) -> dict[str, Any]:
    data = safetensors.numpy.save(in_c_order(tensors))
    path = folder / f"{name}.safetensors"
    path.write_bytes(data)
    size, mtime_ns = _stamp(path)
    return {"size": size, "mtime_ns": mtime_ns, "sha256": sha256(data)}


def in_c_order(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    """The same tensors as safetensors needs them: it writes the bytes of transposed ones in the wrong order."""
    return {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _sealed(text: str) -> str:
    """Canonical JSON with its own checksum, so that a flipped byte in `meta.json` is noticed too."""
    return f'{{"content":{text},"sha256":"{sha256(text.encode())}"}}'


def _open(path: Path) -> Artifact | None:
    """The artifact of a folder, None where there is no folder."""
    if not (path / META).exists() and not path.exists():
        return None
    try:  # the folder is there, and so whole: it may have been published between the two looks
        sealed = json.loads(_read(path / META))
        content = sealed["content"]
        if sha256(canonical_json(content).encode()) != sealed["sha256"] or content["format"] != FORMAT:
            raise CorruptArtifact(f"{META} does not match its checksum")
        return Artifact(path, content["meta"], content["shards"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifact(f"{META}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in PASSING_ERRORS:
            raise EnvironmentFailure(f"cannot read {path}: {error.strerror}") from error
        raise CorruptArtifact(f"{path.name}: {error.strerror}") from error
