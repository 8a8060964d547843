"""From the manifest's inputs to guidance images with their prompts: folders, globs, sidecars and prompt files.

Everything streams: a folder of a million pictures is never held as a list of more than its names.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
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
    Row,
    Settings,
    VideoSpec,
    near_file,
    prompt_from_row,
)
from pnp_batch.media.images import SUFFIXES, VIDEO_SUFFIXES
from pnp_batch.names import counted, listed
from pnp_batch.store.keys import key_of

FOREIGN_DELIMITERS = {";": "semicolons", "\t": "tabs"}  # of columns, as some spreadsheets write them
ROW_FILE_KEYS = ("file_name", "image", "image_path", "init_img", "file")

# What this program writes below `output_dir` and a later run could take for its inputs.
PRODUCTS = ("images", "videos", "inspect")
ROWS_FILE = "metadata.jsonl"
# Every run writes these two, so a folder with both is one's `output_dir`.
PROGRESS_FILE, LOG_FILE = "progress.json", "run.log"


@dataclass(frozen=True)
class Source:
    """One guidance image.

    Attributes:
        name: As in the manifest, or relative to its folder; what the user knows it by.
        stem: Where its results go below `images/`, without suffix; never absolute, never hidden, without `..`.
        path: The file, or None for a generated one.
        generate: How to sample it, or None for a file.
        loc: Where in the manifest it comes from.
        video: Which of its frames, where `path` is a video (a file, or a folder of numbered pictures).
    """

    name: str
    stem: PurePosixPath
    path: Path | None
    generate: GenerateSpec | None
    loc: Loc
    video: VideoSpec | None = None

    @property
    def place(self) -> tuple[Loc, str]:
        """Where in the manifest it stands: an input may hold many, and two inputs the same one."""
        return self.loc, self.name


@dataclass(frozen=True)
class Translation:
    """One target prompt with all the settings that hold for it, and where it stands."""

    prompt: str
    settings: Settings
    loc: Loc | Row

    @cached_property
    def id(self) -> str:
        """What it is called, whatever picture it is applied to: prompt and settings."""
        return key_of({"prompt": self.prompt, **self.settings.meaningful()})


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
        without: list[str] = []
        shared: tuple[Any, tuple[Translation, ...]] = (None, ())  # a folder's pictures mostly share their prompts
        for source in self._sources(spec, loc):
            try:
                found = prompts.of(source)
            except ManifestError as error:
                self.problems.extend(error.problems)
                continue
            if found:
                if found is not shared[0]:
                    shared = found, tuple(self._translation(spec, prompt, place) for prompt, place in found)
                yield source, shared[1]
            else:
                without.append(_name_in_rows(source))
        self.problems.extend(prompts.unused(without))
        if without and prompts.by_file:
            missing = counted(len(without), "picture")
            self.warnings.append(f"{prompts.file} has no row for {missing}, left out here: {listed(without)}")
        elif without:
            files = f"{PurePosixPath(without[0]).stem}.txt (or prompts.txt, prompts.csv, prompts.jsonl)"
            hint = f"write `prompts:`, or put {files} beside the pictures"
            raise self._error(loc, f"no prompts: {hint} (without: {listed(without)})")

    def _translation(self, spec: InputSpec, prompt: PromptSpec, place: Loc | Row) -> Translation:
        return Translation(prompt.prompt, self.manifest.defaults.overridden(spec, prompt).settled(), place)

    def _sources(self, spec: InputSpec, loc: Loc) -> Iterator[Source]:
        if spec.generate is not None:
            name = f"generate: {spec.generate.prompt} (seed {spec.generate.seed})"
            stem = PurePosixPath(f"{slug(spec.generate.prompt)}-seed{spec.generate.seed}")
            yield Source(name, stem, None, spec.generate, loc)
        elif spec.image is not None:
            path = self._picture(spec, spec.image, (*loc, "image"))
            yield _file_source(Path(spec.image).as_posix(), path, path.name, (*loc, "image"))
        elif spec.video is not None:
            yield self._video(spec, spec.video, (*loc, "video"))
        elif isinstance(spec.images, tuple):
            yield from self._listed(spec, spec.images, (*loc, "images"))
        elif spec.images is not None:
            yield from self._folder_or_glob(spec.images, (*loc, "images"))

    def _video(self, spec: InputSpec, written: str, loc: Loc) -> Source:
        path = self.manifest.located(written)
        if not _is_folder(path):
            path = self._named(spec, written, loc)
            if "fps" in spec.model_fields_set:
                raise self._error(loc, f"fps is for a folder of numbered pictures; {written} knows its own")
            if _is_picture(written) and not written.lower().endswith(VIDEO_SUFFIXES):
                raise self._error(loc, f"{written} is a picture; write `image: {written}`")
        return replace(_file_source(Path(written).as_posix(), path, path.name, loc), video=spec.of_video)

    def _named(self, spec: InputSpec, written: str, loc: Loc) -> Path:
        """A file that the manifest names."""
        return self.manifest.located(written) if spec.missing == "fail" else self._existing(written, loc)

    def _picture(self, spec: InputSpec, written: str, loc: Loc) -> Path:
        path = self._named(spec, written, loc)
        if written.lower().endswith(VIDEO_SUFFIXES) and not _is_picture(written):
            raise self._error(loc, f"{written} is a video; write `video: {written}`")
        return path

    def _existing(self, written: str, loc: Loc) -> Path:
        path = self.manifest.located(written)
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            hint = "; a pattern goes under `images:`" if glob.has_magic(written) else near_file(path)
            raise self._error(loc, f"no such file: {path}{hint}") from None
        except OSError as error:
            raise self._error(loc, f"{path} cannot be read: {error.strerror}") from None
        if stat.S_ISDIR(mode):
            raise self._error(loc, f"{written} is a folder; write `images: {written}`")
        if not stat.S_ISREG(mode) or not os.access(path, os.R_OK):
            kind = "permission denied" if stat.S_ISREG(mode) else "not an ordinary file"
            raise self._error(loc, f"{path} cannot be read: {kind}")
        return path

    def _listed(self, spec: InputSpec, names: Sequence[str], loc: Loc) -> Iterator[Source]:
        root = Path(spec.root or ".")
        for index, name in enumerate(names):
            try:
                path = self._picture(spec, str(root / name), (*loc, index))
            except ManifestError as error:
                self.problems.extend(error.problems)
            else:
                tree = PurePosixPath(name if spec.root else path.name)
                yield _file_source((root / name).as_posix(), path, str(tree), (*loc, index))

    def _folder_or_glob(self, written: str, loc: Loc) -> Iterator[Source]:
        shown, pattern = _split_at_wildcard(written)
        if _is_folder(self.manifest.located(written)):  # a folder's name may look like a pattern
            shown, pattern = Path(written), ""
        folder = self.manifest.located(str(shown))
        self._check_folder(folder, written, loc)
        trees = self._glob(folder, pattern) if pattern else self._walk(folder, loc)
        count, said = 0, len(self.warnings)
        for tree in trees:
            if _is_unicode(tree):
                count += 1
                yield _file_source(tree if shown == Path() else f"{shown}/{tree}", folder / tree, tree, loc)
            else:
                self.warnings.append(f"{tree!a} in {folder} is left out: its name is not valid UTF-8")
        if not count:
            why = "".join(f"; {warning}" for warning in self.warnings[said:])
            raise self._error(loc, f"{written}: no pictures found ({', '.join(SUFFIXES)}){why}")

    def _check_folder(self, folder: Path, written: str, loc: Loc) -> None:
        if not _is_folder(folder):
            missing = f"no such folder: {folder}{near_file(folder)}"
            raise self._error(loc, f"{written} is a file; write `image: {written}`" if _is_file(folder) else missing)
        if any(set(own.parts) <= {".."} for own in self._products_below(folder)):  # the way there leads up only
            raise self._error(loc, f"{written}: the results would land among these pictures; change output_dir")

    def _walk(self, folder: Path, loc: Loc) -> Iterator[str]:
        """Pictures below a folder, in a fixed order; neither hidden ones nor what this manifest's runs write.

        Links to folders are not followed: they may lead round in circles, or to one picture under two names.
        """

        def refuse(error: OSError) -> None:
            raise self._error(loc, f"{error.filename} cannot be read: {error.strerror}")

        own = self._products_below(folder)
        links: list[str] = []
        foreign: list[str] = []
        for place, folders, names in os.walk(folder, onerror=refuse):
            below = PurePosixPath(place).relative_to(folder)
            folders[:] = sorted(name for name in folders if name[0] != "." and below / name not in own)
            if {PROGRESS_FILE, LOG_FILE} <= set(names):
                foreign += (f"{below / name}" for name in folders if name in PRODUCTS)
                folders[:] = [name for name in folders if name not in PRODUCTS]
            links += (f"{below / name}" for name in folders if _is_link(f"{place}/{name}"))
            above = "" if below == PurePosixPath() else f"{below}/"
            yield from (above + name for name in sorted(names) if name[0] != "." and _is_picture(name))
        if links:
            what = f"in {folder} links to folders are not followed ({len(links)}, first: {links[0]!a})"
            self.warnings.append(f"{what}; give each an entry of its own in `inputs`")
        self._say_foreign(folder, foreign)

    def _glob(self, folder: Path, pattern: str) -> Iterator[str]:
        own = tuple(f"{product}/" for product in self._products_below(folder))
        is_output = cache(_is_output)
        foreign: dict[str, None] = {}
        found = glob.iglob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 - Path.glob refuses "a**b"
        for tree in sorted(set(filter(_is_picture, found))):
            if tree.startswith(own) or _is_folder(f"{folder}/{tree}"):
                continue
            if product := _product_around(tree, lambda place: is_output(f"{folder}/{place}")):
                foreign[product] = None
            else:
                yield tree
        self._say_foreign(folder, list(foreign))

    def _say_foreign(self, folder: Path, products: Sequence[str]) -> None:
        """What other manifests' runs wrote is no input unless it is named: it would become one while they go on."""
        if products:
            what = (
                f"in {folder} what another manifest's runs wrote is left out ({len(products)}, first: {products[0]!a})"
            )
            self.warnings.append(f"{what}; give each folder an entry of its own in `inputs` to take it")

    def _products_below(self, folder: Path) -> tuple[PurePosixPath, ...]:
        """Where this manifest's own products lie, seen from a folder: a second run must not take them for inputs."""
        products = (os.path.realpath(self.manifest.output / name) for name in PRODUCTS)
        return tuple(PurePosixPath(os.path.relpath(product, os.path.realpath(folder))) for product in products)

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


