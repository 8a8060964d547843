"""Pictures a second through the stages without a model: guidance pictures read, results written, with 1 thread and with more.

    python benchmarks/pictures.py [--pictures 64 --side 512 --threads 1 2]

A device waits meanwhile. Guidance pictures are JPEG files of twice the side: each is decoded, shrunk and digested. Results lie in
the store: each is read, checked, compressed to a PNG and written, with its row. The scenes carry some noise, as photographs do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import yaml
from PIL import Image
from scaling import TINY

from pnp_batch.checkpoint import resolve
from pnp_batch.manifest import load_manifest
from pnp_batch.media.images import Pixels
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.scenes import random_scene, render
from pnp_batch.stages import assemble, read
from pnp_batch.stages.translate import STAGE, about
from pnp_batch.stages.work import Item, items_of

NOISE = 3.0  # grey levels
SCENES = 8


def noisy_scenes(side: int) -> list[Pixels]:
    rng = np.random.default_rng(0)
    clean = (render(random_scene(i), 256)[0] for i in range(SCENES))
    large = (np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)) for picture in clean)
    return [np.clip(picture + rng.normal(0, NOISE, picture.shape), 0, 255).astype(np.uint8) for picture in large]


def write_inputs(folder: Path, pictures: int, side: int) -> None:
    for i, scene in enumerate(noisy_scenes(2 * side)):
        for number in range(i, pictures, SCENES):
            Image.fromarray(np.roll(scene, number, axis=1)).save(folder / f"{number:04}.jpg", quality=92)


def worker_of(folder: Path, side: int, output: str) -> tuple[Worker, list[Item]]:
    """A worker that has seen none of the pictures, its store and output folder new."""
    content = {
        "model": str(TINY),
        "output_dir": output,
        "defaults": {"height": side, "width": side},
        "inputs": [{"images": "*.jpg", "prompts": ["a red star"]}],
    }
    (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
    manifest = load_manifest(folder / "manifest.yaml")
    worker = Worker(manifest, resolve(str(TINY), folder), Silent())
    jobs = [job for package in Plan(manifest, worker.checkpoint).packages() for job in package.jobs]
    return worker, items_of(jobs, worker.context)


def rates(folder: Path, side: int, output: str) -> Iterator[float]:
    """Pictures a second that are read, and that are written."""
    worker, items = worker_of(folder, side, output)
    context = worker.context  # digests the model's files
    yield len(items) / timed(lambda: read.run(context, items))
    results = noisy_scenes(side)
    for number, unit in enumerate(unit for item in items for unit in item.units):
        picture = np.roll(results[number % SCENES], number, axis=1)
        latent = np.zeros((4, side // 8, side // 8), np.float32)
        shards = {"result": {"image": picture, "latent": latent}}
        context.store.publish(STAGE, unit.key, shards, about(unit) | {"seconds": 0.0})
    yield len(items) / timed(lambda: assemble.run(context, items))


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[int, list[list[float]]] = {threads: [] for threads in arguments.threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, arguments.pictures, arguments.side)
        for repeat in range(arguments.repeats):  # in turn: the machine is not always equally fast
            for threads in arguments.threads:
                os.environ["OMP_NUM_THREADS"] = str(threads)
                found[threads].append([*rates(folder, arguments.side, f"out-{repeat}-{threads}")])
    print(f"{arguments.side}x{arguments.side} pictures a second, medians of {arguments.repeats}")
    print(f"{'threads':>7} {'read':>8} {'written':>8}")
    for threads, runs in found.items():
        print(f"{threads:>7} {' '.join(f'{median(each):>8.1f}' for each in zip(*runs, strict=True))}")


if __name__ == "__main__":
    main()
