"""A whole manifest, how it is read, and errors that name file, line, key and the right word."""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from pnp_batch.errors import ManifestError, Problem
from pnp_batch.manifest.document import Loc, node_at, parse_yaml, problem_at, read_text
from pnp_batch.manifest.fields import Name, Value, empty_for_nothing
from pnp_batch.manifest.inputs import InputSpec
from pnp_batch.manifest.keys import AS_FRACTION, FOREIGN_KEYS, INPUT_ALIASES, SHARES_OF_STEPS, TOP_ALIASES
from pnp_batch.manifest.quality import EvaluationSpec, QualitySpec, column_of
from pnp_batch.manifest.run import RaySpec, RunSpec, SlurmSpec
from pnp_batch.manifest.settings import GenerateSpec, PromptSpec, Row, Settings, means_nothing

MAX_SHOWN = 60


class Manifest(Value):
    """A whole manifest. Relative paths are relative to the folder of its file, or to `base_dir` as seen from there (`base`)."""

    aliases = TOP_ALIASES

    version: Literal[1] = 1
    model: Name
    revision: Name | None = None
    variant: Name | None = None
    config: Name | None = None
    base_dir: Name | None = None
    output_dir: Name
    defaults: Annotated[Settings, BeforeValidator(empty_for_nothing)] = Settings()
    inputs: tuple[InputSpec, ...]
    run: Annotated[RunSpec, BeforeValidator(empty_for_nothing)] = RunSpec()
    evaluation: Annotated[EvaluationSpec, BeforeValidator(empty_for_nothing)] = EvaluationSpec()
    quality: QualitySpec | None = None

    @model_validator(mode="after")
    def _some_inputs(self) -> Manifest:
        if not self.inputs:
            raise PydanticCustomError("no_inputs", "the list of inputs is empty: write at least one")
        return self

    _path: Path = PrivateAttr(default=Path("manifest.yaml"))
    _root: yaml.Node | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path:
        """The file it was read from."""
        return self._path

    @property
    def base(self) -> Path:
        """The folder relative paths are relative to."""
        folder = self._path.absolute().parent
        return folder if self.base_dir is None else _joined(folder, self.base_dir)

    @property
    def output(self) -> Path:
        """The output folder, absolute."""
        return Path(os.path.normpath(self.located(self.output_dir)))

    @property
    def store(self) -> Path:
        """The folder of the artifact store, absolute."""
        if self.run.store is None:
            return self.output / "store"
        return Path(os.path.normpath(self.located(self.run.store)))

    def located(self, written: str) -> Path:
        """The absolute path of what the manifest calls `written`; `~` is the user's home."""
        return _joined(self.base, written)

    def to_json(self) -> str:
        """Everything but the inputs, which a worker gets package by package."""
        return self.model_dump_json(exclude={"inputs"}, exclude_unset=True)

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """What `to_json` gave of the manifest in a file. It is not read again: it may have been edited since."""
        some = [{"image": "-", "prompts": ["-"]}]  # a manifest without inputs is not valid
        manifest = cls.model_validate({**json.loads(text), "inputs": some}).model_copy(update={"inputs": ()})
        manifest._path = path
        return manifest

    def with_run(self, overrides: Mapping[str, Any]) -> Manifest:
        """This manifest with some of its `run` settings replaced, as the command line does.

        Raises:
            ManifestError: An override is unusable.
        """
        try:
            run = RunSpec.model_validate(self.run.given() | dict(overrides))
        except ValidationError as error:
            details = (_explain(Path("command line"), None, detail, RunSpec) for detail in error.errors())
            raise ManifestError([Problem(p.file, None, f"--{p.key}", p.message) for p in details]) from None
        return self.model_copy(update={"run": run})

    def problem(self, place: Loc | Row, message: str) -> Problem:
        """A problem with the value at a place, with its file and line."""
        if isinstance(place, Row):
            return Problem(place.file, place.line, "", message)
        return problem_at(self._path, self._root, place, message)

    def setting_problem(self, place: Loc | Row, setting: str, message: str) -> Problem:
        """A problem with a setting that holds at a prompt: there, at its input or in `defaults`, wherever it stands."""
        if isinstance(place, Row) and setting in place.given:
            return Problem(place.file, place.line, setting, message)
        own = place.loc if isinstance(place, Row) else place
        places: list[Loc] = [(*own, setting), (*own[:2], setting), ("defaults", setting)]
        written = (loc for loc in places if node_at(self._root, loc)[1] == len(loc))
        return self.problem(next(written, place), message)


def _joined(folder: Path, written: str) -> Path:
    path = os.path.expanduser(written)  # noqa: PTH111 - pathlib raises where a home is not known
    return Path(os.path.normpath(folder / path))


