from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pnp_batch.media.images import Pixels
from pnp_batch.media.motion import PASSES, link, links, optical_flow, steadied
from pnp_batch.shapes.clips import clip


def texture(shift: float = 0.0, height: int = 60, width: int = 80) -> Pixels:
    """A smooth pattern, moved to the right by so many pixels."""
    x, y = np.meshgrid(np.arange(width) - shift, np.arange(height))
    waves = [np.sin(x / a + y / b) + np.sin(x / b - y / a) for a, b in ((3, 5), (4, 7), (6, 3))]
    return np.stack([128 + 45 * wave for wave in waves], -1).astype(np.uint8)


def levels(pixels: Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def noise(seed: int, like: Pixels) -> Pixels:
    added = np.random.default_rng(seed).normal(0, 12, like.shape)
    return np.clip(like + added, 0, 255).astype(np.uint8)


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

    @pytest.mark.slow
    def test_memory_does_not_grow_with_the_length_of_a_clip(self) -> None:
        peaks = []
        for count in (20, 120):
            tracemalloc.start()
            for _ in steadied((texture(n) for n in range(count)), (texture(n) for n in range(count))):
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.1 * peaks[0]
