"""What negative prompting does on plain, textureless guidance pictures (method.md, section 5), against the truth.

    python benchmarks/negative.py --scenes 24 --picture negative.png

Guidance pictures are silhouettes: an object and a background of one flat colour each. The target asks for a material and a
background with a texture; the negative prompt says what the guidance picture shows. What is measured of the results, with
the object's exact mask: whether the surfaces became what the prompt asks for (nearest centroid of colour and roughness, fitted
on rendered scenes), and their roughness over that of the same scene rendered.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from pnp_batch.manifest import load_manifest
from pnp_batch.shapes.scenes import SHAPES, Scene, caption, centre_range, render, stream
from pnp_batch.stages.outputs import Outputs

Array = NDArray[np.float64]

PLAIN = {"red": (224, 35, 31), "blue": (42, 72, 226), "green": (21, 175, 60), "yellow": (253, 225, 29)}
FLAT = {"snow": (228, 234, 243), "grey": (126, 128, 130)}
MATERIALS = ("gold", "striped", "checkered", "dotted")
BACKGROUNDS = ("grass", "brick", "water", "night")

SETTINGS: dict[str, dict[str, Any]] = {
    "no negative prompt": {"negative_alpha": 1.0},
    "alpha 0.5, constant": {"negative_alpha": 0.5},
    "alpha 1, linear": {"negative_alpha": 1.0, "negative_schedule": "linear"},
    "alpha 1, exp": {"negative_alpha": 1.0, "negative_schedule": "exp"},
    "alpha 0": {"negative_alpha": 0.0},
}


@dataclass(frozen=True)
class Case:
    """A silhouette and what it is to become."""

    plain: Scene
    target: Scene

    def silhouette(self) -> Image.Image:
        _, mask = render(self.plain)
        ground = Image.new("RGB", mask.shape[::-1], FLAT[self.plain.background])
        ground.paste(PLAIN[self.plain.material], mask=Image.fromarray(mask))
        return ground


def cases(count: int) -> list[Case]:
    found = []
    for seed in range(count):
        rng = stream(20_000 + seed, 0)
        radius = float(rng.uniform(15, 20))
        x, y = rng.uniform(*centre_range(radius), 2)
        shape, colour, flat, material, ground = (
            str(rng.choice(list(words))) for words in (SHAPES, PLAIN, FLAT, MATERIALS, BACKGROUNDS)
        )
        plain = Scene(shape, colour, flat, centre=(float(x), float(y)), radius=radius, seed=20_000 + seed)
        found.append(Case(plain, replace(plain, material=material, background=ground)))
    return found


def run(folder: Path, found: list[Case], defaults: Mapping[str, Any]) -> dict[tuple[int, str], Image.Image]:
    """All results by case and setting, made by the program itself."""
    inputs = []
    for number, case in enumerate(found):
        case.silhouette().save(folder / f"{number}.png")
        negative = {"prompt": caption(case.target), "negative_prompt": caption(case.plain)}
        inputs.append({"image": f"{number}.png", "prompts": [negative | each for each in SETTINGS.values()]})
    manifest = folder / "manifest.yaml"
    top = {"model": "builtin:shapes", "output_dir": "out", "defaults": dict(defaults), "inputs": inputs}
    manifest.write_text(yaml.safe_dump(top))
    subprocess.run([sys.executable, "-m", "pnp_batch.cli", "run", str(manifest)], check=True)
    names = {tuple(sorted(each.items())): name for name, each in SETTINGS.items()}
    results = {}
    for row in Outputs(load_manifest(manifest).output).rows():
        own = {key: row[key] for key in ("negative_alpha", "negative_schedule")}
        name = next(n for k, n in names.items() if {"negative_schedule": "constant"} | dict(k) == own)
        results[int(Path(row["source"]).stem), name] = Image.open(folder / "out" / row["file_name"]).convert("RGB")
    return results


def roughness(pixels: Array, region: NDArray[np.bool_]) -> float:
    """Mean absolute difference of luminance between neighbours that both lie in the region, in grey levels."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    inside_x, inside_y = region[:, 1:] & region[:, :-1], region[1:] & region[:-1]
    return float(np.concatenate([across[inside_x], down[inside_y]]).mean())


def regions(scene: Scene) -> dict[str, NDArray[np.bool_]]:
    """Object and background, both without the two pixels at the outline and the object's shadow."""
    inner, outer = (render(replace(scene, radius=scene.radius + grow))[1] for grow in (-2.5, 6.0))
    return {"material": inner > 250, "background": outer < 5}