def _file_source(name: str, path: Path, tree: str, loc: Loc) -> Source:
    # Text rather than paths: a million pictures pass here, and a path object costs as much as all the rest.
    above, _, file = tree.rpartition("/")
    if tree.startswith("/") or ".." in above.split("/"):
        above = ""
    stem = os.path.splitext(file)[0].lstrip(".") or "picture"  # noqa: PTH122
    return Source(name, PurePosixPath(above, stem), path, None, loc)


def _is_output(folder: str | Path) -> bool:
    """Whether a folder is the `output_dir` of some manifest that was run."""
    return all(_is_file(Path(folder, name)) for name in (PROGRESS_FILE, LOG_FILE))


def _holds_rows(file: Path, own: str) -> bool:
    """Whether a file is the list of results of an earlier run, of the manifest's own or of another: these are no prompts."""
    return file.name == ROWS_FILE and (os.path.realpath(file.parent) == own or _is_output(file.parent))


def _product_around(tree: str, is_output: Callable[[str], bool]) -> str | None:
    """The folder of a run's products that a picture lies in, if it lies in one."""
    parts = tree.split("/")[:-1]
    places = (n for n, part in enumerate(parts) if part in PRODUCTS and is_output("/".join(parts[:n])))
    return next(("/".join(parts[: n + 1]) for n in places), None)


