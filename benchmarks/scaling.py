"""Does cost grow linearly, and what does pnp-batch itself take of it? 1, 10, 100 pictures; then 1, 4, 16 prompts.

    python benchmarks/scaling.py [--model builtin:shapes --steps 50]

The program runs in this process with its store, checksums and PNG files. The time inside the model (UNet, VAE, text encoder)
is taken apart from the rest, which is our own: decoding, keys, artifacts, PNG files, rows. The slope is a least-squares line
through the points. The default is the conformance tests' tiny model with few steps, on which our own part shows best.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.manifest import load_manifest
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.scenes import random_scene, render

TINY = Path(__file__).parents[1] / "tests/conformance/tiny-sd"
PICTURES, PROMPTS, FIXED_PICTURES = (1, 10, 100), (1, 4, 16), 4


class Stopwatch:
    """Seconds inside the model's methods, nested calls counted once."""

    def __init__(self, model: DiffusionModel) -> None:
        self.seconds, self._depth = 0.0, 0
        for name in ("predict", "encode_image", "decode", "encode_texts"):
            setattr(model, name, self._timed(getattr(model, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            self._depth += 1
            begin = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - begin

        return timed


def measure(model: str, steps: int, pictures: int, prompts: int) -> tuple[float, float, float]:
    """Seconds in all, inside the model, and of a second run that finds everything done."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = resolve(model, folder)
        side = checkpoint.sample_size
        for i in range(pictures):
            Image.fromarray(render(random_scene(i), side)[0]).save(folder / f"{i:03}.png")
        content = {
            "model": model,
            "output_dir": "out",
            "defaults": {"num_inference_steps": steps, "num_inversion_steps": steps},
            "inputs": [{"images": "*.png", "prompts": [f"a red star number {i}" for i in range(prompts)]}],
            "run": {"reconstruction": "skipped"},
        }
        (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
        manifest = load_manifest(folder / "manifest.yaml")
        worker = Worker(manifest, checkpoint, Silent())
        loaded = worker.context.model
        loaded.seconds_per_pass((side, side), 8)  # warm-up
        watch = Stopwatch(loaded)
        begin = time.perf_counter()
        for package in Plan(manifest, checkpoint).packages():
            worker.process(package)
        total = time.perf_counter() - begin
        again = Worker(manifest, checkpoint, Silent())
        begin = time.perf_counter()
        for package in Plan(manifest, checkpoint).packages():
            again.process(package)
        return total, watch.seconds, time.perf_counter() - begin


def table(
    head: str, counts: tuple[int, ...], run: Callable[[int], tuple[float, float, float]], results: Callable[[int], int]
) -> None:
    print(
        f"{head:<10} {'results':>8} {'seconds':>9} {'in the model':>13} {'our own, ms a result':>21} {'again, ms a result':>19}"
    )
    totals = []
    for count in counts:
        total, inside, again = run(count)
        totals.append(total)
        own = 1000 * (total - inside) / results(count)
        print(
            f"{count:<10} {results(count):>8} {total:>9.2f} {inside:>13.2f} {own:>21.1f} {1000 * again / results(count):>19.2f}"
        )
    slope, start = np.polyfit([results(count) for count in counts], totals, 1)
    print(f"fitted: {1000 * slope:.1f} ms a result and {max(start, 0):.2f} s to begin with\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    model, steps = arguments.model, arguments.steps
    table("pictures", PICTURES, lambda n: measure(model, steps, n, 1), lambda n: n)
    table("prompts", PROMPTS, lambda n: measure(model, steps, FIXED_PICTURES, n), lambda n: FIXED_PICTURES * n)


if __name__ == "__main__":
    main()
