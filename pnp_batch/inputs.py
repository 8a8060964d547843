"""From the manifest's inputs to guidance images with their prompts: folders, globs, sidecars and prompt files.

Everything streams: a folder of a million pictures is never held as a list of more than its names.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pnp_batch.errors import ManifestError, Problem
from pnp_batch.manifest import (
    PROMPT_FILES,
    GenerateSpec,
    InputSpec,
    Loc,
    Manifest,
    PromptSpec,
    Settings,
    prompt_from_row,
)
from pnp_batch.media.images import SUFFIXES

ROW_FILE_KEYS = ("file_name", "image", "image_path", "init_img", "file")


@dataclass(frozen=True)
class Source:
    """One guidance image.

    Attributes:
        name: As in the manifest, or relative to its folder; what the user knows it by.
        stem: Where its results go below `images/`, without suffix.
        path: The file, or None for a generated one.
        generate: How to sample it, or None for a file.
        loc: Where in the manifest it comes from.
    """

    name: str
    stem: PurePosixPath
    path: Path | None
    generate: GenerateSpec | None
    loc: Loc


@dataclass(frozen=True)
class Translation:
    """One target prompt with all the settings that hold for it, and where in the manifest it stands."""

    prompt: str
    settings: Settings
    loc: Loc


@dataclass
class Expansion:
    """The sources of a manifest, and what was wrong or odd about them.

    Iterating fills `problems` and `warnings` as it goes on.
    """

    manifest: Manifest
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Source, tuple[Translation, ...]]]:
        for index, spec in enumerate(self.manifest.inputs):
            try:
                yield from self._input(spec, ("inputs", index))
            except ManifestError as error:
                self.problems.extend(error.problems)

    def _input(self, spec: InputSpec, loc: Loc) -> Iterator[tuple[Source, tuple[Translation, ...]]]:
        prompts = _Prompts(self.manifest, spec, loc)
        missing: list[str] = []
        for source in self._sources(spec, loc):
            specs = prompts.of(source)
            if specs:
                yield source, tuple(self._translation(spec, prompt, (*loc, "prompts", i)) for i, prompt in enumerate(specs))
            else:
                missing.append(source.name)
        if missing and prompts.by_file:
            self.warnings.append(
                f"{len(missing)} of the pictures have no row in {prompts.file} and are left out (first: {missing[0]})"
            )
        elif missing:
            raise self._error(
                loc, f"no prompts: write `prompts:`, or put {_sidecars(missing[0])} beside the pictures (first without: {missing[0]})"
            )
        for name in prompts.unused():
            self.problems.append(Problem(str(prompts.file), None, "", f"names {name}, which is not among the pictures"))

    def _translation(self, spec: InputSpec, prompt: PromptSpec, loc: Loc) -> Translation:
        return Translation(prompt.prompt, self.manifest.defaults.overridden(spec, prompt), loc)

    def _sources(self, spec: InputSpec, loc: Loc) -> Iterator[Source]:
        if spec.generate is not None:
            name = f"generate: {spec.generate.prompt} (seed {spec.generate.seed})"
            stem = PurePosixPath(f"{slug(spec.generate.prompt)}-seed{spec.generate.seed}")
            yield Source(name, stem, None, spec.generate, loc)
        elif spec.image is not None:
            path = self._existing(spec.image, (*loc, "image"))
            yield _file_source(spec.image, path, PurePosixPath(path.name), (*loc, "image"))
        elif isinstance(spec.images, tuple):
            yield from self._listed(spec, spec.images, (*loc, "images"))
        elif spec.images is not None:
            yield from self._folder_or_glob(spec.images, (*loc, "images"))

    def _existing(self, written: str, loc: Loc) -> Path:
        path = self.manifest.base / Path(written).expanduser()
        if path.is_dir():
            raise self._error(loc, f"{written} is a folder; write `images: {written}`")
        if not path.exists():
            raise self._error(loc, f"no such file: {path}")
        return path

    def _listed(self, spec: InputSpec, names: Sequence[str], loc: Loc) -> Iterator[Source]:
        root = Path(spec.root or ".")
        for index, name in enumerate(names):
            path = self._existing(str(root / name), (*loc, index))
            tree = PurePosixPath(name) if spec.root else PurePosixPath(path.name)
            yield _file_source(str(root / name), path, tree, (*loc, index))

    def _folder_or_glob(self, written: str, loc: Loc) -> Iterator[Source]:
        folder = self.manifest.base / Path(written).expanduser()
        if folder.is_dir():
            paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not _is_hidden(p, folder))
            shown = Path(written)
        elif glob.has_magic(written):
            folder, shown = _fixed_part(self.manifest.base, written)
            found = glob.iglob(str(self.manifest.base / Path(written).expanduser()), recursive=True)
            paths = sorted(p for p in map(Path, found) if p.suffix.lower() in SUFFIXES)
        else:
            kind = "is a file; write `image:` for it" if folder.is_file() else "no such folder, and no pattern with * or ?"
            raise self._error(loc, f"{written}: {kind}" if folder.is_file() else f"{kind}: {folder}")
        if not paths:
            raise self._error(loc, f"{written}: no pictures found ({', '.join(SUFFIXES)})")
        for path in paths:
            tree = path.relative_to(folder)
            yield _file_source((shown / tree).as_posix(), path, PurePosixPath(tree.as_posix()), loc)

    def _error(self, loc: Loc, message: str) -> ManifestError:
        return ManifestError([self.manifest.problem(loc, message)])


def slug(text: str, limit: int = 48) -> str:
    """A file-name-safe form of a prompt: letters and digits of any script, the rest dashes, cut at `limit` characters.

    Never empty, never hidden, never a path: it holds no dot and no slash.
    """
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    short = "-".join(words)[:limit]
    while len(short.encode()) > 2 * limit:  # file names are limited in bytes
        short = short[:-1]
    return short.strip("-") or "prompt"


def _file_source(name: str, path: Path, tree: PurePosixPath, loc: Loc) -> Source:
    parts = [part for part in tree.parent.parts if part not in ("..", ".", "/")]
    return Source(Path(name).as_posix(), PurePosixPath(*parts, tree.stem), path, None, loc)


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _fixed_part(base: Path, pattern: str) -> tuple[Path, Path]:
    """The folder above the first wildcard: absolute, and as written."""
    parts = Path(pattern).expanduser().parts
    fixed = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    return base / fixed, fixed


def _sidecars(name: str) -> str:
    return f"{Path(name).with_suffix('.txt').name} (or prompts.txt, prompts.csv, prompts.jsonl)"


class _Prompts:
    """The prompts of one input: written in the manifest, in a prompt file, or in sidecar files."""

    def __init__(self, manifest: Manifest, spec: InputSpec, loc: Loc) -> None:
        self._manifest, self._spec, self._loc = manifest, spec, loc
        self._used: set[str] = set()

    def of(self, source: Source) -> Sequence[PromptSpec]:
        """The prompts of one source, empty where there are none."""
        if self._spec.prompts is not None:
            return self._spec.prompts
        if self.file is None:
            return self._sidecar(source)
        found = list(self._common)
        for name in self._names(source):
            if name in self.by_file:
                self._used.add(name)
                found += self.by_file[name]
        return found

    def unused(self) -> list[str]:
        """File names in the prompt file that no source answers to."""
        return [name for name in self.by_file if name not in self._used] if self._spec.prompts is None else []

    @cached_property
    def file(self) -> Path | None:
        """The prompt file that was named, or that stands in or beside the folder."""
        if self._spec.prompts is not None:
            return None
        if self._spec.prompts_file is not None:
            path = self._manifest.base / self._spec.prompts_file
            if not path.is_file():
                raise ManifestError([self._manifest.problem((*self._loc, "prompts"), f"no such prompt file: {path}")])
            return path
        if not isinstance(self._spec.images, str):
            return None
        folder = self._manifest.base / self._spec.images
        if not folder.is_dir():
            folder = _fixed_part(self._manifest.base, self._spec.images)[0]
        inside = [folder / f"{name}{suffix}" for name in ("prompts", "metadata") for suffix in PROMPT_FILES]
        beside = [folder.parent / f"{folder.name}{suffix}" for suffix in PROMPT_FILES]
        return next((path for path in (*inside, *beside) if path.is_file()), None)

    @property
    def by_file(self) -> Mapping[str, list[PromptSpec]]:
        """Prompts of rows that name a file."""
        return self._rows[1]

    @property
    def _common(self) -> list[PromptSpec]:
        return self._rows[0]

    @cached_property
    def _rows(self) -> tuple[list[PromptSpec], dict[str, list[PromptSpec]]]:
        common: list[PromptSpec] = []
        by_file: dict[str, list[PromptSpec]] = {}
        for name, prompt in read_prompts(self.file) if self.file else ():
            (common if name is None else by_file.setdefault(name, [])).append(prompt)
        return common, by_file

    def _names(self, source: Source) -> set[str]:
        """What a row may call this source: its path in the folder, its path as in the manifest, or its absolute path."""
        if source.path is None:
            return set()
        in_tree = source.stem.with_name(source.path.name).as_posix()
        return {in_tree, source.name, str(source.path)}

    def _sidecar(self, source: Source) -> Sequence[PromptSpec]:
        path = source.path.with_suffix(".txt") if source.path else None
        return [prompt for _, prompt in read_prompts(path)] if path and path.is_file() else ()


def read_prompts(file: Path) -> Iterator[tuple[str | None, PromptSpec]]:
    """Rows of a prompt file: the picture a row names (or None for all of them) and the prompt.

    A .txt holds one prompt a line (# starts a comment); a .csv has a header, a .jsonl one object a line, both with a
    `prompt` column, optionally `file_name`, and any settings.

    Raises:
        ManifestError: With file and line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([Problem(str(file), None, "", f"cannot be read: {error}")]) from None
    rows = 0
    for line, row in _READERS[file.suffix.lower()](file, text):
        name = next((str(row.pop(key)) for key in ROW_FILE_KEYS if row.get(key)), None)
        rows += 1
        yield name, prompt_from_row(row, file, line)
    if not rows:
        raise ManifestError([Problem(str(file), None, "", "holds no prompt")])


def _txt_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.splitlines(), 1):
        if content.strip() and not content.lstrip().startswith("#"):
            yield line, {"prompt": content.strip()}


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True))
    for row in reader:
        if None in row:
            raise ManifestError([Problem(str(file), reader.line_num, "", "more cells than the header has columns")])
        yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}


def _jsonl_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise ManifestError([Problem(str(file), line, "", f"not valid JSON: {error}")]) from None
        if not isinstance(row, dict):
            raise ManifestError([Problem(str(file), line, "", "each line must be an object with a prompt")])
        yield line, row


_READERS = {".txt": _txt_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
