"""Training a small Stable Diffusion on procedural scenes: the VAE, then UNet and text encoder together.

It follows the recipe that came with the first weights of `builtin:shapes`: v-prediction, captions in many wordings, one in ten
left out for guidance, timesteps spread evenly over every batch. What is written is an ordinary diffusers pipeline folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.diffusion.guidance import Row
from pnp_batch.diffusion.inversion import sample_trajectory
from pnp_batch.diffusion.loading import load_parts
from pnp_batch.diffusion.model import DiffusionModel, pick_device, to_pixels
from pnp_batch.diffusion.trajectories import psnr, seeded_noise
from pnp_batch.errors import ModelError
from pnp_batch.families import SD, WEIGHT_NAMES
from pnp_batch.media.images import encode_png
from pnp_batch.shapes.learning import Recipe, Watch, is_half_faster, learn
from pnp_batch.shapes.models import scene_model
from pnp_batch.shapes.scenes import HELD_OUT, caption, random_caption, random_scene, render
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import sha256

BATCH = 64
CHUNK = 512  # scenes whose latents are kept in one file
NORMALISED = 512  # scenes that latents are normalised over
DROPPED_CAPTIONS = 0.1
KL_WEIGHT = 1e-6
SEED_STRIDE = 1_000_003
GRID_SIDE, GRID_STEPS, GRID_GUIDANCE = 4, 20, 3.0

VAE_RECIPE = Recipe(steps=2_600, learning_rate=1e-3, average=0.995)
UNET_RECIPE = Recipe(steps=8_500, learning_rate=1e-3, warm_up=200)
VAE_AGAIN = Recipe(steps=600, learning_rate=3e-4, average=0.995)
UNET_AGAIN = Recipe(steps=1_100, learning_rate=4e-4)


@dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        output: The folder that becomes a diffusers pipeline; checkpoints and sample grids lie in `training/` below it.
        start: The model whose configs and tokenizer are used, and whose weights where `continued`.
        continued: Whether to go on from its weights. Of its VAE only the decoder learns then, so that latents stay what they are.
        scenes: How many scenes UNet and text encoder learn from.
        vae: How the VAE learns.
        unet: How UNet and text encoder learn.
        seed: Of weights, noise and wording, and of the first scene.
        device: Where.
        half: Whether to compute in bfloat16; None measures which is faster.
        batch: Scenes in a step.
        every: Steps between two sample grids.
        say: Told what happens, a line at a time.
    """

    output: Path
    start: Checkpoint
    continued: bool
    scenes: int
    vae: Recipe
    unet: Recipe
    seed: int
    device: torch.device
    half: bool | None = None
    batch: int = BATCH
    every: int = 250
    say: Callable[[str], None] = print

    @property
    def about(self) -> str:
        """What decides the weights besides the recipes."""
        return (
            f"{self.start.name}, continued {self.continued}, {self.scenes} scenes, seed {self.seed}, batch {self.batch}"
        )

    @property
    def seeds(self) -> range:
        """The seeds of all scenes that it may learn from."""
        return range(self.seed, self.seed + max(self.scenes, self.vae.steps * self.batch, NORMALISED))

    @property
    def work(self) -> Path:
        """Where checkpoints, latents and sample grids lie."""
        return self.output / "training"


def planned(
    output: Path,
    start: str | None,
    scenes: int,
    vae_steps: int | None,
    unet_steps: int | None,
    learning_rate: float | None,
    *,
    devices: str,
    **others: Any,
) -> Training:
    """A training run from what the command line says; None takes the recipe's own value.

    Raises:
        ModelError: There is no such model to go on from, it does not paint pictures of the scenes' size, or it is an SDXL.
        EnvironmentFailure: The device cannot be used.
    """
    vae, unet = (VAE_RECIPE, UNET_RECIPE) if start is None else (VAE_AGAIN, UNET_AGAIN)
    rate = unet.learning_rate if learning_rate is None else learning_rate
    model = scene_model(start or "builtin:shapes", Path.cwd())
    if model.family is not SD:
        raise ModelError(f"{start} is a {model.family.name}; what is trained here has one text encoder")
    return Training(
        output=output,
        start=model,
        continued=start is not None,
        scenes=scenes,
        vae=vae if vae_steps is None else replace(vae, steps=vae_steps),
        unet=replace(unet, learning_rate=rate, steps=unet.steps if unet_steps is None else unet_steps),
        device=pick_device(devices),
        **others,
    )


