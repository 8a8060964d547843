"""What a user writes: the YAML manifest as frozen values, and errors that name file, line, key and the nearest right word.

`load_manifest` reads and checks the form; what needs the files or the model is checked by `plan.check`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from pnp_batch.errors import ManifestError, Problem

Loc = tuple[int | str, ...]

MAX_YAML_NODES = 20_000_000  # after aliases are expanded: a few lines of YAML can otherwise stand for gigabytes

# Keys of the public PnP configurations and of their near relatives -> ours.
SETTING_ALIASES = {
    "n_timesteps": "num_inference_steps",
    "ddim_steps": "num_inference_steps",
    "num_ddim_sampling_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "scale": "guidance_scale",
    "inversion_steps": "num_inversion_steps",
    "source_prompt": "inversion_prompt",
    "negative_prompt_alpha": "negative_alpha",
    "negative_prompt_schedule": "negative_schedule",
    "H": "height",
    "W": "width",
}
INPUT_ALIASES = SETTING_ALIASES | {
    "init_img": "image",
    "image_path": "image",
    "target_prompts": "prompts",
    "prompt": "prompts",
}
GENERATE_ALIASES = {
    "source_prompt": "prompt",
    "scale": "guidance_scale",
    "ddim_steps": "num_inference_steps",
    "n_timesteps": "num_inference_steps",
    "steps": "num_inference_steps",
}
TOP_ALIASES = {"output_path": "output_dir", "model_id": "model", "model_key": "model"}

# Keys people bring from elsewhere that have no equal here, and what to write instead.
HINTS = {
    "strength": "PnP has no strength: how much of the source is kept is set by pnp_f_t and pnp_attn_t (0 to 1 each)",
    "feature_injection_threshold": "it counts steps in the original code; write pnp_f_t as a fraction (40 of 50 is 0.8)",
    "sd_version": "write `model:` with a hub id, a folder or a .safetensors file",
    "device": "write `run: {devices: cuda}`",
    "latents_path": "inversion latents are kept in the store by content; leave this out",
    "exp_name": "results are named after input and prompt; leave this out",
}

PROMPT_FILES = (".txt", ".csv", ".jsonl")


def _renamed(data: Any, aliases: Mapping[str, str]) -> Any:
    """Replaces alias keys in a mapping by ours; a key given under two names is an error, not a lottery."""
    if not isinstance(data, Mapping):
        return data
    renamed: dict[Any, Any] = {}
    for key, value in data.items():
        name = aliases.get(key, key)
        if name in renamed:
            raise PydanticCustomError("given_twice", "'{key}' is the same setting as '{name}'", {"key": key, "name": name})
        renamed[name] = value
    return renamed


def _off_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


def _as_layers(value: Any) -> Any:
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_layers)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=8, le=16384)]


class _Value(BaseModel):
    """A frozen value that refuses unknown keys and understands aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    aliases: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        return _renamed(data, cls.aliases)

    def given(self) -> dict[str, Any]:
        """The fields that were written, without the defaults."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class Settings(_Value):
    """Everything that changes a result. Names are diffusers' own; method.md's symbols in the field comments."""

    aliases = SETTING_ALIASES

    method: Literal["pnp"] = "pnp"
    height: Pixels | None = None
    width: Pixels | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 50
    guidance_scale: Finite = 7.5
    pnp_f_t: Fraction = 0.8
    pnp_attn_t: Fraction = 0.5
    pnp_f_layers: Layers | None = None
    pnp_attn_layers: Layers | None = None
    inversion_method: Literal["ddim"] = "ddim"
    num_inversion_steps: Annotated[int, Field(ge=1, le=1000)] = 999
    inversion_prompt: str = ""
    negative_prompt: str = ""
    negative_alpha: Fraction = 0.0
    negative_schedule: Literal["constant", "linear", "exp"] = "constant"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def layers(self, own: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The injection layers (f, A): as written, else the model's own."""
        f = own[0] if self.pnp_f_layers is None else self.pnp_f_layers
        attn = own[1] if self.pnp_attn_layers is None else self.pnp_attn_layers
        return tuple(sorted(set(f))), tuple(sorted(set(attn)))

    def overridden(self, *others: Settings) -> Settings:
        """These settings with what the others wrote on top, the last one winning."""
        update = {k: v for other in others for k, v in other.given().items() if k in Settings.model_fields}
        values = {name: getattr(self, name) for name in Settings.model_fields} | update
        return Settings.model_construct(**values)  # every value was validated where it was written


