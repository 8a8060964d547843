"""Benchmarks of the field as manifests, from the files as their authors publish them. Nothing of them is bundled.

- Wild-TI2I and ImageNet-R-TI2I (Tumanyan et al. 2023): YAML lists of `init_img` + `target_prompts`, or of `source_prompt`,
  `seed`, `scale`, `ddim_steps` + `target_prompts` for generated guidance images.
- PIE-Bench (Ju et al. 2023): `mapping_file.json` beside `annotation_images/`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from pnp_batch.errors import ManifestError, Problem
from pnp_batch.evaluation.columns import COLUMNS
from pnp_batch.evaluation.masks import PIE_FOLDER, read_mapping
from pnp_batch.evaluation.values import Unavailable
from pnp_batch.media.images import SUFFIXES

Input = dict[str, Any]

MAPPING = "mapping_file.json"
GENERATE_KEYS = {
    "source_prompt": "prompt",
    "seed": "seed",
    "scale": "guidance_scale",
    "ddim_steps": "num_inference_steps",
}

# ImageNet-R-TI2I's classes, each with target classes of a similar build, and its renditions. The authors sampled five
# combinations for each picture from lists of their own, which they have not published; these are ours.
TARGETS: Mapping[str, Sequence[str]] = {
    "castle": ("church", "temple", "lighthouse", "palace", "skyscraper"),
    "cat": ("dog", "fox", "tiger", "bear", "rabbit"),
    "goldfish": ("shark", "dolphin", "whale", "tuna", "piranha"),
    "hummingbird": ("parrot", "eagle", "owl", "robin", "seagull"),
    "husky": ("wolf", "poodle", "lion", "fox", "bear"),
    "jeep": ("truck", "van", "bus", "tractor", "sports car"),
    "panda": ("koala", "gorilla", "polar bear", "raccoon", "monkey"),
    "penguin": ("duck", "pelican", "parrot", "chicken", "puffin"),
    "pizza": ("cake", "pie", "pancake", "cookie", "burger"),
    "violin": ("guitar", "cello", "banjo", "harp", "ukulele"),
}
STYLES = ("photo", "painting", "sketch", "cartoon", "sculpture", "origami", "embroidery", "toy")
PROMPTS_PER_PICTURE = 5


def wild_ti2i(path: Path) -> dict[str, Any]:
    """Inputs of Wild-TI2I: its folder, or one of its YAML files.

    Raises:
        ManifestError: No such files, or entries that make no sense.
    """
    return {"inputs": list(_ti2i(path))}


def imagenet_r_ti2i(path: Path) -> dict[str, Any]:
    """Inputs of ImageNet-R-TI2I: its folder or YAML file; a folder of pictures alone gets prompts from templates.

    Raises:
        ManifestError: No such files, or entries that make no sense.
    """
    if path.is_dir() and not _yaml_files(path):
        return {"inputs": list(_templated(path))}
    return {"inputs": list(_ti2i(path))}


def pie_bench(path: Path) -> dict[str, Any]:
    """Inputs of PIE-Bench with its masks: its folder, or its mapping file. The tree keeps the editing types apart.

    Raises:
        ManifestError: No such files, or a picture is missing.
    """
    file = path / MAPPING if path.is_dir() else path
    root = file.parent.absolute() / PIE_FOLDER
    if not file.is_file():
        raise _wrong(file, "", "there is no such file; name PIE-Bench's folder or its mapping_file.json")
    try:
        entries = read_mapping(file)
    except Unavailable as error:
        raise _wrong(file, "", str(error)) from error
    inputs = []
    for name, entry in entries.items():
        if not (root / entry["image_path"]).is_file():
            raise _wrong(file, name, f"there is no {root / entry['image_path']}")
        original, target = (_unmarked(entry[key]) for key in ("original_prompt", "editing_prompt"))
        inputs.append(
            {"images": [entry["image_path"]], "root": str(root), "inversion_prompt": original, "prompts": [target]}
        )
    # All metrics: PIE-Bench's own structure distance is computed only where it is asked for, and its table shows that one.
    return {"inputs": inputs, "evaluation": {"metrics": list(COLUMNS), "masks": str(file.absolute())}}


BENCHMARKS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "wild-ti2i": wild_ti2i,
    "imagenet-r-ti2i": imagenet_r_ti2i,
    "pie-bench": pie_bench,
}


def as_manifest(benchmark: str, path: Path, model: str) -> str:
    """A whole manifest for a benchmark, as YAML with absolute paths, at the settings its authors ran.

    Args:
        benchmark: One of `BENCHMARKS`.
        path: Where its files lie.
        model: For the manifest.

    Raises:
        ManifestError: The files are not what the authors publish.
    """
    content = {
        "version": 1,
        "model": model,
        "output_dir": f"outputs/{benchmark}",
        "defaults": {"height": 512, "width": 512, "num_inference_steps": 50, "guidance_scale": 7.5},
        **BENCHMARKS[benchmark](path),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def template_prompts(
    source_class: str, targets: Iterable[str], styles: Iterable[str], count: int, seed: int = 0
) -> list[str]:
    """Prompts by ImageNet-R-TI2I's recipe: "a {style} of a {target class}", sampled from all combinations.

    Args:
        source_class: The class of the guidance picture, which joins the target classes (another style of the same thing).
        targets: Target classes.
        styles: Renditions.
        count: How many; all of them where there are fewer.
        seed: The same class and seed give the same prompts.
    """
    combinations = list(product(styles, (source_class, *targets)))
    chosen = random.Random(f"{source_class} {seed}").sample(combinations, min(count, len(combinations)))
    return [f"{_a(style)} of {_a(target)}" for style, target in chosen]


def _a(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeio' else 'a'} {noun}"


def _templated(folder: Path) -> Iterator[Input]:
    """Pictures as ImageNet-R names them, `<class>/<rendition>_<number>.jpg`, each with sampled prompts."""
    for number, picture in enumerate(_pictures(folder)):
        name = picture.parent.name.lower()
        if name not in TARGETS:
            known = ", ".join(TARGETS)
            raise _wrong(picture, "", f"no target classes are known for '{name}': its folder should be one of {known}")
        prompts = template_prompts(name, TARGETS[name], STYLES, PROMPTS_PER_PICTURE, number)
        yield {"images": [picture.relative_to(folder).as_posix()], "root": str(folder.absolute()), "prompts": prompts}


def _ti2i(path: Path) -> Iterator[Input]:
    files = [path] if path.is_file() else _yaml_files(path)
    if not files:
        raise _wrong(path, "", "no .yaml file of the benchmark is there")
    pictures = list(_pictures(files[0].parent))
    for file in files:
        entries = _read_yaml(file)
        if not isinstance(entries, list):
            raise _wrong(file, "", "a list of entries with `target_prompts` is expected")
        yield from (_ti2i_input(file, str(i), entry, pictures) for i, entry in enumerate(entries))


def _ti2i_input(file: Path, key: str, entry: Any, pictures: Sequence[Path]) -> Input:
    if not isinstance(entry, dict) or not isinstance(entry.get("target_prompts"), list):
        raise _wrong(file, key, "an entry has `target_prompts` and `init_img` or `source_prompt`")
    prompts = [str(prompt) for prompt in entry["target_prompts"]]
    if entry.get("init_img"):
        given = {"inversion_prompt": entry["source_prompt"]} if entry.get("source_prompt") else {}
        best = _found(str(entry["init_img"]), pictures)
        if len(best) != 1:
            where = f"below {file.parent.absolute()}"
            several = f"{entry['init_img']} may be any of these {where}: {', '.join(map(str, best))}"
            nothing = f"there is no {entry['init_img']} {where} (folder and file name have to agree)"
            raise _wrong(file, f"{key}.init_img", several if best else nothing)
        return {"image": str(best[0].absolute()), **given, "prompts": prompts}
    if not entry.get("source_prompt") or "seed" not in entry:
        raise _wrong(file, key, "it names neither a picture (`init_img`) nor how to make one (`source_prompt`, `seed`)")
    return {"generate": {ours: entry[key] for key, ours in GENERATE_KEYS.items() if key in entry}, "prompts": prompts}


def _found(written: str, pictures: Iterable[Path]) -> list[Path]:
    """The pictures whose paths end most like the one written: the authors' paths start at a folder of theirs, in another case.

    The file name alone is not enough where a folder is written: many classes have a `sketch_20.jpg`.
    """
    wanted = [part.lower() for part in Path(written).parts if part not in ("/", ".", "..")]
    least = min(len(wanted), 2)

    def agreement(picture: Path) -> tuple[int, int]:
        parts = [part.lower() for part in picture.absolute().parts]
        alike = next((n for n in range(len(wanted), 0, -1) if parts[-n:] == wanted[-n:]), 0)
        return alike, -len(parts)  # of equal ends the one that has less before it

    near = [picture for picture in pictures if agreement(picture)[0] >= least]
    return [picture for picture in near if agreement(picture) == max(map(agreement, near))]


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in (".yaml", ".yml"))


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _wrong(file, "", f"cannot be read: {error}") from error


def _unmarked(prompt: str) -> str:
    """PIE-Bench marks what changes with square brackets."""
    return " ".join(prompt.replace("[", "").replace("]", "").split())


def _wrong(path: Path, key: str, message: str) -> ManifestError:
    return ManifestError([Problem(str(path), None, key, message)])
