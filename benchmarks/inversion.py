"""What an inversion is worth for its UNet calls: round trips through the sampling steps, without guidance.

    python benchmarks/inversion.py --scenes 16            # builtin:shapes, float32
    python benchmarks/inversion.py --hard                 # flat, white, black, noise, line art
    python benchmarks/inversion.py --dtype bfloat16       # the UNet in half precision, latents in float32
    python benchmarks/inversion.py --steps 2 --ddim 999   # few sampling steps
    python benchmarks/inversion.py --ddim 50 100 200 500 999 --tolerances 1e-2 3e-3 1e-3 3e-4 --plot FILE.png

PSNR is of the decoded round trip against the VAE's own, which no inversion can beat; "x_T std" is that of the noisiest
latent, which for ideal noise is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.fixed_point import fixed_point_invert
from pnp_batch.diffusion.inversion import ddim_invert, reconstruct
from pnp_batch.diffusion.model import DiffusionModel, load_model, pick_device, to_pixels
from pnp_batch.diffusion.trajectories import psnr
from pnp_batch.media.images import Pixels
from pnp_batch.shapes.scenes import random_scene, render

import torch  # isort: skip  # after pnp_batch, which sets how its threads wait


def scenes(count: int, side: int) -> list[Pixels]:
    return [render(random_scene(10_000 + i), side)[0] for i in range(count)]


def hard_pictures(side: int) -> list[Pixels]:
    lines = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(lines)
    for i in range(0, side, side // 8):
        draw.line([(0, i), (side, side - i)], fill="black")
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    flat = [np.full((side, side, 3), grey, np.uint8) for grey in (0, 127, 255)]
    return [*flat, np.array(lines), noise]


class RoundTrips:
    """Inverts the same pictures by one scheme after the other and prints a line for each."""

    def __init__(self, model: DiffusionModel, pictures: list[Pixels], steps: int) -> None:
        self.model, self.prompts = model, [""] * len(pictures)
        self.timesteps = model.checkpoint.schedule.timesteps(steps)
        self.clean = torch.cat([model.encode_image(picture) for picture in pictures])
        self.points: dict[str, list[tuple[float, float, float]]] = {}
        self.best = [to_pixels(model.decode(latent[None])) for latent in self.clean]
        print(f"{'scheme':<24} {'calls':>6} {'PSNR mean':>10} {'worst':>6} {'latent MSE':>11} {'x_T std':>8}")

    def report(self, scheme: str, setting: str, kept: torch.Tensor, calls: float) -> None:
        back = reconstruct(self.model, kept[:, 0], self.prompts, self.timesteps)
        found = [
            psnr(to_pixels(self.model.decode(each[None])), best) for each, best in zip(back, self.best, strict=True)
        ]
        error = float((back - self.clean).square().mean())
        self.points.setdefault(scheme, []).append((calls, float(np.mean(found)), min(found)))
        print(
            f"{f'{scheme} {setting}':<24} {calls:>6.1f} {np.mean(found):>10.1f} {min(found):>6.1f} {error:>11.1e} "
            f"{float(kept[:, 0].std()):>8.3f}"
        )

    def ddim(self, steps: int) -> None:
        calls = self.model.checkpoint.schedule.steps_up_to(len(self.timesteps), steps)
        kept = ddim_invert(self.model, self.clean, self.prompts, steps, self.timesteps)
        self.report("ddim", str(steps), kept, calls)

    def fixed_point(self, tolerance: float) -> None:
        inversion = fixed_point_invert(self.model, self.clean, self.prompts, self.timesteps, tolerance)
        self.report("fixed-point", f"{tolerance:g}", inversion.kept, float(inversion.calls.float().mean()))
        if unsolved := inversion.solved.count(False):
            print(
                f"{'':<24} {unsolved} of {len(self.prompts)} not solved (largest residual {float(inversion.residual.max()):.1e})"
            )

    def plot(self, path: Path) -> None:
        """PSNR against UNet calls, a curve for each scheme: the mean, and the worst picture."""
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for scheme, points in self.points.items():
            calls, mean, worst = zip(*sorted(points), strict=True)
            (line,) = axes.plot(calls, mean, "o-", label=scheme)
            axes.plot(calls, worst, "o:", color=line.get_color(), label=f"{scheme}, worst picture", alpha=0.6)
        axes.set(xscale="log", xlabel="UNet calls a picture", ylabel="PSNR of the round trip [dB]")
        axes.set_title(f"{len(self.best)} pictures, {len(self.timesteps)} sampling steps")
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin:shapes")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--hard", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--ddim", type=int, nargs="*", default=[50, 100, 999])
    parser.add_argument("--tolerances", type=float, nargs="*", default=[3e-3, 1e-3, 3e-4])
    parser.add_argument("--plot", type=Path, help="also draw the curves, as PNG or SVG")
    arguments = parser.parse_args()
    model = load_model(resolve(arguments.model, Path.cwd()), pick_device("auto"), arguments.dtype)
    side = model.checkpoint.sample_size
    pictures = hard_pictures(side) if arguments.hard else scenes(arguments.scenes, side)
    trips = RoundTrips(model, pictures, arguments.steps)
    for steps in arguments.ddim:
        trips.ddim(steps)
    for tolerance in arguments.tolerances:
        trips.fixed_point(tolerance)
    if arguments.plot:
        trips.plot(arguments.plot)


if __name__ == "__main__":
    main()
