"""Does `channels_last` or `torch.compile` pay on this device? UNet passes of one model, in turn, the best of several.

    python benchmarks/compiled.py [--compile] [--size mid]

Injection replaces modules from step to step, which a compiled UNet would meet with a new compilation each time; so a gain
here is an upper bound for what compiling could give a run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from throughput import ROOT, UNETS, model_folder

from pnp_batch.checkpoint import resolve

from pnp_batch.diffusion.model import DiffusionModel, load_model, pick_device  # isort: skip
import torch  # isort: skip  # after pnp_batch, which sets how its threads wait

from pnp_batch.manifest import RunSpec


def once(model: DiffusionModel, latents: torch.Tensor) -> float:
    begin = time.perf_counter()
    model.predict(latents, 401, [""] * len(latents)).sum().item()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=["tiny", "shapes", *UNETS], default="shapes")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes about a minute")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device("auto")
    with tempfile.TemporaryDirectory() as work:
        checkpoint = resolve(str(model_folder(arguments.size, Path(work))), ROOT)
        models = {
            name: load_model(checkpoint, device, RunSpec().dtype_on(device.type))
            for name in ("plain", "channels_last", *(["compiled"] if arguments.compile else []))
        }
    models["channels_last"].unet.to(memory_format=torch.channels_last)
    if arguments.compile:
        models["compiled"].unet = torch.compile(models["compiled"].unet)
    latents = torch.randn(
        arguments.rows, 4, checkpoint.sample_size // checkpoint.cell, checkpoint.sample_size // checkpoint.cell
    )
    first = {name: once(model, latents.to(device)) for name, model in models.items()}
    best = dict.fromkeys(models, float("inf"))
    for _ in range(arguments.repeats):
        for name, model in models.items():
            best[name] = min(best[name], once(model, latents.to(device)))
    for name, seconds in best.items():
        print(
            f"{name:<14} {arguments.rows / seconds:>8.1f} rows/s {best['plain'] / seconds:>6.2f} times plain, "
            f"first pass {first[name]:.1f} s"
        )


if __name__ == "__main__":
    main()