def train(run: Training) -> Path:
    """Trains and writes a pipeline folder; repeated, it goes on where it stopped.

    Returns:
        The folder.

    Raises:
        PnpError: A loss is not finite.
    """
    torch.manual_seed(run.seed)
    run.work.mkdir(parents=True, exist_ok=True)
    parts = _parts(run)
    if run.vae.steps:
        _train_vae(run, parts.vae)
    if run.unet.steps:
        _train_unet(run, parts)
    save_pipeline(run.start, parts.unet, parts.vae, parts.text_encoder, run.output)
    return run.output


@dataclass
class _Networks:
    """What is trained, with the noise schedule."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any

    @property
    def alphas(self) -> Tensor:
        """`alphas_cumprod`, float32 on the CPU."""
        return self.scheduler.alphas_cumprod  # type: ignore[no-any-return]

    def model(self, checkpoint: Checkpoint, device: torch.device) -> DiffusionModel:
        """These networks as the rest of the package sees a model."""
        return DiffusionModel(
            checkpoint=checkpoint,
            unet=self.unet,
            vae=self.vae,
            text_encoder=self.text_encoder,
            alphas=self.alphas.double().tolist(),
            final_alpha=float(self.scheduler.final_alpha_cumprod),
            prediction_type=self.scheduler.config.prediction_type,
            device=device,
            dtype=torch.float32,
        )


def _parts(run: Training) -> _Networks:
    """The networks: with the start's weights, or new ones of the same layout."""
    if run.continued:
        loaded = load_parts(run.start, torch.float32)
        networks = _Networks(loaded.unet, loaded.vae, loaded.text_encoder, loaded.scheduler)
    else:
        configs = run.start.configs
        networks = _Networks(
            UNet2DConditionModel.from_config(_config(configs / "unet")),
            AutoencoderKL.from_config(_config(configs / "vae")),
            CLIPTextModel(CLIPTextConfig(**_config(configs / "text_encoder"))),
            DDIMScheduler.from_pretrained(configs / "scheduler"),
        )
    for network in (networks.unet, networks.vae, networks.text_encoder):
        network.to(run.device, torch.float32).eval()
    return networks


def _generator(run: Training, step: int) -> torch.Generator:
    """Draws what is random at a step; a training with another seed draws something else."""
    return torch.Generator().manual_seed(run.seed * SEED_STRIDE + step)


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


# --- VAE --------------------------------------------------------------------------------------------------------------


def _train_vae(run: Training, vae: Any) -> None:
    """L1 on pixels and on their differences, with a slight pull of the posterior towards a normal one."""
    if run.continued:
        _vae_grid(run, vae, 0)  # what it starts from, to compare with
    learner = nn.ModuleList([vae.post_quant_conv, vae.decoder]) if run.continued else vae
    loss = partial(_vae_loss, run, vae)
    half = _half(run, "vae", loss)
    learn("vae", learner, loss, run.vae, run.work, _watch(run, partial(_vae_grid, run, vae)), half, run.about)
    vae.eval()
    if not run.continued:
        _normalise(vae, _encoded(run, vae, 0, NORMALISED))
    _vae_grid(run, vae, run.vae.steps)


def _vae_loss(run: Training, vae: Any, step: int) -> Tensor:
    begin = run.seed + step * run.batch
    pictures = _pictures(run, range(begin, begin + run.batch))
    with torch.set_grad_enabled(not run.continued):
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=_generator(run, step)).to(run.device)
        latents = posterior.mean if run.continued else posterior.mean + posterior.std * noise
    decoded = vae.decode(latents).sample
    loss = F.l1_loss(decoded, pictures) + sum(
        F.l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3)
    )
    return loss if run.continued else loss + KL_WEIGHT * posterior.kl().mean()


