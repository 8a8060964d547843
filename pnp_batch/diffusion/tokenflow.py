"""TokenFlow (Geyer, Bar-Tal, Bagon, Dekel, ICLR 2024, arXiv 2307.10373): one appearance for all frames of a video.

Keyframes attend to each other (section 4.1): the self-attention of each sees the keys and values of all. The frames between
compute no self-attention of their own: each token takes the output that its nearest neighbour among the *source* features has
in the keyframes before and after, blended by distance (section 4.2, eq. 5 and 6).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pnp_batch.diffusion.injection import replaced

Features = Mapping[str, Tensor]

# Of latents, whose values are about 1: the difference at which little is taken over, and what distance on the picture counts.
UNLIKE, FAR = 0.6, 0.3

MAX_SIMILARITIES = 2**24  # similarities held at once, 64 MB: a frame of 64x64 tokens has as many


@dataclass(frozen=True)
class TokenSite:
    """What a self-attention is given: the normed tokens of its block. Shape (rows, tokens, channels)."""

    name: str
    block: Any

    @property
    def leaves(self) -> dict[str, nn.Module]:
        """The module whose output the tokens are, by feature name."""
        return {self.name: self.block.norm1}


def token_sites(unet: Any) -> list[TokenSite]:
    """Every transformer block of a UNet that has a self-attention, down, middle and up."""
    blocks = ((name, module) for name, module in unet.named_modules() if hasattr(module, "attn1"))
    return [TokenSite(f"t.{name}", block) for name, block in blocks]


def keyframes(seed: int, step: int, first: int, count: int, segment: int) -> list[int]:
    """One frame of each segment, drawn anew at every step (section 4.2).

    What is drawn depends on the segment's place in the clip, so that windows that share a segment share its keyframe.

    Args:
        seed: Of the translation.
        step: Sampling step.
        first: Place of the window's first frame in the clip, a multiple of `segment`.
        count: Frames of the window.
        segment: Frames of a segment; the last one may be shorter.

    Returns:
        Places in the window, ascending.
    """
    chosen = []
    for begin in range(0, count, segment):
        draw = np.random.default_rng([seed, step, (first + begin) // segment])
        chosen.append(begin + int(draw.integers(min(segment, count - begin))))
    return chosen


@dataclass(frozen=True)
class Between:
    """Where frames stand among the keyframes; all (frames,).

    Attributes:
        before: Number of the keyframe before (or at) each frame; of the first one for frames before it.
        after: Number of the keyframe after it; of the last one for frames behind it.
        weight: Of the one after, from 0 at the keyframe before to 1 at the one after.
    """

    before: Tensor
    after: Tensor
    weight: Tensor


def between(frames: Sequence[int], keys: Sequence[int], device: torch.device) -> Between:
    """Places frames among keyframes.

    Args:
        frames: Places of the frames in the window.
        keys: Places of the keyframes, ascending.
        device: Where the result shall be.
    """
    after = np.searchsorted(keys, frames)
    before = np.clip(after - (np.asarray(keys)[np.minimum(after, len(keys) - 1)] != np.asarray(frames)), 0, None)
    after = np.minimum(after, len(keys) - 1)
    start, end = np.asarray(keys)[before], np.asarray(keys)[after]
    weight = (np.asarray(frames) - start) / np.maximum(end - start, 1)
    return Between(
        torch.from_numpy(before).to(device),
        torch.from_numpy(after).to(device),
        torch.from_numpy(np.clip(weight, 0.0, 1.0)).float().to(device),
    )


def nearest(tokens: Tensor, keys: Tensor, limit: int = MAX_SIMILARITIES) -> Tensor:
    """For each token of each frame its nearest neighbour in that frame's keyframe, by cosine similarity (eq. 5).

    Args:
        tokens: (frames, tokens, channels) source features.
        keys: (frames, tokens, channels) source features of the keyframe that goes with each frame.
        limit: Similarities to hold at once.

    Returns:
        (frames, tokens) int64.
    """
    found = torch.empty(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    rows = max(limit // keys.shape[1], 1)
    for frame, key in enumerate(keys):
        unit = F.normalize(key.float(), dim=-1).T  # the length of the other side does not change which is nearest
        for begin in range(0, tokens.shape[1], rows):
            found[frame, begin : begin + rows] = (tokens[frame, begin : begin + rows].float() @ unit).argmax(-1)
    return found


@contextmanager
def joint_attention(sites: Sequence[TokenSite], frames: int) -> Iterator[dict[str, Tensor]]:
    """Within the block, the rows of a pass attend to each other in groups of `frames`, and what they get is noted.

    Args:
        sites: Where.
        frames: Rows of one group: the keyframes under one and the same text.

    Yields:
        What each self-attention gave, by the name of its site: (rows, tokens, channels).
    """
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            attention = site.block.attn1
            stack.callback(attention.set_processor, attention.processor)
            attention.set_processor(_Joint(frames, outputs, site.name))
        yield outputs


class _Joint:
    """An attention processor for the self-attention of all frames at once."""

    def __init__(self, frames: int, outputs: dict[str, Tensor], name: str) -> None:
        self._frames, self._outputs, self._name = frames, outputs, name

    def __call__(self, attention: Any, hidden: Tensor, *_unused: Any, **_none: Any) -> Tensor:
        rows, tokens, _ = hidden.shape
        queries, keys, values = (
            leaf(hidden).reshape(rows // self._frames, self._frames * tokens, attention.heads, -1).transpose(1, 2)
            for leaf in (attention.to_q, attention.to_k, attention.to_v)
        )
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=attention.scale)
        output: Tensor = attention.to_out[0](attended.transpose(1, 2).reshape(rows, tokens, -1).to(hidden.dtype))
        self._outputs[self._name] = output
        return output


@dataclass(frozen=True)
class Flow:
    """Which tokens of the keyframes the tokens of some frames correspond to.

    Attributes:
        places: Where the frames stand among the keyframes.
        nearest: By site, the nearest tokens in the keyframe before and in the one after, (frames, tokens) each.
    """

    places: Between
    nearest: Mapping[str, tuple[Tensor, Tensor]]


def flow(sites: Sequence[TokenSite], tokens: Features, key_tokens: Features, places: Between) -> Flow:
    """Finds correspondences between source features.

    Args:
        sites: Where.
        tokens: By site, source features of the frames: (frames, tokens, channels).
        key_tokens: By site, those of the keyframes: (keyframes, tokens, channels).
        places: Where the frames stand among the keyframes.
    """
    return Flow(
        places,
        {
            name: (
                nearest(tokens[name], key_tokens[name][places.before]),
                nearest(tokens[name], key_tokens[name][places.after]),
            )
            for name in (site.name for site in sites)
        },
    )


@contextmanager
def propagated(sites: Sequence[TokenSite], outputs: Features, along: Flow) -> Iterator[None]:
    """Within the block, self-attention gives what the keyframes got, at corresponding tokens (eq. 6).

    Rows of a pass are the frames under one text, then the frames under the next.

    Args:
        sites: Where.
        outputs: By site, what `joint_attention` noted: (texts * keyframes, tokens, channels).
        along: The correspondences of the frames.
    """
    with replaced(
        (site.block, "attn1", _Propagated(outputs[site.name], along.places, *along.nearest[site.name]))
        for site in sites
    ):
        yield


class _Propagated(nn.Module):
    """Stands for a self-attention whose output is known from the keyframes."""

    def __init__(self, outputs: Tensor, places: Between, before: Tensor, after: Tensor) -> None:
        super().__init__()
        self._outputs, self._places, self._before, self._after = outputs, places, before, after

    def forward(self, hidden: Tensor, *_unused: Any, **_none: Any) -> Tensor:
        """The blend of both keyframes' outputs, (texts * frames, tokens, channels)."""
        places = self._places
        weight = places.weight[:, None, None].to(hidden.dtype)
        texts = len(hidden) // len(self._before)
        parts = [
            (1 - weight) * known[places.before[:, None], self._before]
            + weight * known[places.after[:, None], self._after]
            for known in self._outputs.chunk(texts)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class LatentFlow:
    """Which cells of the keyframes' latents the cells of some frames correspond to, and how alike the source is there.

    Attributes:
        places: Where the frames stand among the keyframes.
        cells: For the keyframe before and the one after, (frames, cells) int64 each.
        alike: Likewise, (frames, 1, height, width) from 0 to 1.
    """

    places: Between
    cells: tuple[Tensor, Tensor]
    alike: tuple[Tensor, Tensor]

    def followed(self, clean: Tensor, keys: Tensor) -> Tensor:
        """Predicted clean latents, drawn to those of the keyframes where the source is alike.

        Args:
            clean: (frames, 4, height, width) of the frames.
            keys: (keyframes, 4, height, width) of the keyframes.
        """
        weight = self.places.weight[:, None, None, None]
        sides = ((self.places.before, 1 - weight), (self.places.after, weight))
        drawn = torch.zeros_like(clean)
        for (numbers, share), cells, alike in zip(sides, self.cells, self.alike, strict=True):
            drawn += share * (alike * _gathered(keys[numbers], cells) + (1 - alike) * clean)
        return drawn


def latent_flow(source: Tensor, keys: Tensor, places: Between) -> LatentFlow:
    """Finds correspondences between the source's own latents: beyond TokenFlow, whose attentions leave convolutions alone.

    Args:
        source: (frames, 4, height, width) the source's latents without noise.
        keys: (keyframes, 4, height, width) those of the keyframes.
        places: Where the frames stand among the keyframes.
    """
    sides = [_corresponding(source, keys[numbers]) for numbers in (places.before, places.after)]
    cells, alike = zip(*sides, strict=True)
    return LatentFlow(places, cells, alike)


def _corresponding(source: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest cells by their 3x3 surroundings, near ones preferred, and how alike they are."""
    height, width = source.shape[-2:]
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(source) / max(height, width)
    cells = torch.empty(len(source), height * width, dtype=torch.int64, device=source.device)
    rows = max(MAX_SIMILARITIES // (height * width), 1)
    for frame, (own, key) in enumerate(zip(_surroundings(source), _surroundings(keys), strict=True)):
        for begin in range(0, len(own), rows):
            part = slice(begin, begin + rows)
            far = torch.cdist(own[part], key).square() / own.shape[1] + FAR * torch.cdist(grid[part], grid).square()
            cells[frame, part] = far.argmin(-1)
    unlike = (source - _gathered(keys, cells)).square().mean(1, keepdim=True)
    around = F.avg_pool2d(F.pad(unlike, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return cells, torch.exp(-around / UNLIKE**2)


def _surroundings(latents: Tensor) -> Tensor:
    """(frames, cells, 9 * channels): each cell with its neighbours."""
    return F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2)


def _gathered(latents: Tensor, cells: Tensor) -> Tensor:
    index = cells[:, None].expand(-1, latents.shape[1], -1)
    return torch.gather(latents.flatten(2), 2, index).unflatten(2, latents.shape[-2:])  # type: ignore[no-untyped-call, no-any-return]