def _is_folder(path: str | Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 - pathlib raises where a name is too long or a folder closed


def _is_link(path: str) -> bool:
    return os.path.islink(path)  # noqa: PTH114 - text, as everywhere in a walk over a million names


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - as above


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_unicode(name: str) -> bool:
    """Whether a file name can be written into a manifest, a table or a report; names on Linux are any bytes."""
    return name.isascii() or not any("\udc80" <= c <= "\udcff" for c in name)


def _split_at_wildcard(written: str) -> tuple[Path, str]:
    """The folder above the first wildcard, and the pattern below it (empty where there is no wildcard)."""
    parts = Path(written).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:fixed]), str(Path(*parts[fixed:])) if fixed < len(parts) else ""


def _name_in_rows(source: Source) -> str:
    """What a row of a prompt file calls a source: its path in its folder."""
    return source.name if source.path is None else source.stem.with_name(source.path.name).as_posix()


class _Prompts:
    """The prompts of one input: written in the manifest, in a prompt file, or in sidecar files.

    Raises:
        ManifestError: The prompt file is missing or wrong.
    """

    def __init__(self, manifest: Manifest, spec: InputSpec, loc: Loc) -> None:
        self._manifest, self._spec, self._loc = manifest, spec, loc
        written = enumerate(spec.prompts or ())
        self._written = None if spec.prompts is None else [(prompt, (*loc, "prompts", i)) for i, prompt in written]
        self._common: list[tuple[PromptSpec, Row]] = []
        self._used: set[str] = set()
        self.by_file: dict[str, list[tuple[PromptSpec, Row]]] = {}
        self.file = None if spec.prompts is not None else self._find_file()
        for name, prompt, row in self._read(self.file) if self.file else ():
            (self._common if name is None else self.by_file.setdefault(name, [])).append((prompt, row))

    def of(self, source: Source) -> Sequence[tuple[PromptSpec, Loc | Row]]:
        """The prompts of one source and where each stands, empty where there are none.

        Raises:
            ManifestError: Its sidecar file is wrong.
        """
        if self._written is not None:
            return self._written
        if self.file is None:
            return self._sidecar(source)
        names = {_name_in_rows(source), source.name, str(source.path)} & self.by_file.keys()
        self._used |= names
        if not names:
            return self._common
        return [*self._common, *(each for name in sorted(names) for each in self.by_file[name])]

    def unused(self, without: Sequence[str]) -> list[Problem]:
        """Rows that name a picture which is not there; `without` are the pictures no row names."""
        problems = []
        for name in self.by_file.keys() - self._used:
            near = difflib.get_close_matches(name, without, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            place = self.by_file[name][0][1]
            problems.append(Problem(place.file, place.line, "", f"{name} is not among the pictures{hint}"))
        return sorted(problems, key=lambda problem: problem.line or 0)

    def _find_file(self) -> Path | None:
        """The prompt file that was named, or that stands in or beside the folder."""
        spec = self._spec
        if spec.prompts_file is not None:
            path = self._manifest.located(spec.prompts_file)
            if not _is_file(path):
                message = f"no such prompt file: {path}{near_file(path)}"
                raise ManifestError([self._manifest.problem((*self._loc, "prompts"), message)])
            return path
        if not isinstance(spec.images, str):
            return None
        folder = self._manifest.located(spec.images)
        if not _is_folder(folder):
            folder = self._manifest.located(str(_split_at_wildcard(spec.images)[0]))
        inside = [folder / f"{name}{suffix}" for name in ("prompts", "metadata") for suffix in PROMPT_FILES]
        beside = [folder.parent / f"{folder.name}{suffix}" for suffix in PROMPT_FILES]
        own = os.path.realpath(self._manifest.output)
        files = (file for file in (*inside, *beside) if _is_file(file))
        return next((file for file in files if not _holds_rows(file, own)), None)

    def _sidecar(self, source: Source) -> Sequence[tuple[PromptSpec, Row]]:
        path = source.path.with_suffix(".txt") if source.path else None
        return [(prompt, row) for _, prompt, row in self._read(path)] if path and _is_file(path) else ()

    def _read(self, file: Path) -> Iterator[tuple[str | None, PromptSpec, Row]]:
        for name, prompt, line in read_prompts(file):
            yield name, prompt, Row(str(file), line, frozenset(prompt.given()), self._loc)


def read_prompts(file: Path) -> Iterator[tuple[str | None, PromptSpec, int]]:
    """Rows of a prompt file: the picture a row names (or None for all of them), the prompt, and its line.

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
        name = _pop_file_name(row)
        rows += 1
        yield name, prompt_from_row(row, file, line), line
    if not rows:
        raise ManifestError([Problem(str(file), None, "", "holds no prompt")])


def _pop_file_name(row: dict[str, Any]) -> str | None:
    for key in ROW_FILE_KEYS:
        if name := row.pop(key, None):
            return PurePosixPath(str(name)).as_posix()  # "./a.png" is "a.png"
    return None


def _txt_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip() and not content.lstrip().startswith("#"):
            yield line, {"prompt": content.strip()}


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ManifestError([Problem(str(file), 1, twice, "this column is given twice")])
        if wrong := next((word for sign, word in FOREIGN_DELIMITERS.items() if sign in "".join(names)), None):
            what = f"the columns are separated by {wrong}; write commas, with cells that hold some in double quotes"
            raise ManifestError([Problem(str(file), 1, "", what)])
        reader.fieldnames = names
        for row in reader:
            if None in row:
                raise ManifestError([Problem(str(file), reader.line_num, "", "more cells than the header has columns")])
            if cells := {key: value.strip() for key, value in row.items() if value and value.strip()}:
                yield reader.line_num, cells
    except csv.Error as error:
        raise ManifestError([Problem(str(file), reader.line_num, "", f"not valid CSV: {error}")]) from None


def _jsonl_rows(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ManifestError([Problem(str(file), line, "", f"not valid JSON: {error}")]) from None
        if not isinstance(row, dict):
            raise ManifestError([Problem(str(file), line, "", "each line must be an object with a prompt")])
        yield line, row


_READERS = {".txt": _txt_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