def _pictures(run: Training, seeds: Sequence[int]) -> Tensor:
    """The scenes of some seeds, (rows, 3, 64, 64) in [-1, 1]."""
    drawn = np.stack([render(random_scene(seed))[0] for seed in seeds])
    return torch.from_numpy(drawn).to(run.device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def _encoded(run: Training, vae: Any, begin: int, end: int) -> Tensor:
    """Posterior means of the scenes from one number to another, unscaled."""
    batches = (range(i, min(i + run.batch, end)) for i in range(begin, end, run.batch))
    return torch.cat([vae.encode(_pictures(run, [run.seed + i for i in rows])).latent_dist.mean for rows in batches])


@torch.no_grad()
def _normalise(vae: Any, latents: Tensor) -> None:
    """Folds an affine map into the 1x1 convolutions, so that scaled latents have zero mean and unit variance.

    What is decoded from what is encoded stays the same.

    Args:
        vae: An AutoencoderKL with `quant_conv` and `post_quant_conv`.
        latents: (rows, 4, height, width) unscaled posterior means to take mean and deviation from.
    """
    mean = latents.mean((0, 2, 3))
    spread = latents.std((0, 2, 3)) * vae.config.scaling_factor
    channels = len(mean)
    decode, encode = vae.post_quant_conv, vae.quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= spread.view(1, -1, 1, 1)
    encode.weight[:channels] /= spread.view(-1, 1, 1, 1)
    encode.bias[:channels] = (encode.bias[:channels] - mean) / spread
    encode.bias[channels:] -= 2 * spread.log()


# --- UNet and text encoder --------------------------------------------------------------------------------------------


def _train_unet(run: Training, networks: _Networks) -> None:
    latents = _latents(run, networks.vae)
    learner = nn.ModuleDict({"unet": networks.unet, "text_encoder": networks.text_encoder})
    loss = partial(_unet_loss, run, networks, latents)
    half = _half(run, "unet", loss)
    learn("unet", learner, loss, run.unet, run.work, _watch(run, partial(_unet_grid, run, networks)), half, run.about)
    _unet_grid(run, networks, run.unet.steps)


def _latents(run: Training, vae: Any) -> Tensor:
    """Scaled latents of all scenes, (scenes, 4, height, width) float16, kept in files of `CHUNK` scenes."""
    chunks = []
    encoder = sha256(safetensors.torch.save({k: v.contiguous() for k, v in vae.encoder.state_dict().items()}))
    for begin in range(0, run.scenes, CHUNK):
        end = min(begin + CHUNK, run.scenes)
        path = run.work / f"latents-{encoder[:16]}" / f"{run.seed + begin}-{run.seed + end}.safetensors"
        if not path.exists():
            half = (_encoded(run, vae, begin, end) * vae.config.scaling_factor).half().cpu().contiguous()
            write_atomic(path, safetensors.torch.save({"latents": half}))
        chunks.append(safetensors.torch.load_file(path)["latents"])
    return torch.cat(chunks)


def _unet_loss(run: Training, networks: _Networks, latents: Tensor, step: int) -> Tensor:
    """Mean squared error of v (Salimans and Ho 2022) over a batch of scenes, wordings and timesteps."""
    generator = _generator(run, step)
    chosen = torch.randint(len(latents), (run.batch,), generator=generator)
    clean = latents[chosen].float().to(run.device)
    noise = torch.randn(clean.shape, generator=generator).to(run.device)
    timesteps = _spread_timesteps(len(networks.alphas), run.batch, generator)
    a = networks.alphas[timesteps].view(-1, 1, 1, 1).to(run.device)
    dropped = torch.rand(run.batch, generator=generator) < DROPPED_CAPTIONS
    captions = ["" if drop else text for drop, text in zip(dropped.tolist(), wordings(run, step, chosen), strict=True)]
    output = networks.unet(
        a.sqrt() * clean + (1 - a).sqrt() * noise,
        timesteps.to(run.device),
        _text_features(run, networks.text_encoder, captions),
        return_dict=False,
    )[0]
    predicts_v = networks.scheduler.config.prediction_type == "v_prediction"
    target = a.sqrt() * noise - (1 - a).sqrt() * clean if predicts_v else noise
    return F.mse_loss(output.float(), target)


def wordings(run: Training, step: int, chosen: Tensor) -> list[str]:
    """A caption for each of a step's scenes, told by their numbers; another step or another training words it anew."""
    first = run.seed * SEED_STRIDE + step * run.batch
    return [random_caption(random_scene(run.seed + n), first + row) for row, n in enumerate(chosen.tolist())]


def _spread_timesteps(count: int, rows: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of as many equal parts of the schedule as a batch has rows, in random order: less noise."""
    part = (torch.arange(rows) + torch.rand(rows, generator=generator)) / rows
    return (part * count).long()[torch.randperm(rows, generator=generator)]


def _text_features(run: Training, text_encoder: Any, captions: Sequence[str]) -> Tensor:
    tokens = run.start.tokenizer(
        list(captions), padding="max_length", max_length=run.start.max_tokens, truncation=True, return_tensors="pt"
    )
    return text_encoder(tokens.input_ids.to(run.device))[0]  # type: ignore[no-any-return]


def _half(run: Training, name: str, loss: Callable[[int], Tensor]) -> bool:
    """Whether to compute in bfloat16."""
    return is_half_faster(name, loss, run.device, run.work, run.say) if run.half is None else run.half


# --- watching ---------------------------------------------------------------------------------------------------------


def _watch(run: Training, show: Callable[[int], object]) -> Watch:
    return Watch(run.say, show, run.every)


@torch.inference_mode()
def _vae_grid(run: Training, vae: Any, step: int) -> None:
    """Held-out scenes above what the VAE makes of them."""
    pictures = _pictures(run, range(HELD_OUT, HELD_OUT + GRID_SIDE**2))
    decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample
    before, after = (_unit(each) for each in (pictures, decoded))
    mean = sum(psnr(to_pixels(a), to_pixels(b)) for a, b in zip(before, after, strict=True)) / len(before)
    run.say(f"VAE after {step} steps: {mean:.2f} dB on {len(before)} held-out scenes")
    _write_grid(run, f"vae-{step:05}", torch.cat([before, after]))


def _unit(pictures: Tensor) -> Tensor:
    """(rows, 3, height, width) in [-1, 1] to (rows, height, width, 3) in [0, 1]."""
    return (pictures.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


def _unet_grid(run: Training, networks: _Networks, step: int) -> None:
    """What it paints from the captions of held-out scenes."""
    model = networks.model(run.start, run.device)
    count = GRID_SIDE**2
    size = (run.start.sample_size, run.start.sample_size)
    noise = torch.cat([seeded_noise(seed, size, run.start.cell) for seed in range(count)]).to(run.device)
    captions = [caption(random_scene(HELD_OUT + i)) for i in range(count)]
    rows = [[Row("", 1 - GRID_GUIDANCE), Row(text, GRID_GUIDANCE)] for text in captions]
    _, final = sample_trajectory(model, noise, rows, GRID_STEPS, ())
    _write_grid(run, f"unet-{step:05}", torch.stack([model.decode(latent[None]) for latent in final]))


def _write_grid(run: Training, name: str, pictures: Tensor) -> None:
    """Pictures, (rows, height, width, 3) in [0, 1], `GRID_SIDE` a line, as a PNG file."""
    lines = [torch.cat(list(pictures[i : i + GRID_SIDE]), 1) for i in range(0, len(pictures), GRID_SIDE)]
    write_atomic(run.work / "samples" / f"{name}.png", encode_png(to_pixels(torch.cat(lines)), {}))


# --- the pipeline folder ----------------------------------------------------------------------------------------------


def save_pipeline(start: Checkpoint, unet: Any, vae: Any, text_encoder: Any, folder: Path) -> None:
    """Writes a diffusers pipeline folder with weights in half precision and the configs of the model it began with."""
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(start.configs / name, folder / name, dirs_exist_ok=True)
    shutil.copyfile(start.configs / "model_index.json", folder / "model_index.json")
    if (layers := start.configs / "pnp.json").is_file():  # a model of Stable Diffusion's own layout needs none
        shutil.copyfile(layers, folder / "pnp.json")
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for name, network in networks.items():
        # Written by hand: `save_pretrained` would note this machine's paths, and transformers 5 drops a prefix that older
        # readers expect.
        (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(start.configs / name / "config.json", folder / name / "config.json")
        half = {_prefixed(name, key): tensor.half().cpu().contiguous() for key, tensor in network.state_dict().items()}
        data = safetensors.torch.save(half, {"format": "pt"})
        write_atomic(folder / name / f"{WEIGHT_NAMES[name]}.safetensors", data)


def _prefixed(part: str, key: str) -> str:
    return f"text_model.{key}" if part == "text_encoder" and not key.startswith("text_model.") else key
