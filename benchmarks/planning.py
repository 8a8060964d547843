"""How long a large manifest takes to check and to plan, and how much memory: a folder of tiny pictures with three prompts.

    python benchmarks/planning.py --pictures 1000000

Computes nothing. `--fixed` writes height and width into the manifest, so that no picture has to be opened for its size.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from pathlib import Path

import yaml
from PIL import Image

from pnp_batch.checkpoint import resolve
from pnp_batch.manifest import load_manifest
from pnp_batch.plan import Plan, check

FOLDER_SIZE = 1000


def tiny_pictures(folder: Path, count: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for i in range(count):
        place = folder / f"{i // FOLDER_SIZE:05}"
        if i % FOLDER_SIZE == 0:
            place.mkdir()
        (place / f"{i:07}.png").write_bytes(buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--fixed", action="store_true", help="height and width are given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        tiny_pictures(folder / "in", arguments.pictures)
        content = {
            "model": "builtin:shapes",
            "output_dir": "out",
            "defaults": {"height": 64, "width": 64} if arguments.fixed else {},
            "inputs": [{"images": "in", "prompts": ["a red star", "a blue heart", "a golden ring"]}],
        }
        (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
        begin = time.perf_counter()
        manifest = load_manifest(folder / "manifest.yaml")
        checkpoint = resolve(manifest.model, manifest.base)
        results = check(manifest, checkpoint).translations
        checked = time.perf_counter()
        packages = sum(1 for _ in Plan(manifest, checkpoint).packages())
        planned = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{arguments.pictures} pictures, {results} results: checked in {checked - begin:.1f} s, cut into {packages} packages "
        f"in {planned - checked:.1f} s, {peak:.0f} MB at most"
    )


if __name__ == "__main__":
    main()
