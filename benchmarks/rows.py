"""UNet rows a second of the built-in model at several batch sizes, alone or beside processes that keep the cores busy.

python benchmarks/rows.py
python benchmarks/rows.py --busy 3
OMP_WAIT_POLICY=ACTIVE python benchmarks/rows.py --busy 3     # threads that spin while they wait
"""

import argparse
import multiprocessing
from pathlib import Path

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.model import load_model, pick_device


def spin() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--busy", type=int, default=0, help="processes that do nothing but use a core")
    arguments = parser.parse_args()
    model = load_model(resolve("builtin:shapes", Path.cwd()), pick_device("auto"), "float32")
    for _ in range(arguments.busy):
        multiprocessing.get_context("spawn").Process(target=spin, daemon=True).start()
    for rows in (3, 8, 32):
        rate = rows / min(model.seconds_per_pass((64, 64), rows) for _ in range(3))
        print(f"{rows:>3} rows a pass: {rate:6.1f} rows/s")


if __name__ == "__main__":
    main()