def load_manifest(path: Path | str) -> Manifest:
    """Reads and validates a manifest.

    Raises:
        ManifestError: With every problem of form found, each with its line.
    """
    path = Path(path)
    text = read_text(path)
    root, data = parse_yaml(path, text)
    if not isinstance(data, dict):
        raise ManifestError([Problem(str(path), 1, "", "a manifest is a mapping: model, output_dir, inputs, ...")])
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        raise ManifestError([_explain(path, root, detail) for detail in error.errors()]) from None
    manifest._path, manifest._root = path, root
    return manifest


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Settings from plain keywords (the Python front door), with the manifest's messages.

    Raises:
        ManifestError: An unknown or unusable setting, or one that means nothing to the method.
    """
    settings = _from_keywords(Settings, values)
    given, plain = settings.given(), Settings()
    meaningful = settings.meaningful()
    foreign = [name for name in given if name not in meaningful and given[name] != getattr(plain, name)]
    if foreign:
        raise ManifestError([Problem("settings", None, name, means_nothing(name, settings.method)) for name in foreign])
    return settings


def run_from(values: Mapping[str, Any]) -> RunSpec:
    """Run settings from plain keywords, likewise.

    Raises:
        ManifestError: An unknown or unusable one.
    """
    return _from_keywords(RunSpec, values)


V = TypeVar("V", bound=Value)


def _from_keywords(model: type[V], values: Mapping[str, Any]) -> V:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ManifestError([_explain(Path("settings"), None, detail, model) for detail in error.errors()]) from None


def prompt_from_row(row: Mapping[str, Any], file: Path, line: int) -> PromptSpec:
    """A prompt out of a row of a CSV or JSONL file.

    Raises:
        ManifestError: With the file and line of the row.
    """
    try:
        return PromptSpec.model_validate(dict(row))
    except ValidationError as error:
        details = [_explain(file, None, detail, PromptSpec) for detail in error.errors()]
        raise ManifestError([Problem(p.file, line, p.key, p.message) for p in details]) from None


_PLAIN_WORDS = {
    "missing": "'{key}' is missing",
    "tuple_type": "'{key}' should be a list",
    "model_type": "'{key}' should be a mapping (key: value)",
    "string_type": "'{key}' should be text; put it in quotes",
    "string_too_short": "'{key}' is empty",
    "byte_size": "'{key}' should be a size such as 50GB",
    "byte_size_unit": "'{key}' should be a size such as 50GB",
    "invalid_key": "a key should be text; put it in quotes",
}
_ENTRIES = {
    "inputs": "an input is a mapping: `image:`, `images:`, `video:` or `generate:`, and `prompts:`",
    "prompts": "a prompt is text (in quotes if it looks like a number, a date or yes) or a mapping with `prompt:`",
}


def _explain(path: Path, root: yaml.Node | None, detail: ErrorDetails, top: type[Value] = Manifest) -> Problem:
    """Turns one pydantic error into a sentence that says what would be right."""
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key, parent = (str(loc[-1]) if loc else ""), (loc[-2] if len(loc) > 1 else "")
    if kind == "extra_forbidden":
        message = _unknown_key(key, _model_at(loc[:-1], top))
    elif kind == "literal_error":
        message = _unknown_word(detail["input"], context["expected"])
    elif kind == "model_type" and parent in _ENTRIES:
        message = _ENTRIES[str(parent)]
    elif detail["input"] is None and kind != "invalid_key":
        message = f"'{key}' has no value"
    elif kind in _PLAIN_WORDS:
        message = _PLAIN_WORDS[kind].format(key=key)
    else:
        text = detail["msg"]
        message = text[0].lower() + text[1:] + _shown(detail["input"])
        if kind == "less_than_equal" and key in SHARES_OF_STEPS:
            message += f"; if it counts steps, write it {AS_FRACTION}"
    return problem_at(path, root, (*loc, context["key"]) if kind == "given_twice" else loc, message)


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return ""  # Python refuses to print numbers of thousands of digits
    return f" (got {_cut(repr(value))})" if isinstance(value, str | int | float) else ""


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _unknown_key(key: str, model: type[Value]) -> str:
    known = _keys_of(model)
    homes = (f"it belongs {place}" for place, model in _PLACES.items() if key in _keys_of(model))
    words = difflib.get_close_matches(key, [*known, *_HINTS], n=1, cutoff=0.6)
    near = (_HINTS.get(word) or f"did you mean '{model.aliases.get(word, word)}'?" for word in words)
    quotes = ("text that holds a colon needs quotes" for _ in [key] if " " in key)
    listed = (f"known here: {', '.join(name for name in known if name not in INPUT_ALIASES)}",)
    return f"unknown key '{_cut(key)}'; " + next(itertools.chain(homes, near, quotes, listed))


def _unknown_word(word: Any, expected: str) -> str:
    words = [w.strip(" '") for w in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(word), words, n=1)
    return f"this should be {' or '.join(words)}{_shown(word)}" + (f"; did you mean '{near[0]}'?" if near else "")


def _other_bounds() -> Iterator[tuple[str, str]]:
    """Thresholds from the wrong side, such as `max_psnr`, and what to say to them."""
    for name in (*QualitySpec.model_fields, *QualitySpec.aliases):
        if name != "retry":
            side, other = ("more", "max") if name.startswith("min") else ("less", "min")
            yield f"{other}_{column_of(name)}", f"{side} is better: {name}"


_HINTS = FOREIGN_KEYS | dict(_other_bounds())

_MAPPINGS: dict[str, type[Value]] = {
    "defaults": Settings,
    "run": RunSpec,
    "ray": RaySpec,
    "slurm": SlurmSpec,
    "evaluation": EvaluationSpec,
    "quality": QualitySpec,
    "retry": Settings,
    "inputs": InputSpec,
    "generate": GenerateSpec,
    "prompts": PromptSpec,
}


_PLACES: dict[str, type[Value]] = {
    "at the top of the manifest": Manifest,
    **{f"under `{name}`": model for name, model in _MAPPINGS.items()},
}


def _model_at(loc: Sequence[int | str], top: type[Value]) -> type[Value]:
    """What the mapping at `loc` is."""
    words = [part for part in loc if part in _MAPPINGS]
    return _MAPPINGS[str(words[-1])] if words else top


def _keys_of(model: type[Value]) -> list[str]:
    return [name for name in (*model.model_fields, *model.aliases) if name != "prompts_file"]
