"""TokenFlow's parts against their equations, and windows against frames on their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pnp_batch.checkpoint import resolve
from pnp_batch.diffusion import ddim
from pnp_batch.diffusion.inversion import ddim_invert
from pnp_batch.diffusion.model import DiffusionModel, load_model
from pnp_batch.diffusion.tokenflow import (
    between,
    flow,
    joint_attention,
    keyframes,
    latent_flow,
    nearest,
    propagated,
    token_sites,
)
from pnp_batch.manifest import Settings
from pnp_batch.methods import pnp, pnp_video

TINY_SD = Path(__file__).parents[1] / "conformance/tiny-sd"
CPU = torch.device("cpu")
STEPS = 5


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    torch.set_num_threads(1)
    return load_model(resolve(str(TINY_SD), Path.cwd()), CPU, "float32")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trajectory(model: DiffusionModel, frames: int) -> torch.Tensor:
    """Inverted latents of frames that differ a little."""
    clean = 0.5 * noise(1, 4, 8, 8) + 0.05 * noise(frames, 4, 8, 8, seed=1)
    timesteps = model.checkpoint.schedule.timesteps(STEPS)
    return ddim_invert(model, clean, [""] * frames, STEPS, timesteps, pnp.plain_loop)


def target(prompt: str = "a bronze statue", **settings: object) -> pnp.Target:
    chosen = Settings.model_validate({"num_inference_steps": STEPS, "guidance_scale": 5.0, **settings}).settled()
    return pnp.Target(0, prompt, chosen, (4,), tuple(range(4, 12)))


class TestKeyframes:
    def test_one_of_each_segment_and_other_ones_at_other_steps(self) -> None:
        drawn = [keyframes(0, step, 0, 21, 8) for step in range(20)]
        assert all(a < 8 <= b < 16 <= c < 21 for a, b, c in drawn)
        assert len({tuple(each) for each in drawn}) > 10 and drawn == [
            keyframes(0, step, 0, 21, 8) for step in range(20)
        ]
        assert keyframes(1, 0, 0, 4000, 8) != keyframes(0, 0, 0, 4000, 8)

    def test_windows_that_share_a_segment_share_its_keyframe(self) -> None:
        for step in range(10):
            assert keyframes(7, step, 0, 40, 8)[-1] == 32 + keyframes(7, step, 32, 40, 8)[0]

    def test_frames_stand_between_two_keyframes_by_distance(self) -> None:
        places = between([0, 2, 5, 6, 10, 12], [2, 6, 10], CPU)
        assert places.before.tolist() == [0, 0, 0, 1, 2, 2]
        assert places.after.tolist() == [0, 0, 1, 1, 2, 2]
        after_the_first = [w for w, a, b in zip(places.weight, places.before, places.after, strict=True) if a != b]
        assert after_the_first == [pytest.approx(0.75)]


class TestCorrespondences:
    def test_the_nearest_token_by_cosine_however_it_is_cut(self) -> None:
        tokens, keys = noise(3, 50, 7), noise(3, 50, 7, seed=1) * torch.rand(3, 50, 1)
        plain = F.cosine_similarity(tokens[:, :, None], keys[:, None], dim=-1).argmax(-1)
        for limit in (2**24, 50 * 7, 1):
            assert torch.equal(nearest(tokens, keys, limit), plain)

    def test_tokens_that_moved_are_followed(self) -> None:
        keys = noise(1, 64, 16)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        assert torch.equal(nearest(keys[:, order], keys), order[None])


class TestAttention:
    def test_keyframes_attend_to_all_keyframes_under_the_same_text(self, model: DiffusionModel) -> None:
        site = token_sites(model.unet)[0]
        attention = site.block.attn1
        channels = attention.to_q.in_features
        hidden = noise(6, 16, channels)  # two texts, three frames
        with joint_attention([site], 3) as noted:
            attention(hidden)
        joint = attention(hidden.reshape(2, 48, channels)).reshape(6, 16, channels)
        torch.testing.assert_close(noted[site.name], joint, rtol=1e-5, atol=1e-5)

    def test_everything_is_as_before_after_an_error(self, model: DiffusionModel) -> None:
        sites = token_sites(model.unet)
        before = [(site.block.attn1, site.block.attn1.processor) for site in sites]
        places = between([0], [0], CPU)
        with pytest.raises(ZeroDivisionError), joint_attention(sites, 1):
            raise ZeroDivisionError
        tokens = {site.name: noise(1, 4, 8) for site in sites}
        with pytest.raises(ZeroDivisionError), propagated(sites, tokens, flow(sites, tokens, tokens, places)):
            raise ZeroDivisionError
        assert before == [(site.block.attn1, site.block.attn1.processor) for site in sites]

    def test_a_frame_between_takes_the_blend_of_what_corresponds(self, model: DiffusionModel) -> None:
        site = token_sites(model.unet)[0]
        keys = {site.name: noise(2, 16, 8)}
        order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
        moved = {site.name: torch.stack([keys[site.name][0], keys[site.name][0, order]])}
        outputs = {site.name: noise(4, 16, 5, seed=2)}  # two texts
        along = flow([site], moved, {site.name: torch.stack([keys[site.name][0]] * 2)}, between([0, 1], [0, 4], CPU))
        with propagated([site], outputs, along):
            given = site.block.attn1(noise(4, 16, 5))
        first, second = outputs[site.name].chunk(2)
        torch.testing.assert_close(given[0], first[0])  # the keyframe itself
        torch.testing.assert_close(given[3], 0.75 * second[0, order] + 0.25 * second[1, order])


class TestLatents:
    def test_a_frame_like_its_keyframe_takes_its_prediction_and_another_keeps_its_own(self) -> None:
        source = noise(2, 4, 8, 8)
        unlike = torch.stack([source[0], source[1] + 9])
        along = latent_flow(unlike, source, between([0, 7], [0, 7], CPU))
        own, keys = noise(2, 4, 8, 8, seed=1), noise(2, 4, 8, 8, seed=2)
        drawn = along.followed(own, keys)
        torch.testing.assert_close(drawn[0], keys[0])
        torch.testing.assert_close(drawn[1], own[1])

    def test_a_shifted_picture_is_followed(self) -> None:
        keys = noise(1, 4, 8, 8)
        along = latent_flow(keys.roll(1, -1), keys, between([1], [0], CPU))
        drawn = along.followed(noise(1, 4, 8, 8, seed=1), keys)
        torch.testing.assert_close(drawn[..., 2:-1], keys.roll(1, -1)[..., 2:-1])

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    def test_the_output_for_a_clean_latent_gives_that_latent(self, kind: str) -> None:
        clean, latents = noise(1, 4, 8, 8).double(), noise(1, 4, 8, 8, seed=1).double()
        output = ddim.output_for(clean, latents, 0.3, kind)
        torch.testing.assert_close(ddim.clean_from(output, latents, 0.3, kind), clean)


class TestWindows:
    def test_a_window_of_one_frame_is_plain_pnp(self, model: DiffusionModel) -> None:
        latents = trajectory(model, 1)
        (alone,) = pnp.translate(model, latents, [""], [[target()]])
        (joint,) = pnp_video.translate(model, latents, "", [target()], 0, 4)
        torch.testing.assert_close(joint, alone, rtol=1e-4, atol=1e-4)

    def test_equal_frames_become_equal_frames(self, model: DiffusionModel) -> None:
        latents = trajectory(model, 1).expand(11, -1, -1, -1, -1)
        (joint,) = pnp_video.translate(model, latents, "", [target()], 0, 4)
        torch.testing.assert_close(joint, joint[:1].expand_as(joint), rtol=1e-3, atol=1e-3)

    def test_frames_influence_each_other_and_the_trajectory_stays_as_it_is(self, model: DiffusionModel) -> None:
        latents = trajectory(model, 10)
        before = latents.clone()
        (joint,) = pnp_video.translate(model, latents, "", [target()], 0, 4)
        (alone,) = pnp.translate(model, latents, [""] * 10, [[replace(target(), source=n) for n in range(10)]])
        assert torch.equal(latents, before)
        assert (joint - alone).abs().max() > 0.01

    def test_a_prompt_does_not_depend_on_the_other_prompts(self, model: DiffusionModel) -> None:
        latents = trajectory(model, 10)
        one, other = target("a bronze statue"), target("a pink toy", seed=3, pnp_f_t=0.4)
        both = pnp_video.translate(model, latents, "", [one, other], 0, 4)
        (alone,) = pnp_video.translate(model, latents, "", [other], 0, 4)
        assert torch.equal(both[1], alone)

    def test_the_size_of_a_chunk_changes_rounding_only(self, model: DiffusionModel) -> None:
        latents = trajectory(model, 10)
        results = [pnp_video.translate(model, latents, "", [target()], 0, chunk)[0] for chunk in (3, 10)]
        torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
