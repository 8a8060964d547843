"""The plain method against pnp-batch: the same pictures, prompts, steps and machine, in turn, several times.

    python benchmarks/throughput.py --size shapes          # or: make bench

*Plain* is the method as the public scripts have it, written out here: one picture at a time, DDIM inversion on the
sampling grid, then three UNet rows a step (source, negative, target) for every prompt, features overwritten by hooks.
*pnp-batch* is the program itself with its store, checksums and PNG files. Each side runs in a process of its own, so that
peak memory can be told apart; loading the model is not timed. `--inversion fixed-point` times pnp-batch with its own default
inversion instead, which gives other (better) trajectories and so other pictures.

`--against public` takes the public diffusers script's own defaults for the plain side: 999 inversion steps, 999 steps that
sample the picture back, then the edit. Together with `--inversion fixed-point` that is what a person who changes over gets;
`benchmarks/inversion.py` has the reconstruction errors of both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from pnp_batch.checkpoint import BUILTIN, resolve

from pnp_batch.diffusion.model import DiffusionModel, load_model, pick_device, to_pixels  # isort: skip
from pnp_batch.diffusion.loading import load_parts  # isort: skip
import torch  # isort: skip  # after pnp_batch, which sets how its threads wait
from torch.nn.attention import SDPBackend, sdpa_kernel  # isort: skip
from torch.utils.flop_counter import FlopCounterMode  # isort: skip
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from pnp_batch.manifest import RunSpec, load_manifest
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.scenes import MATERIALS, random_scene, render

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "pnp_batch" / BUILTIN["builtin:shapes"]
STEPS, GUIDANCE, F_T, ATTN_T = 50, 3.0, 0.8, 0.5
PUBLIC_STEPS = 999

# UNets with random weights, for sizes that no model in the project has.
UNETS: dict[str, dict[str, Any]] = {
    "mid": {
        "sample_size": 32,
        "block_out_channels": (96, 192, 384, 384),
        "attention_head_dim": 8,
        "cross_attention_dim": 96,
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sd21": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def model_folder(size: str, work: Path) -> Path:
    """The pipeline folder of a size; one with random weights is made on first use."""
    if size == "shapes":
        return SHAPES
    if size == "tiny":
        return ROOT / "tests/conformance/tiny-sd"
    folder = work / size
    if not folder.exists():
        torch.manual_seed(0)
        config = UNet2DConditionModel.load_config(SHAPES / "unet") | {"norm_num_groups": 32} | UNETS[size]
        unet = UNet2DConditionModel.from_config(config)
        parts = {
            "vae": _random_vae((32, 64, 96) if size == "mid" else (128, 256, 512, 512)),
            "tokenizer": resolve("builtin:shapes", ROOT).tokenizer,
            "unet": unet if size == "mid" else unet.half(),
            "scheduler": DDIMScheduler.from_pretrained(SHAPES / "scheduler", clip_sample=False),
        }
        write = _write_sdxl if size == "sdxl" else _write_sd
        write(folder, parts, UNETS[size]["cross_attention_dim"])
    return folder


def _text_config(width: int) -> Any:
    config = CLIPTextModel.from_pretrained(SHAPES / "text_encoder").config
    config.hidden_size = config.projection_dim = width
    return config


def _write_sd(folder: Path, parts: dict[str, Any], width: int) -> None:
    StableDiffusionPipeline(
        **parts,
        text_encoder=CLIPTextModel(_text_config(width)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _write_sdxl(folder: Path, parts: dict[str, Any], width: int) -> None:
    """The first text encoder is 768 wide; the second one has the rest of the width, and its summary is as wide."""
    StableDiffusionXLPipeline(
        **parts,
        text_encoder=CLIPTextModel(_text_config(768)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(width - 768)),
        tokenizer_2=parts["tokenizer"],
        add_watermarker=False,
    ).save_pretrained(folder)


def _random_vae(widths: tuple[int, ...]) -> AutoencoderKL:
    config = AutoencoderKL.load_config(SHAPES / "vae") | {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 2 if len(widths) == 4 else 1,
        "norm_num_groups": 32 if len(widths) == 4 else 8,
    }
    return AutoencoderKL.from_config(config)


def prompts_of(count: int) -> list[str]:
    return [f"a {MATERIALS[i % len(MATERIALS)]} star number {i}" for i in range(count)]


def pictures(folder: Path, count: int, side: int) -> list[Path]:
    paths = [folder / f"{i:03}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(render(random_scene(i), side)[0]).save(path)
    return paths


class Plain:
    """The method without any of our tricks. Counts its rows."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model, self.rows = model, 0
        self.timesteps = model.checkpoint.schedule.timesteps(STEPS)
        unet, (f_layers, attn_layers) = model.unet, model.checkpoint.layers
        self.f_leaves = [unet.up_blocks[k // 3].resnets[k % 3].conv2 for k in f_layers]
        layers = [unet.up_blocks[k // 3].attentions[k % 3] for k in attn_layers]
        attentions = [block.attn1 for layer in layers for block in layer.transformer_blocks]
        self.attn_leaves = [leaf for attention in attentions for leaf in (attention.to_q, attention.to_k)]

    def noise(self, latents: torch.Tensor, timestep: int, *texts: str) -> torch.Tensor:
        self.rows += len(latents)
        conditions = self.model.conditions(latents, texts)
        output = self.model.unet(latents.to(self.model.dtype), timestep, **conditions).sample.float()
        a = self.model.alphas[timestep]
        return output if self.model.prediction_type == "epsilon" else a**0.5 * output + (1 - a) ** 0.5 * latents

    @staticmethod
    def step(latents: torch.Tensor, noise: torch.Tensor, a: float, b: float) -> torch.Tensor:
        return b**0.5 * (latents - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise

    @torch.inference_mode()
    def translate(self, pixels: NDArray[np.uint8], prompts: list[str]) -> list[NDArray[np.uint8]]:
        trajectory = self.invert(self.model.encode_image(pixels), self.timesteps)
        return [to_pixels(self.model.decode(self.sample(trajectory, prompt))) for prompt in prompts]

    def invert(self, x: torch.Tensor, timesteps: Sequence[int]) -> dict[int, torch.Tensor]:
        alphas, a, trajectory = self.model.alphas, self.model.final_alpha, {}
        for t in reversed(timesteps):
            x = self.step(x, self.noise(x, t, ""), a, alphas[t])
            a = alphas[t]
            trajectory[t] = x
        return trajectory

    @torch.inference_mode()
    def translate_as_public(self, pixels: NDArray[np.uint8], prompts: list[str]) -> list[NDArray[np.uint8]]:
        """One prompt after the other, each with an inversion and a reconstruction of its own, as the script is called."""
        results, fine = [], self.model.checkpoint.schedule.timesteps(PUBLIC_STEPS)
        for prompt in prompts:
            trajectory = self.invert(self.model.encode_image(pixels), fine)
            x, alphas = trajectory[fine[0]], [self.model.alphas[t] for t in fine] + [self.model.final_alpha]
            for i, t in enumerate(fine):
                x = self.step(x, self.noise(x, t, ""), alphas[i], alphas[i + 1])
            self.model.decode(x)
            results.append(to_pixels(self.model.decode(self.sample(trajectory, prompt))))
        return results

    def sample(self, trajectory: dict[int, torch.Tensor], prompt: str) -> torch.Tensor:
        x, alphas = trajectory[self.timesteps[0]], self.model.alphas
        for i, t in enumerate(self.timesteps):
            leaves = (self.f_leaves if i < int(STEPS * F_T) else []) + (
                self.attn_leaves if i < int(STEPS * ATTN_T) else []
            )
            handles = [leaf.register_forward_hook(lambda _m, _i, out: torch.cat([out[:1]] * 3)) for leaf in leaves]
            noise = self.noise(torch.cat([trajectory[t], x, x]), t, "", "", prompt)
            for handle in handles:
                handle.remove()
            guided = noise[1:2] + GUIDANCE * (noise[2:3] - noise[1:2])
            below = alphas[self.timesteps[i + 1]] if i + 1 < STEPS else self.model.final_alpha
            x = self.step(x, guided, alphas[t], below)
        return x


def arithmetic(model: DiffusionModel) -> dict[str, float]:
    """FLOP of one UNet row, and the FLOP/s that this device reaches in large matrix products of the model's dtype."""
    side = model.checkpoint.sample_size // model.checkpoint.cell
    latents = torch.randn(1, 4, side, side, device=model.device)
    # The counter knows no formula for the CPU's fused attention, nor for our fused layers.
    unet = load_parts(model.checkpoint, model.dtype).unet.to(model.device).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        unet(latents.to(model.dtype), 1, **model.conditions(latents, [""]))
    n = 8192 if model.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=model.device, dtype=model.dtype) for _ in range(2))
    rates = []
    for _ in range(5):
        begin = time.perf_counter()
        (a @ b)[0, 0].item()
        rates.append(2 * n**3 / (time.perf_counter() - begin))
    return {"row_flop": counter.get_total_flops(), "rate": max(rates)}


def run_plain(arguments: argparse.Namespace, folder: Path, work: Path) -> dict[str, Any]:
    device = pick_device("auto")
    model = load_model(resolve(str(folder), ROOT), device, RunSpec().dtype_on(device.type))
    model.unet = load_parts(model.checkpoint, model.dtype).unet.to(device).eval()  # without our fused layers
    plain = Plain(model)
    side = plain.model.checkpoint.sample_size
    paths, prompts = pictures(work, arguments.images, side), prompts_of(arguments.prompts)
    plain.model.seconds_per_pass((side, side), 3)  # warm-up
    floor = arithmetic(plain.model)
    begin = time.perf_counter()
    translate = plain.translate_as_public if arguments.against == "public" else plain.translate
    results = [translate(np.array(Image.open(path)), prompts) for path in paths]
    seconds = time.perf_counter() - begin
    np.save(work / "results.npy", np.array(results))
    return {"seconds": seconds, "rows": plain.rows, "disk_bytes": 0, **floor}


def run_batch(arguments: argparse.Namespace, folder: Path, work: Path) -> dict[str, Any]:
    side, prompts = resolve(str(folder), ROOT).sample_size, prompts_of(arguments.prompts)
    pictures(work, arguments.images, side)
    inversion = {"num_inversion_steps": STEPS} if arguments.inversion == "ddim" else {"inversion_method": "fixed-point"}
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "pnp_f_t": F_T, "pnp_attn_t": ATTN_T}
    content = {
        "model": str(folder),
        "output_dir": "out",
        "defaults": settings | inversion,
        "inputs": [{"images": "*.png", "prompts": prompts}],
        "run": {"reconstruction": "skipped", "batch_size": arguments.batch_size},
    }
    (work / "manifest.yaml").write_text(yaml.safe_dump(content))
    manifest = load_manifest(work / "manifest.yaml")
    plan = Plan(manifest, resolve(str(folder), ROOT))
    worker = Worker(manifest, plan.checkpoint, Silent())
    model = worker.context.model
    model.seconds_per_pass((side, side), 3)  # warm-up
    floor = arithmetic(model)
    before, begin = model.rows, time.perf_counter()
    for package in plan.packages():
        worker.process(package)
    seconds = time.perf_counter() - begin
    rows = sorted(worker.outputs.rows(), key=lambda row: (row["source"], prompts.index(row["prompt"])))
    results = np.array([np.array(Image.open(work / "out" / row["file_name"])) for row in rows])
    np.save(work / "results.npy", results.reshape(arguments.images, arguments.prompts, side, side, 3))
    disk = sum(path.stat().st_size for path in (work / "out").rglob("*") if path.is_file())
    return {"seconds": seconds, "rows": model.rows - before, "disk_bytes": disk, **floor}


SIDES = {"plain": run_plain, "batch": run_batch}


def one_side(arguments: argparse.Namespace) -> None:
    """What a child process does; prints one line of JSON."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work = Path(arguments.work)
    figures = SIDES[arguments.side](arguments, model_folder(arguments.size, work.parent), work)
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures | {"peak_bytes": peak}))


def child(side: str, work: Path) -> dict[str, Any]:
    work.mkdir(parents=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--work", str(work)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(printed.splitlines()[-1]))


def compare(arguments: argparse.Namespace) -> None:
    """Runs both sides in turn and prints medians."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        model_folder(arguments.size, Path(folder))
        for repeat in range(arguments.repeats):
            for side in SIDES:
                runs[side].append(child(side, Path(folder) / f"{side}{repeat}"))
        plain, batch = (np.load(Path(folder) / f"{side}0/results.npy").astype(np.int16) for side in SIDES)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    threads = arguments.threads or torch.get_num_threads()
    print(
        f"{arguments.size}: {arguments.images} pictures x {arguments.prompts} prompts, {STEPS} + {STEPS} steps, "
        f"{arguments.inversion}, {device}, {threads} threads, against {arguments.against}, median of {arguments.repeats}"
    )
    print(f"{'':<10} {'UNet rows':>10} {'seconds':>9} {'s/result':>9} {'peak MB':>9} {'disk MB':>9} {'of floor':>9}")
    for side, figures in runs.items():
        seconds = statistics.median(run["seconds"] for run in figures)
        peak, disk = max(run["peak_bytes"] for run in figures) / 1e6, figures[0]["disk_bytes"] / 1e6
        per_result = seconds / (arguments.images * arguments.prompts)
        floor = figures[0]["rows"] * figures[0]["row_flop"] / max(run["rate"] for run in figures)
        print(
            f"{side:<10} {figures[0]['rows']:>10} {seconds:>9.2f} {per_result:>9.3f} {peak:>9.0f} {disk:>9.1f} "
            f"{floor / seconds:>9.0%}"
        )
    one = runs["batch"][0]
    print(
        f"floor: {one['row_flop'] / 1e9:.2f} GFLOP a row at the {one['rate'] / 1e9:.0f} GFLOP/s of a large matrix product"
    )
    ratios = sorted(p["seconds"] / b["seconds"] for p, b in zip(runs["plain"], runs["batch"], strict=True))
    print(f"ratio plain / batch: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    difference = np.abs(plain - batch)
    print(f"the pictures differ by {difference.max()} grey levels at most, {difference.mean():.4f} on average")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=["tiny", "shapes", *UNETS], default="shapes")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes by itself")
    parser.add_argument("--batch-size", default="auto", type=lambda text: text if text == "auto" else int(text))
    parser.add_argument("--inversion", choices=["ddim", "fixed-point"], default="ddim")
    parser.add_argument("--against", choices=["plain", "public"], default="plain")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    one_side(arguments) if arguments.side else compare(arguments)


if __name__ == "__main__":
    main()