def features(pixels: Array, region: NDArray[np.bool_]) -> Array:
    own = pixels[region]
    return np.array([*own.mean(0), *own.std(0), 3 * roughness(pixels, region)])


class Judge:
    """Names a surface by the nearest centroid of the features of rendered scenes."""

    def __init__(self, count: int = 24) -> None:
        self.centroids: dict[str, dict[str, tuple[Array, Array]]] = {"material": {}, "background": {}}
        known = {"material": (*PLAIN, *MATERIALS), "background": (*FLAT, *BACKGROUNDS)}
        for kind, word in ((kind, word) for kind, words in known.items() for word in words):
            rows = np.array([self._example(kind, word, seed) for seed in range(count)])
            self.centroids[kind][word] = rows.mean(0), rows.std(0) + 4

    def _example(self, kind: str, word: str, seed: int) -> Array:
        rng = stream(30_000 + seed, 0)
        base = Scene(
            str(rng.choice(SHAPES)), str(rng.choice(MATERIALS)), str(rng.choice(BACKGROUNDS)), radius=18, seed=seed
        )
        scene = replace(base, **{kind: word})
        return features(render(scene)[0].astype(float), regions(scene)[kind])

    def name(self, kind: str, found: Array) -> str:
        def distance(centroid: tuple[Array, Array]) -> float:
            mean, spread = centroid
            return float((((found - mean) / spread) ** 2).sum() + 2 * np.log(spread).sum())

        return min(self.centroids[kind], key=lambda word: distance(self.centroids[kind][word]))


def report(found: list[Case], results: Mapping[tuple[int, str], Image.Image]) -> None:
    """One line per setting: shares named as asked for, roughness over the truth's, and what it gained over no negative prompt."""
    print(f"{'':<24}{'named as asked':>16}{'roughness over that of the truth':>34}{'gained, paired':>30}")
    print(
        f"{'':<24}"
        + f"{'object':>8}{'backgr.':>8}"
        + f"{'object':>17}{'background':>17}"
        + f"{'object':>15}{'background':>15}"
    )
    judge = Judge()
    truth = {(n, "truth"): Image.fromarray(render(case.target)[0]) for n, case in enumerate(found)}
    base: dict[str, Array] = {}
    for name in ("truth", *SETTINGS):
        right: dict[str, list[bool]] = {"material": [], "background": []}
        rough: dict[str, list[float]] = {"material": [], "background": []}
        for (number, case), kind in product(enumerate(found), right):
            region = regions(case.target)[kind]
            wanted = features(np.asarray(truth[number, "truth"], float), region)
            own = features(np.asarray((truth | dict(results))[number, name], float), region)
            right[kind].append(judge.name(kind, own) == getattr(case.target, kind))
            rough[kind].append(own[-1] / wanted[-1])
        line = "".join(f"{np.mean(right[kind]):>8.2f}" for kind in right) + "  "
        line += "".join(f"{mean_and_interval(rough[kind]):>17}" for kind in right)
        if base:
            line += "".join(f"{mean_and_interval(rough[kind] - base[kind]):>15}" for kind in right)
        elif name != "truth":
            base = {kind: np.array(rough[kind]) for kind in right}
        print(f"{name:<22}{line}", flush=True)


def mean_and_interval(values: Any) -> str:
    """The mean and half of its 95% interval (normal)."""
    return f"{np.mean(values):.2f} ± {1.96 * np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def contact_sheet(found: list[Case], results: Mapping[tuple[int, str], Image.Image], rows: int = 6) -> Image.Image:
    side, gap = 128, 6
    sheet = Image.new("RGB", ((len(SETTINGS) + 1) * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for y in range(rows):
        for x, picture in enumerate((found[y].silhouette(), *(results[y, name] for name in SETTINGS))):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x * (side + gap), y * (side + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--f", type=float, default=1.0, help="pnp_f_t")
    parser.add_argument("--attn", type=float, default=1.0, help="pnp_attn_t")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = cases(arguments.scenes)
    defaults = {"guidance_scale": arguments.guidance, "pnp_f_t": arguments.f, "pnp_attn_t": arguments.attn}
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), found, defaults)
        report(found, results)
        if arguments.picture:
            contact_sheet(found, results).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
