"""What negative prompting does on plain, textureless guidance pictures (method.md, section 5), against the truth.

    python benchmarks/negative.py --scenes 32 --picture negative.png

Guidance pictures are silhouettes: an object and a background of one flat colour each. The target asks for a material and a
background with a texture; the negative prompt says what the guidance picture shows. What is measured of the results: whether the
judge of the shapes benchmark reads the surfaces that the prompt asks for, how well its mask of the object agrees with the true
one, and the surfaces' roughness over that of the same scene rendered. Gains are over no negative prompt, scene by scene.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from pnp_batch.evaluation.summary import summarised
from pnp_batch.manifest import load_manifest
from pnp_batch.media.images import Pixels
from pnp_batch.shapes.judge import Reading, accuracy, iou, load_judge, read
from pnp_batch.shapes.pages import judged
from pnp_batch.shapes.scenes import SHAPES, Scene, caption, centre_range, render, stream
from pnp_batch.stages.outputs import Outputs

PLAIN = {"red": (224, 35, 31), "blue": (42, 72, 226), "green": (21, 175, 60), "yellow": (253, 225, 29)}
FLAT = {"snow": (228, 234, 243), "grey": (126, 128, 130)}
MATERIALS = ("gold", "striped", "checkered", "dotted")
BACKGROUNDS = ("grass", "brick", "water", "night")

NONE = "none"
SETTINGS: dict[str, dict[str, Any]] = {
    NONE: {"negative_alpha": 1.0},
    "alpha 0.5, constant": {"negative_alpha": 0.5},
    "alpha 1, linear": {"negative_alpha": 1.0, "negative_schedule": "linear"},
    "alpha 1, exp": {"negative_alpha": 1.0, "negative_schedule": "exp"},
    "alpha 0": {"negative_alpha": 0.0},
}
COLUMNS = ("object named", "background named", "IoU", "roughness of object", "roughness of background")

Results = Mapping[str, Sequence[Pixels]]
"""By setting, in the order of the scenes."""


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


def run(folder: Path, found: Sequence[Case], defaults: Mapping[str, Any]) -> Results:
    """All results, made by the program itself."""
    inputs = []
    for number, case in enumerate(found):
        case.silhouette().save(folder / f"{number}.png")
        negative = {"prompt": caption(case.target), "negative_prompt": caption(case.plain)}
        inputs.append({"image": f"{number}.png", "prompts": [negative | each for each in SETTINGS.values()]})
    manifest = folder / "manifest.yaml"
    top = {"model": "builtin:shapes", "output_dir": "out", "defaults": dict(defaults), "inputs": inputs}
    manifest.write_text(yaml.safe_dump(top))
    subprocess.run([sys.executable, "-m", "pnp_batch.cli", "run", str(manifest)], check=True, stdout=subprocess.DEVNULL)
    output = load_manifest(manifest).output
    made = {
        (int(Path(row["source"]).stem), row["negative_alpha"], row["negative_schedule"]): output / row["file_name"]
        for row in Outputs(output).rows()
    }
    return {
        name: [
            np.asarray(
                Image.open(made[n, own["negative_alpha"], own.get("negative_schedule", "constant")]).convert("RGB")
            )
            for n in range(len(found))
        ]
        for name, own in SETTINGS.items()
    }


def roughness(pixels: Pixels, region: NDArray[np.bool_]) -> float:
    """Mean absolute difference of luminance between neighbours that both lie in the region, in grey levels."""
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    inside_x, inside_y = region[:, 1:] & region[:, :-1], region[1:] & region[:-1]
    return float(np.concatenate([across[inside_x], down[inside_y]]).mean())


def regions(scene: Scene) -> Iterable[NDArray[np.bool_]]:
    """Object and background, both without the two pixels at the outline and the object's shadow."""
    inner, outer = (render(replace(scene, radius=scene.radius + grow))[1] for grow in (-2.5, 6.0))
    return inner > 250, outer < 5


def measured(case: Case, pixels: Pixels, reading: Reading) -> list[float]:
    """The numbers of one result, in the order of `COLUMNS`."""
    truth, mask = render(case.target)
    named = [float(reading.words[part] == getattr(case.target, part)) for part in ("material", "background")]
    rough = [roughness(pixels, region) / roughness(truth, region) for region in regions(case.target)]
    return [*named, iou(mask > 127, reading.mask), *rough]


def report(found: Sequence[Case], results: Results) -> None:
    """A Markdown table: means and, below, what was gained; each ± half of the 95% interval."""
    judge = load_judge()
    print("| negative prompt | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    base = np.zeros(0)
    for name in ("truth", *SETTINGS):
        pictures = [render(case.target)[0] for case in found] if name == "truth" else results[name]
        rows = zip(found, pictures, read(judge, pictures), strict=True)
        values = np.array([measured(*row) for row in rows])
        print(f"| {name} | {_cells(values)} |", flush=True)
        if name == NONE:
            base = values
        elif name != "truth":
            print(f"| gained | {_cells(values - base)} |", flush=True)


def _cells(values: NDArray[np.float64]) -> str:
    columns = (summarised([float(value) for value in column]) for column in values.T)
    return " | ".join(f"{each.mean:.2f} ± {each.half:.2f}" for each in columns)


def contact_sheet(found: Sequence[Case], results: Results, rows: int = 6) -> Image.Image:
    side, gap = 128, 6
    sheet = Image.new("RGB", ((len(SETTINGS) + 1) * (side + gap) - gap, rows * (side + gap) - gap), "white")
    for y in range(rows):
        pictures = (found[y].silhouette(), *(Image.fromarray(results[name][y]) for name in SETTINGS))
        for x, picture in enumerate(pictures):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x * (side + gap), y * (side + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--f", type=float, default=1.0, help="pnp_f_t")
    parser.add_argument("--attn", type=float, default=1.0, help="pnp_attn_t")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    found = cases(arguments.scenes)
    defaults = {"guidance_scale": arguments.guidance, "pnp_f_t": arguments.f, "pnp_attn_t": arguments.attn}
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), found, defaults)
    print(f"guidance {arguments.guidance:g}, f {arguments.f:g}, A {arguments.attn:g}, {arguments.scenes} scenes")
    print(judged(accuracy(load_judge())))
    report(found, results)
    if arguments.picture:
        contact_sheet(found, results).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
