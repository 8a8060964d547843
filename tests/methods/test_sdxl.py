"""Stable Diffusion XL against diffusers' own pipeline, and the method on it against a plain implementation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from running import Project
from tiny_sdxl import write_tiny_sdxl

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion.guidance import Row
from pnp_batch.diffusion.inversion import ddim_invert, sample_trajectory
from pnp_batch.diffusion.model import DiffusionModel, load_model
from pnp_batch.manifest import Settings
from pnp_batch.methods.pnp import Target, translate

STEPS, GUIDANCE = 10, 5.0
HEIGHT, WIDTH = 64, 96  # what SDXL is told of the picture's size must not be turned round


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


def loaded(folder: Path) -> DiffusionModel:
    return load_model(resolve(str(folder), Path.cwd()), torch.device("cpu"), "float32")


def theirs(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionModel:
    return loaded(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return theirs(folder)


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(2, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(0)) * 0.8


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).norm() / expected.norm() < 1e-4)


@pytest.mark.parametrize("empty_is_zero", [True, False])
@pytest.mark.parametrize("negative", ["", "ugly, blurry"])
def test_a_picture_from_text_is_that_of_diffusers(tmp_path, latents, negative, empty_is_zero):
    """Both text encoders, the summary, the sizes, and zeros for an empty prompt where the model says so."""
    folder = write_tiny_sdxl(tmp_path, empty_is_zero=empty_is_zero)
    model, pipeline = loaded(folder), theirs(folder)
    expected = pipeline(
        "a bronze horse",
        negative_prompt=negative or None,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=HEIGHT,
        width=WIDTH,
        latents=latents[:1],
        output_type="latent",
    ).images
    rows = [[Row(negative, 1 - GUIDANCE), Row("a bronze horse", GUIDANCE)]]
    _, got = sample_trajectory(model, latents[:1], rows, STEPS, ())
    assert close(got, expected)


@torch.inference_mode()
def plain_pnp(
    model: DiffusionModel, pipeline: Any, kept: torch.Tensor, prompt: str, scale: float, f: int, attn: int
) -> torch.Tensor:
    """One image, one prompt; texts as diffusers encodes them; rows 1 and 2 get row 0's f, q and k by hooks."""
    hidden, empty, summary, no_summary = pipeline.encode_prompt(prompt, do_classifier_free_guidance=True)
    added = {
        "text_embeds": torch.cat([no_summary, no_summary, summary]),
        "time_ids": torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]] * 3),
    }
    first = pipeline.unet.up_blocks[0]
    attentions = [block.attn1 for layer in first.attentions for block in layer.transformer_blocks]
    assert len(attentions) == 9
    pipeline.scheduler.set_timesteps(STEPS)

    def overwrite(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output[:1].expand_as(output).clone()

    x = kept[:, 0]
    for i, t in enumerate(pipeline.scheduler.timesteps):
        leaves = [first.resnets[0].conv2] if i < f else []
        leaves += [leaf for each in attentions for leaf in (each.to_q, each.to_k)] if i < attn else []
        handles = [leaf.register_forward_hook(overwrite) for leaf in leaves]
        output = pipeline.unet(
            torch.cat([kept[:, i], x, x]),
            t,
            encoder_hidden_states=torch.cat([empty, empty, hidden]),
            added_cond_kwargs=added,
        ).sample
        for handle in handles:
            handle.remove()
        guided = output[1:2] + scale * (output[2:3] - output[1:2])
        x = pipeline.scheduler.step(guided, t, x, eta=0.0).prev_sample
    return x


def test_the_method_injects_at_the_first_level_in_every_block(model, pipeline, latents):
    kept = ddim_invert(model, latents, ["", ""], STEPS, model.checkpoint.schedule.timesteps(STEPS))
    cases = [(0, "a bronze statue", 7.5, 0.8, 0.5), (1, "a pink toy", 5.0, 0.5, 0.8), (0, "a cat", 3.0, 0.0, 1.0)]
    batch = [
        Target(
            source,
            prompt,
            Settings(num_inference_steps=STEPS, guidance_scale=scale, pnp_f_t=f, pnp_attn_t=a),
            *model.checkpoint.layers,
        )
        for source, prompt, scale, f, a in cases
    ]
    (results,) = translate(model, kept, ["", ""], [batch])
    for result, (source, prompt, scale, f, a) in zip(results, cases, strict=True):
        expected = plain_pnp(model, pipeline, kept[source : source + 1], prompt, scale, int(STEPS * f), int(STEPS * a))
        assert close(result, expected[0]), (prompt, f, a)


def test_a_source_pass_computes_nothing_of_the_levels_above(model, latents):
    """All that is read lies at the first of three levels, so the other two are void work for the source."""
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda _m, inputs, _o, n=n: ran.append(n))
        for n, block in enumerate(model.unet.up_blocks)
    ]
    target = Target(0, "a cat", Settings(num_inference_steps=2, pnp_f_t=1, pnp_attn_t=1), *model.checkpoint.layers)
    translate(model, latents[:1, None].repeat(1, 2, 1, 1, 1), [""], [[target]])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 0, 1, 2]  # two steps of the target's rows; the source stops within block 0


def texts_differ(model: DiffusionModel, texts: Sequence[str]) -> bool:
    one, other = model.encode_texts(texts)
    return not torch.equal(one, other)


def test_an_empty_prompt_is_no_text(model):
    assert not model.encode_texts([""]).any()
    assert texts_differ(model, ["a cat", "a dog"])


def test_every_method_and_bank_runs_from_a_manifest(folder, tmp_path):
    project = Project(tmp_path)
    for seed, name in enumerate(("a.png", "b.png")):
        project.picture(name, seed, (96, 64))
    methods = ["pnp", "ddim", "p2p", "sdedit", "text-to-image"]
    inputs = [{"images": "*.png", "prompts": [{"prompt": "a red car", "method": method} for method in methods]}]
    sizes = {"height": HEIGHT, "width": WIDTH, "inversion_prompt": "a blue car"}
    pictures = []
    for bank in ("off", "disk"):
        project.write(
            inputs, model=str(folder), defaults=sizes, output_dir=bank, run={"bank": bank, "dtype": "float32"}
        )
        project.pnp("validate")
        project.pnp("run")
        pictures.append({path.name: path.read_bytes() for path in (tmp_path / bank / "images").iterdir()})
    assert len(pictures[0]) == len(set(pictures[0].values())) == len(methods) * 2
    assert pictures[0] == pictures[1]
    row = next(json.loads(line) for line in (tmp_path / "off/metadata.jsonl").read_text().splitlines())
    assert (row["pnp_f_layers"], row["pnp_attn_layers"]) == ([0], [0, 1, 2])
