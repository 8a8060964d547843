"""The baselines: against diffusers' own pipelines, against each other, and Prompt-to-Prompt against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion import ddim
from pnp_batch.diffusion.model import DiffusionModel, load_model
from pnp_batch.manifest import Settings
from pnp_batch.methods import METHODS
from pnp_batch.methods.p2p import edit_of
from pnp_batch.methods.pnp import Target

TINY_SD = Path(__file__).parents[1] / "conformance/tiny-sd"
STEPS = 6
SOURCE, TARGET = "a photo of a horse", "a photo of a zebra"


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    torch.set_num_threads(1)
    return load_model(resolve(str(TINY_SD), Path.cwd()), torch.device("cpu"), "float32")


@pytest.fixture(scope="module")
def kept() -> torch.Tensor:
    """Two trajectories: any latents will do."""
    return torch.randn(2, STEPS, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def target(source: int = 0, prompt: str = TARGET, **settings: Any) -> Target:
    return Target(source, prompt, Settings(num_inference_steps=STEPS, **settings), (), ())


def translated(model: DiffusionModel, method: str, given: torch.Tensor, *batches: list[Target]) -> list[torch.Tensor]:
    return METHODS[method].load()(model, given, [SOURCE, SOURCE], batches)


def pipeline(kind: Any) -> Any:
    made = kind.from_pretrained(TINY_SD, safety_checker=None, local_files_only=True)
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def close(got: torch.Tensor, expected: torch.Tensor, within: float = 1e-4) -> bool:
    return bool((got - expected).norm() / expected.norm() < within)


def test_text_to_image_is_diffusers_own_pipeline(model: DiffusionModel, kept: torch.Tensor) -> None:
    batch = [target(prompt=prompt, seed=7, guidance_scale=4.0) for prompt in (TARGET, "a red car")]
    (got,) = translated(model, "text-to-image", kept[:, 0], batch)
    for latents, each in zip(got, batch, strict=True):
        expected = pipeline(StableDiffusionPipeline)(
            each.prompt,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            height=128,
            width=128,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="latent",
        ).images
        assert close(latents, expected[0])


@pytest.mark.parametrize("strength", [0.35, 0.9, 1.0])
def test_sdedit_is_diffusers_image_to_image(model: DiffusionModel, kept: torch.Tensor, strength: float) -> None:
    batch = [target(source, seed=5, guidance_scale=4.0, sdedit_strength=strength) for source in (1, 0)]
    (got,) = translated(model, "sdedit", kept[:, 0], batch)
    for latents, each in zip(got, batch, strict=True):
        expected = pipeline(StableDiffusionImg2ImgPipeline)(
            each.prompt,
            image=kept[each.source, :1],
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(5),
            output_type="latent",
        ).images
        assert close(latents, expected[0])


def test_members_of_a_batch_start_at_their_own_strength(model: DiffusionModel, kept: torch.Tensor) -> None:
    strengths = (0.0, 0.5, 1.0)
    (together,) = translated(model, "sdedit", kept[:, 0], [target(sdedit_strength=strength) for strength in strengths])
    for latents, strength in zip(together, strengths, strict=True):
        (alone,) = translated(model, "sdedit", kept[:, 0], [target(sdedit_strength=strength)])
        assert close(latents, alone[0])
    assert torch.equal(together[0], kept[0, 0])


def test_ddim_is_pnp_that_injects_nothing(model: DiffusionModel, kept: torch.Tensor) -> None:
    batches = [[target(0), target(1, guidance_scale=3.0)], [target(1, negative_prompt="ugly", negative_alpha=0.3)]]
    nothing = [
        [
            Target(t.source, t.prompt, t.settings.model_copy(update={"pnp_f_t": 0.0, "pnp_attn_t": 0.0}), (), ())
            for t in b
        ]
        for b in batches
    ]
    for got, expected in zip(
        translated(model, "ddim", kept, *batches), translated(model, "pnp", kept, *nothing), strict=True
    ):
        assert torch.equal(got, expected)


def test_p2p_that_replaces_nothing_is_ddim(model: DiffusionModel, kept: torch.Tensor) -> None:
    batch = [
        target(0, p2p_cross_replace=0.0, p2p_self_replace=0.0),
        target(1, p2p_cross_replace=0.1, p2p_self_replace=0.1),
    ]
    assert torch.equal(translated(model, "p2p", kept, batch)[0], translated(model, "ddim", kept, batch)[0])


@pytest.mark.parametrize("prompt", ["a photo of a zebra", "a watercolor photo of a small horse on grass"])
def test_p2p_is_its_definition(model: DiffusionModel, kept: torch.Tensor, prompt: str) -> None:
    """A batch against one image at a time, in passes that record maps first and then put them in."""
    batch = [
        target(1, prompt, guidance_scale=3.0, p2p_cross_replace=0.7, p2p_self_replace=0.4),
        target(0, prompt, guidance_scale=2.0, p2p_cross_replace=0.4, p2p_self_replace=0.7),
        target(0, prompt, guidance_scale=2.0, p2p_cross_replace=0.4, p2p_self_replace=0.7, p2p_self_cells=64),
    ]
    (got,) = translated(model, "p2p", kept, batch)
    plain = translated(model, "ddim", kept, batch)[0]
    for latents, undisturbed, each in zip(got, plain, batch, strict=True):
        assert close(latents, defined(model, kept[each.source], each)[0])
        assert not close(latents, undisturbed, within=1e-3)


def defined(model: DiffusionModel, trajectory: torch.Tensor, each: Target) -> torch.Tensor:
    """Prompt-to-Prompt of one image and one prompt."""
    timesteps, settings = model.checkpoint.schedule.timesteps(STEPS), each.settings
    edit = edit_of(model.checkpoint, SOURCE, each.prompt, "auto")
    x = trajectory[:1]
    for i, t in enumerate(timesteps):
        crossed, copied = i < int(STEPS * settings.p2p_cross_replace), i < int(STEPS * settings.p2p_self_replace)
        source_maps = watched_pass(model, trajectory[i : i + 1], t, SOURCE, {})[1]
        own_maps = watched_pass(model, x, t, each.prompt, {})[1]
        given = {}
        for name, maps in source_maps.items():
            if name.endswith("attn1") and copied and maps.shape[1] <= settings.p2p_self_cells:
                given[name] = maps
            if name.endswith("attn2") and crossed:
                given[name] = lambda own, maps=maps: edit.kept * (maps @ edit.mapping) + (1 - edit.kept) * own
        assert own_maps.keys() == source_maps.keys()
        conditional = watched_pass(model, x, t, each.prompt, given)[0]
        unconditional = watched_pass(model, x, t, "", {})[0]
        output = unconditional + settings.guidance_scale * (conditional - unconditional)
        a, below = model.alphas[t], model.alpha_below(timesteps, i)
        x = ddim.move(x, output, a, below)
    return x


def watched_pass(
    model: DiffusionModel, latents: torch.Tensor, timestep: int, text: str, given: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One row through the UNet: its noise and all of its attention maps; maps that are given replace its own."""
    seen: dict[str, torch.Tensor] = {}
    kept = model.unet.attn_processors

    class Watching:
        def __init__(self, name: str) -> None:
            self.name = name.removesuffix(".processor")

        def __call__(
            self, attn: Any, hidden: torch.Tensor, encoder_hidden_states: Any = None, **_: object
        ) -> torch.Tensor:
            context = hidden if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (attn.head_to_batch_dim(s) for s in (attn.to_q(hidden), attn.to_k(context), attn.to_v(context)))
            maps = (q @ k.mT * attn.scale).softmax(-1)
            seen[self.name] = maps
            replacement = given.get(self.name, maps)
            maps = replacement(maps) if callable(replacement) else replacement
            return attn.to_out[0](attn.batch_to_head_dim(maps @ v))

    model.unet.set_attn_processor({name: Watching(name) for name in kept})
    try:
        with torch.inference_mode():
            output = model.unet(latents, timestep, encoder_hidden_states=model.encode_texts([text])).sample
    finally:
        model.unet.set_attn_processor(kept)
    return output, seen