class PromptSpec(Settings):
    """A target prompt with settings of its own."""

    prompt: str

    @model_validator(mode="after")
    def _not_blank(self) -> PromptSpec:
        if not self.prompt.strip():
            raise PydanticCustomError("blank_prompt", "the prompt is empty")
        return self


class GenerateSpec(_Value):
    """A guidance image that is sampled from a prompt (method.md, section 6)."""

    aliases = GENERATE_ALIASES

    prompt: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    guidance_scale: Finite = 7.5
    negative_prompt: str = ""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None


INPUT_KINDS = ("image", "images", "generate")


class InputSpec(Settings):
    """One entry of `inputs`: exactly one of `image`, `images` or `generate`, and its prompts.

    `prompts` is a list, or the path of a .txt, .csv or .jsonl file, or left out where such a file stands beside the input.
    `root` anchors an explicit list of `images`: the tree below it is mirrored in the output.
    """

    aliases = INPUT_ALIASES

    image: str | None = None
    images: str | tuple[str, ...] | None = None
    root: str | None = None
    generate: GenerateSpec | None = None
    prompts: tuple[PromptSpec, ...] | None = None
    prompts_file: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_forms(cls, data: Any) -> Any:
        """Accepts a prompt as text or mapping, one or a list, or the path of a prompt file."""
        data = _renamed(data, cls.aliases)
        if not isinstance(data, dict):
            return data
        if "video" in data:
            raise PydanticCustomError("no_video", "video inputs are not supported yet; extract the frames into a folder and name it as `images:`")
        prompts = data.get("prompts")
        if isinstance(prompts, str) and prompts.lower().endswith(PROMPT_FILES):
            return {k: v for k, v in data.items() if k != "prompts"} | {"prompts_file": prompts}
        if isinstance(prompts, str | Mapping):
            prompts = [prompts]
        if isinstance(prompts, Sequence):
            data = data | {"prompts": [{"prompt": p} if isinstance(p, str) else p for p in prompts]}
        return data

    @model_validator(mode="after")
    def _one_kind(self) -> InputSpec:
        kinds = [kind for kind in INPUT_KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else "has none of them"
            raise PydanticCustomError(
                "input_kind", "an input is one of image, images or generate; this one {found}", {"found": found}
            )
        if self.prompts is not None and not self.prompts:
            raise PydanticCustomError("no_prompts", "the list of prompts is empty: write at least one")
        if self.generate and not (self.prompts or self.prompts_file):
            raise PydanticCustomError("no_prompts", "a generated input needs prompts")
        if self.root is not None and not isinstance(self.images, tuple):
            raise PydanticCustomError("root", "root goes with a list of images")
        return self


class RunSpec(_Value):
    """How to run, never what: nothing here changes a result (but `dtype`, which therefore is in every key)."""

    engine: Literal["local"] = "local"
    devices: str | int = "auto"
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    bank: Annotated[Literal["auto", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    store: str | None = None
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0


class Manifest(_Value):
    """A whole manifest. Relative paths are relative to the folder of its file (`base`)."""

    aliases = TOP_ALIASES

    version: Literal[1] = 1
    model: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    output_dir: str
    defaults: Settings = Settings()
    inputs: tuple[InputSpec, ...]
    run: RunSpec = RunSpec()

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
        return self._path.absolute().parent

    @property
    def output(self) -> Path:
        """The output folder, absolute."""
        return self.base / self.output_dir

    @property
    def store(self) -> Path:
        """The folder of the artifact store, absolute."""
        return self.base / self.run.store if self.run.store else self.output / "store"

    def problem(self, loc: Loc, message: str) -> Problem:
        """A problem with the value at `loc`, with its file and line."""
        return _problem(self._path, self._root, loc, message)

    def setting_problem(self, loc: Loc, setting: str, message: str) -> Problem:
        """A problem with a setting that holds at a prompt: at the prompt, its input or `defaults`, where it was written."""
        places: list[Loc] = [(*loc, setting), (*loc[:2], setting), ("defaults", setting)]
        written = (place for place in places if _node_at(self._root, place)[1] == len(place))
        return self.problem(next(written, loc), message)


def load_manifest(path: Path | str) -> Manifest:
    """Reads and validates a manifest.

    Raises:
        ManifestError: With every problem of form found, each with its line.
    """
    path = Path(path)
    text = _read_text(path)
    root, data = _parse_yaml(path, text)
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
        ManifestError: An unknown or unusable setting.
    """
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise ManifestError([_explain(Path("settings"), None, detail) for detail in error.errors()]) from None


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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ManifestError([Problem(str(path), None, "", f"no such file{hint}")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError([Problem(str(path), None, "", f"cannot be read: {error}")]) from None


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.absolute().parent.iterdir()] if path.absolute().parent.is_dir() else []


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _parse_yaml(path: Path, text: str) -> tuple[yaml.Node, Any]:
    """Composes and constructs the document; the node tree is kept for line numbers."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ManifestError([Problem(str(path), 1, "", "the file is empty")])
        if _expanded_size(root) > MAX_YAML_NODES:
            raise ManifestError([Problem(str(path), 1, "", "aliases expand to far too many values")])
        if duplicates := list(_duplicate_keys(path, root)):
            raise ManifestError(duplicates)
        return root, loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise ManifestError([Problem(str(path), line, "", f"not valid YAML: {error.problem or error}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError([Problem(str(path), None, "", f"not valid YAML: {error}")]) from None
    finally:
        loader.dispose()


def _expanded_size(root: yaml.Node) -> float:
    """Number of values the document stands for once aliases are expanded; infinite for one that contains itself."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # met again before it is known: it contains itself
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    return size(root)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (value for _, value in node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _duplicate_keys(path: Path, root: yaml.Node) -> Iterable[Problem]:
    """YAML lets the last of two equal keys win silently; a person never means that."""
    stack, seen_nodes = [root], set()
    while stack:
        node = stack.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        stack.extend(_children(node))
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                    yield Problem(str(path), key.start_mark.line + 1, key.value, "this key is given twice")
                seen.add(str(key.value))


def _same_key(written: str, wanted: int | str) -> bool:
    if written == wanted or (written == "prompts" and wanted == "prompts_file"):
        return True
    tables = (TOP_ALIASES, INPUT_ALIASES, GENERATE_ALIASES)
    return any(table.get(written) == wanted for table in tables)


def _node_at(root: yaml.Node | None, loc: Loc) -> tuple[int | None, int]:
    """Walks the node tree along `loc` as far as it goes: the 1-based line reached, and how many steps were taken."""
    node, line = root, root.start_mark.line + 1 if root is not None else None
    for depth, part in enumerate(loc):
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if _same_key(str(k.value), part)), None)
            if found is None:
                return line, depth
            node, line = found[1], found[0].start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line, depth
    return line, len(loc)


def _problem(path: Path, root: yaml.Node | None, loc: Loc, message: str) -> Problem:
    return Problem(str(path), _node_at(root, loc)[0], ".".join(map(str, loc)), message)


_PLAIN_WORDS = {
    "missing": "'{key}' is missing",
    "tuple_type": "'{key}' should be a list",
    "model_type": "'{key}' should be a mapping (key: value)",
    "string_type": "'{key}' should be text; put it in quotes",
}


def _explain(path: Path, root: yaml.Node | None, detail: ErrorDetails, top: type[_Value] = Manifest) -> Problem:
    """Turns one pydantic error into a sentence that says what would be right."""
    loc, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    key = str(loc[-1]) if loc else ""
    if kind == "extra_forbidden":
        message = _unknown_key(key, _fields_at(loc[:-1], top))
    elif kind == "literal_error":
        message = _unknown_word(detail["input"], context["expected"])
    elif kind in _PLAIN_WORDS:
        message = _PLAIN_WORDS[kind].format(key=key)
    else:
        text = detail["msg"]
        shown = f" (got {detail['input']!r})" if isinstance(detail["input"], str | int | float) else ""
        message = text[0].lower() + text[1:] + shown
    return _problem(path, root, loc, message)


def _unknown_key(key: str, known: Sequence[str]) -> str:
    if key in HINTS:
        return f"unknown key '{key}': {HINTS[key]}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(known)}")


def _unknown_word(word: Any, expected: str) -> str:
    words = [w.strip(" '") for w in expected.replace(" or ", ",").split(",")]
    near = difflib.get_close_matches(str(word), words, n=1)
    return f"{word!r} is not one of {', '.join(words)}" + (f"; did you mean '{near[0]}'?" if near else "")


def _fields_at(loc: Sequence[int | str], top: type[_Value]) -> list[str]:
    """The keys that may stand in the mapping at `loc`."""
    names = {"defaults": Settings, "run": RunSpec, "generate": GenerateSpec, "inputs": InputSpec, "prompts": PromptSpec}
    words = [part for part in loc if isinstance(part, str) and part in names]
    model = names[words[-1]] if words else top
    return [name for name in (*model.model_fields, *model.aliases) if name != "prompts_file"]
