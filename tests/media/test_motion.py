from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pnp_batch.media import motion
from pnp_batch.media.images import Pixels
from pnp_batch.media.motion import PASSES, Link, link, links, optical_flow, steadied
from pnp_batch.shapes.clips import clip


def texture(shift: float = 0.0, height: int = 60, width: int = 80) -> Pixels:
    """A smooth pattern, moved to the right by so many pixels."""
    x, y = np.meshgrid(np.arange(width) - shift, np.arange(height))
    waves = [np.sin(x / a + y / b) + np.sin(x / b - y / a) for a, b in ((3, 5), (4, 7), (6, 3))]
    return np.stack([128 + 45 * wave for wave in waves], -1).astype(np.uint8)


def levels(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def noise(seed: int, like: Pixels, sigma: float = 12) -> Pixels:
    added = np.random.default_rng(seed).normal(0, sigma, like.shape)
    return np.clip(like + added, 0, 255).astype(np.uint8)


def rough(seed: int, height: int = 128, width: int = 128) -> Pixels:
    """Texture without a pattern."""
    fine = np.random.default_rng(seed).normal(0, 1, (height + 2, width + 2, 3))
    mean = sum(fine[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 3
    return np.clip(128 + 40 * mean, 0, 255).astype(np.uint8)


def sharpness(frame: Pixels) -> float:
    return float(np.abs(np.diff(frame.astype(float), axis=1)).mean())


def spread(frames: list[Pixels]) -> float:
    return float(np.mean(np.std(np.stack(frames).astype(float), axis=0)))


class TestFlow:
    @pytest.mark.parametrize("shift", [0.3, 1.7, 9.0])
    def test_finds_a_motion_to_a_fraction_of_a_pixel(self, shift: float) -> None:
        flow = optical_flow(levels(texture()), levels(texture(shift)))[0, :, 15:-15, 15:-15]
        assert abs(flow[0].median() - shift) < 0.05 and flow[1].abs().median() < 0.05

    def test_what_stands_still_does_not_move_beside_what_moves(self) -> None:
        made = clip(4, 2)
        moves = torch.from_numpy((made.masks > 0).any(0))
        around = torch.nn.functional.max_pool2d(moves[None, None].float(), 15, 1, 7)[0, 0] > 0
        flow = optical_flow(*(levels(frame) for frame in made.frames))[0].abs().amax(0)
        assert not flow[~around].any() and flow[moves].median() > 1

    def test_does_not_depend_on_the_number_of_threads(self) -> None:
        made = clip(5, 2, size=96)
        threads = torch.get_num_threads()
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(link(*(levels(frame) for frame in made.frames)))
        torch.set_num_threads(threads)
        assert torch.equal(found[0].flow, found[1].flow) and torch.equal(found[0].trust, found[1].trust)

    def test_a_cut_is_no_motion(self) -> None:
        shots = [clip(3, 1).frames[0], clip(5, 1).frames[0]]
        (cut,) = links(shots)
        assert not cut.trust.any()

    @pytest.mark.parametrize("seeds", [(3, 5), (4, 6)])
    def test_a_cut_is_seen_though_both_shots_have_the_same_flat_background(self, seeds: tuple[int, int]) -> None:
        shots = []
        for made in (clip(seed, 1, size=96) for seed in seeds):
            shots.append(np.where(made.masks[0][..., None] > 0, made.frames[0], np.uint8(255)))
        (cut,) = links(shots)
        assert not cut.trust.any()

    def test_flat_frames_of_two_colours_are_two_shots(self) -> None:
        (cut,) = links([np.full((64, 64, 3), 0, np.uint8), np.full((64, 64, 3), 255, np.uint8)])
        assert not cut.trust.any()

    @pytest.mark.parametrize("sigma", [4, 10])
    def test_grain_is_no_cut(self, sigma: float) -> None:
        (one,) = links([noise(n, texture(), sigma) for n in range(2)])
        assert one.trust.mean() > 0.7

    @pytest.mark.parametrize("step", [4, 12, 20])
    def test_a_fade_is_no_cut_and_no_motion(self, step: int) -> None:
        (one,) = links([texture() // 2, texture() // 2 + np.uint8(step)])
        assert one.trust.mean() > 0.95 and not one.flow.any()


class TestSteadying:
    def test_draws_together_what_flickers_and_keeps_it_sharp(self) -> None:
        sources = [texture(0.7 * n) for n in range(8)]
        results = [noise(n, 255 - source) for n, source in enumerate(sources)]
        steady = list(steadied(results, sources))
        wanted = [255 - source.astype(float) for source in sources]
        inner = (slice(10, -10), slice(15, -15))
        before, after = (
            np.mean([np.abs(a - b)[inner].mean() for a, b in zip(frames, wanted, strict=True)])
            for frames in (results, steady)
        )
        assert after < before / 2  # blurring would lead away from the sharp truth
        edges = [
            np.abs(np.diff(np.stack(frames).astype(float)[:, 10:-10, 15:-15], axis=2)).mean()
            for frames in (wanted, steady)
        ]
        assert edges[1] > 0.95 * edges[0]

    def test_a_flat_thing_that_moves_is_not_averaged_where_it_stood(self) -> None:
        side, inner = 56, slice(8, -8)
        sources = [rough(1) for _ in range(9)]
        results = [rough(2) for _ in range(9)]
        things = []
        for n, (source, result) in enumerate(zip(sources, results, strict=True)):
            thing = (slice(36, 36 + side), slice(10 + 5 * n, 10 + 5 * n + side))
            source[thing], result[thing] = (200, 60, 40), rough(3, side, side)
            things.append(thing)
        steady = list(steadied(results, sources))
        assert sharpness(steady[4][things[4]][inner, inner]) > 0.95 * sharpness(rough(3, side, side)[inner, inner])

    def test_a_flat_background_is_steadied_beside_what_moves(self) -> None:
        sources = [np.full((128, 128, 3), 90, np.uint8) for _ in range(9)]
        for n, source in enumerate(sources):
            source[36:76, 10 + 5 * n : 50 + 5 * n] = rough(3, 40, 40)
        results = [noise(n, rough(2)) for n in range(9)]
        steady = list(steadied(results, sources))
        still = np.s_[:30, :]
        assert spread([frame[still] for frame in steady]) < spread([frame[still] for frame in results]) / 2

    def test_equal_frames_of_a_still_clip_are_left_as_they_are(self) -> None:
        result = noise(0, texture())
        assert all(np.array_equal(frame, result) for frame in steadied([result] * 5, [texture()] * 5))

    def test_a_still_clip_becomes_steady_and_no_more_blurred_than_its_mean(self) -> None:
        results = [noise(n, texture()) for n in range(9)]
        steady = list(steadied(results, [texture()] * 9))
        assert spread(steady) < spread(results) / 2
        assert np.abs(steady[4] - np.mean(results, axis=0)).mean() < 4

    def test_nothing_passes_a_cut(self) -> None:
        shots = [clip(3, 3).frames, clip(5, 3).frames]
        results = [np.full_like(shots[0], 40), np.full_like(shots[1], 200)]
        whole = list(steadied(np.concatenate(results), np.concatenate(shots)))
        assert np.array_equal(np.stack(whole), np.concatenate(results))

    def test_one_frame_stays_as_it_is(self) -> None:
        result = noise(0, texture())
        (steady,) = steadied([result], [texture()])
        assert np.array_equal(steady, result)

    def test_goes_through_a_clip_with_a_few_frames_in_hand(self) -> None:
        ahead = []

        def counted() -> Iterator[Pixels]:
            for n in range(40):
                ahead.append(n)
                yield texture(n)

        for number, _ in enumerate(steadied(counted(), (texture(n) for n in range(40)))):
            assert len(ahead) - number <= PASSES + 1 or number + PASSES >= 40

    def test_lets_go_of_links_that_all_passes_have_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alive: weakref.WeakSet[Link] = weakref.WeakSet()
        most = 0

        def watched(before: torch.Tensor, after: torch.Tensor) -> Link:
            nonlocal most
            made = link(before, after)
            alive.add(made)
            most = max(most, len(alive))
            return made

        monkeypatch.setattr(motion, "link", watched)
        for _ in steadied((texture(n) for n in range(30)), (texture(n) for n in range(30))):
            pass
        assert PASSES <= most <= PASSES + 2