def test_p2p_takes_over_self_attention_of_few_cells_only(model: DiffusionModel, kept: torch.Tensor) -> None:
    limits = (1, 16, 64, 256)  # below the smallest map of this model (2x2 cells), and with one level more each time
    (got,) = translated(model, "p2p", kept, [target(p2p_self_replace=1.0, p2p_self_cells=limit) for limit in limits])
    (without,) = translated(model, "p2p", kept, [target(p2p_self_replace=0.0)])
    assert close(got[0], without[0])
    assert not any(close(got[i], got[j], within=1e-3) for i in range(4) for j in range(i))


def test_p2p_leaves_the_model_as_it_was(model: DiffusionModel, kept: torch.Tensor) -> None:
    processors = dict(model.unet.attn_processors)
    translated(model, "p2p", kept, [target()])
    assert model.unet.attn_processors == processors
    assert not any(module._forward_hooks for module in model.unet.modules())


def mapped(model: DiffusionModel, source: str, prompt: str, kind: str = "auto") -> dict[int, list[tuple[int, float]]]:
    """For each token of the target whose map is taken over: the source's tokens and their shares. Start token is 0."""
    edit = edit_of(model.checkpoint, source, prompt, kind)
    length = len(model.checkpoint.tokenizer(prompt).input_ids)
    return {
        j: [(i, round(float(edit.mapping[i, j]), 3)) for i in edit.mapping[:, j].nonzero()[:, 0].tolist()]
        for j in range(length)
        if edit.kept[j]
    }


def test_swapped_words_have_the_map_of_the_word_in_their_place() -> None:
    shapes = load_model(resolve("builtin:shapes", Path.cwd()), torch.device("cpu"), "float32")
    swap = mapped(shapes, "a red star on grass", "a gold star on night")
    assert swap == {j: [(j, 1.0)] for j in range(7)}


def test_new_words_have_maps_of_their_own_and_old_ones_move_along() -> None:
    shapes = load_model(resolve("builtin:shapes", Path.cwd()), torch.device("cpu"), "float32")
    refined = mapped(shapes, "a red star on grass", "a painting of a red star on grass")
    # start, "a", (painting of a), red, star, on, grass, end; which "a" is the old one makes no difference
    assert [j for j in refined if j not in (1, 4)] == [0, 5, 6, 7, 8, 9]
    assert [refined[j] for j in (0, 5, 6, 7, 8, 9)] == [[(i, 1.0)] for i in (0, 2, 3, 4, 5, 6)]
    assert len({1, 4} & refined.keys()) == 1


def test_a_word_of_more_tokens_shares_the_map(model: DiffusionModel) -> None:
    """The tiny model's tokenizer knows few words, so words fall into several tokens."""
    count = [len(model.checkpoint.tokenizer(word).input_ids) - 2 for word in ("horse", "hippopotamus")]
    assert count[0] != count[1]
    swap = mapped(model, "horse", "hippopotamus")
    for j in range(1, 1 + count[1]):
        assert swap[j] == [(i, round(1 / count[1], 3)) for i in range(1, 1 + count[0])]
    assert swap[1 + count[1]] == [(1 + count[0], 1.0)]
