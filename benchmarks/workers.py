"""How much faster several one-thread workers are than one, on the built-in model.

    python benchmarks/workers.py [--workers 2] [--pictures 64] [--repeats 3]

Runs `pnp-batch run --engine ray` with one worker and with several in turn, each in an output folder of its own. *Working time* is
from the first step of the first worker to the last result that is published, so the tail counts; what Ray takes to start and
stop (a fixed cost) is the difference to the whole time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from PIL import Image

from pnp_batch.shapes.scenes import random_scene, render

PROMPTS = ["a gold star on night", "a striped heart on water"]


def write_project(folder: Path, pictures: int) -> Path:
    (folder / "in").mkdir(parents=True)
    for seed in range(pictures):
        Image.fromarray(render(random_scene(seed))[0]).save(folder / f"in/{seed:04}.png")
    manifest = {
        "model": "builtin:shapes",
        "output_dir": "out",
        "defaults": {"guidance_scale": 3.0, "num_inference_steps": 50},
        "inputs": [{"images": "in", "prompts": PROMPTS}],
        "run": {"engine": "ray", "batch_size": 4, "ray": {"num_cpus": 1}},
    }
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return folder / "manifest.yaml"


def seconds(folder: Path, pictures: int, workers: int) -> tuple[float, float]:
    """Working time and whole time of one run."""
    manifest = write_project(folder, pictures)
    command = [sys.executable, "-m", "pnp_batch.cli", "run", str(manifest), "--devices", str(workers)]
    begin = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = time.monotonic() - begin
    starts, ends = [], []
    for meta in (folder / "out/store").glob("*/??/*/meta.json"):
        about = json.loads(meta.read_bytes())["content"]["meta"]
        ends.append(meta.stat().st_mtime)
        starts.append(ends[-1] - about["seconds"] * len(about["batch"]))
    return max(ends) - min(starts), whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    found: dict[int, list[float]] = {1: [], options.workers: []}
    for _ in range(options.repeats):
        for workers, times in found.items():
            with tempfile.TemporaryDirectory() as folder:
                working, whole = seconds(Path(folder) / "project", options.pictures, workers)
            times.append(working)
            load = os.getloadavg()[0]
            print(f"{workers} workers: {working:6.1f} s of work, {whole:6.1f} s in all (load {load:.1f})", flush=True)
    ratios = [one / several for one, several in zip(*found.values(), strict=True)]
    print(
        f"{options.workers} workers are {statistics.median(ratios):.2f} times as fast as one ({len(ratios)} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f}), on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
