"""Where the weights of a metric lie: a folder, or a hub id that is cached or can be downloaded. Safetensors only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pnp_batch import hub
from pnp_batch.evaluation.columns import BACKBONES
from pnp_batch.evaluation.values import Unavailable
from pnp_batch.manifest import Manifest
from pnp_batch.store import DigestCache, key_of

PATTERNS = ["*.json", "*.txt", "*.safetensors"]
# What a download of each kind has besides its weights, once it is complete.
BESIDES: Mapping[str, Sequence[str]] = {
    "dino": ("config.json", "preprocessor_config.json"),
    "clip": ("config.json", "preprocessor_config.json", "tokenizer_config.json"),
    "lpips": (),
}


@dataclass(frozen=True)
class Backbone:
    """Weights on this machine.

    Attributes:
        name: As in the manifest.
        path: The folder, or the one file.
        fingerprint: Of all their bytes, for keys.
    """

    name: str
    path: Path
    fingerprint: str


def locate(kind: str, name: str, base: Path, digests: DigestCache) -> Backbone:
    """Finds weights by what the manifest calls them.

    Args:
        kind: `dino`, `clip` or `lpips`.
        name: A folder or a `.safetensors` file (relative to `base`), or a hub id.
        base: The manifest's folder.
        digests: Cache of file digests.

    Raises:
        Unavailable: They are not here and cannot be had, or hold no safetensors.
    """
    path = base / Path(name).expanduser()
    if not path.exists():
        path = _from_hub(kind, name, path)
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".txt", ".safetensors"))
    )
    if not any(file.suffix == ".safetensors" for file in files):
        raise Unavailable(
            f"{path} holds no .safetensors file, and nothing else is read (a pickle can run code); convert it with "
            "transformers: AutoModel.from_pretrained(it).save_pretrained(folder)"
        )
    return Backbone(
        name, path, key_of({file.name: digests.of(file, "bytes", partial(_sha256, file)) for file in files})
    )


def _from_hub(kind: str, name: str, path: Path) -> Path:
    def is_whole(folder: Path) -> bool:
        return any(folder.glob("*.safetensors")) and all((folder / file).exists() for file in BESIDES[kind])

    try:
        return hub.snapshot(name, PATTERNS, is_whole)
    except hub.NoHubId:
        raise Unavailable(f"there is no {path}, and '{name}' is no hub id (owner/name)") from None
    except hub.NotHere as error:
        raise Unavailable(
            f"cannot get the weights '{name}': {error}. Run once with network, or name a folder"
        ) from error


def of_evaluation(manifest: Manifest, digests: DigestCache) -> Iterator[tuple[str, Backbone | str]]:
    """The weights that the metrics of a manifest's `evaluation` need, by kind; in words why some cannot be had.

    A manifest that does not speak of evaluation needs none, although `pnp-batch evaluate` has defaults.
    """
    spec = manifest.evaluation
    metrics = spec.metrics if "evaluation" in manifest.model_fields_set else ()
    for kind in dict.fromkeys(BACKBONES[metric] for metric in metrics if metric in BACKBONES):
        name = getattr(spec, kind)
        if name is None:
            continue
        try:
            yield kind, locate(kind, name, manifest.base, digests)
        except Unavailable as error:
            yield kind, str(error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
