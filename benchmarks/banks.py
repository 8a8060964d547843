"""What a feature bank takes, saves and (compressed) changes, on the built-in model.

    python benchmarks/banks.py

A few scenes get one prompt each with the bank made; then a second prompt is added, as people do, which needs no source pass
where there is a bank. Every mode starts from an empty store; the pictures of the added prompt are compared with those of
`bank: off`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pnp_batch.checkpoint import resolve
from pnp_batch.manifest import load_manifest
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.scenes import random_scene, render

MODES = {
    "off": {"bank": "off"},
    "memory": {"bank": "memory"},
    "disk": {"bank": "disk"},
    "disk, int8": {"bank": "disk", "bank_compression": "int8"},
    "disk, fp8": {"bank": "disk", "bank_compression": "fp8"},
}
PROMPTS = ["a golden star", "a striped heart on grass"]


def run(folder: Path, model: str, scenes: int, prompts: list[str], how: dict[str, Any]) -> tuple[Worker, float, int]:
    """One run of the program in this process: its worker, seconds (the model being loaded) and UNet rows."""
    content = {
        "model": model,
        "output_dir": "out",
        "defaults": {"guidance_scale": 3.0},
        "inputs": [{"images": "*.png", "prompts": prompts}],
        "run": how,
    }
    (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
    manifest = load_manifest(folder / "manifest.yaml")
    plan = Plan(manifest, resolve(model, folder))
    worker = Worker(manifest, plan.checkpoint, Silent())
    side = plan.checkpoint.sample_size
    worker.context.model.seconds_per_pass((side, side), scenes)  # warm-up
    before, begin = worker.context.model.rows, time.perf_counter()
    for package in plan.packages():
        worker.process(package)
    return worker, time.perf_counter() - begin, worker.context.model.rows - before


def measure(model: str, scenes: int, how: dict[str, Any]) -> dict[str, Any]:
    """First a prompt for each scene, then one that is added."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = resolve(model, folder).sample_size
        for i in range(scenes):
            Image.fromarray(render(random_scene(i), side)[0]).save(folder / f"{i:03}.png")
        first = run(folder, model, scenes, PROMPTS[:1], how)
        worker, seconds, rows = run(folder, model, scenes, PROMPTS, how)
        added = [row for row in worker.outputs.rows() if row["prompt"] == PROMPTS[1]]
        return {
            "first": first[1],
            "added": seconds,
            "rows": rows,
            "megabytes": sum(f.stat().st_size for f in (folder / "out/store/bank").rglob("*") if f.is_file()) / 1e6,
            "pictures": np.array(
                [
                    np.array(Image.open(folder / "out" / r["file_name"]))
                    for r in sorted(added, key=lambda r: r["source"])
                ]
            ).astype(np.int16),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin:shapes")
    parser.add_argument("--scenes", type=int, default=8)
    arguments = parser.parse_args()
    exact: Any = None
    heads = f"{'MB a picture':>13} {'grey levels: max':>17} {'mean':>7}"
    print(f"{'bank':<11} {'first run':>10} {'+1 prompt':>10} {'its rows':>9} {heads}")
    for name, how in MODES.items():
        figures = measure(arguments.model, arguments.scenes, how)
        exact = figures["pictures"] if exact is None else exact
        off = np.abs(figures["pictures"] - exact)
        print(
            f"{name:<11} {figures['first']:>8.2f} s {figures['added']:>8.2f} s {figures['rows']:>9} "
            f"{figures['megabytes'] / arguments.scenes:>13.2f} {off.max():>17} {off.mean():>7.3f}"
        )


if __name__ == "__main__":
    main()
