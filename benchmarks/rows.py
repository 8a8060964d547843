"""UNet rows a second at several batch sizes: what threads, memory and fused layers are worth on this machine.

python benchmarks/rows.py
python benchmarks/rows.py --plain-layers                      # without the fused linear layers (diffusion/kernels.py)
MALLOC_ARENA_MAX=8 python benchmarks/rows.py                  # glibc's own rule for large blocks: zeroed pages at each pass
python benchmarks/rows.py --busy 3                            # beside processes that use the cores
OMP_WAIT_POLICY=ACTIVE python benchmarks/rows.py --busy 3     # threads that spin while they wait
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from pathlib import Path

from throughput import ROOT, UNETS, model_folder

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.loading import load_parts
from pnp_batch.diffusion.model import DiffusionModel, load_model, pick_device


def spin() -> None:
    while True:
        pass


def loaded(size: str, *, plain: bool) -> DiffusionModel:
    with tempfile.TemporaryDirectory() as work:
        checkpoint = resolve(str(model_folder(size, Path(work))), ROOT)
        model = load_model(checkpoint, pick_device("cpu"), "float32")
        if plain:
            model.unet = load_parts(checkpoint, model.dtype).unet.eval()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=["tiny", "shapes", *UNETS], default="shapes")
    parser.add_argument("--plain-layers", action="store_true")
    parser.add_argument("--busy", type=int, default=0, help="processes that do nothing but use a core")
    arguments = parser.parse_args()
    model = loaded(arguments.size, plain=arguments.plain_layers)
    for _ in range(arguments.busy):
        multiprocessing.get_context("spawn").Process(target=spin, daemon=True).start()
    side = model.checkpoint.sample_size
    for rows in (3, 8, 32, 64) if arguments.size in ("tiny", "shapes") else (3, 8):
        rate = rows / statistics.median(model.seconds_per_pass((side, side), rows) for _ in range(7))
        print(f"{rows:>3} rows a pass: {rate:6.1f} rows/s")


if __name__ == "__main__":
    main()
