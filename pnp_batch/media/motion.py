"""Motion-compensated temporal filtering: a translated video moves as its source moves, and stays the same otherwise.

Every frame is averaged with its two neighbours, brought to it along the optical flow of the *source*, as far as that flow is to
be believed (Dubois and Sabri, "Noise reduction in image sequences using motion-compensated temporal filtering", 1984); each
further pass reaches a frame further. The flow is Lucas and Kanade's ("An iterative image registration technique", 1981), dense,
in colour, coarse to fine (Bouguet, 2001), with the skip mode of video codecs: what standing still explains as well, stands still.

Only operations on single elements and sums over small windows are used, so that the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import tee

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pnp_batch.media.images import Pixels

PASSES = 4  # measured: half the warp error of two, and no less sharp (docs/video.md)

COARSEST = 12  # pixels of the shorter side at the top of the pyramid, at least
UPDATES = 3  # of the flow, on each level
AROUND = 7  # side of the square in which all pixels are taken to move alike
SMOOTH = 3  # side of the square in which a flow is smoothed after each update
FLAT = 4.0  # squared levels a pixel: where there is less contrast, updates are damped
STILL = 1.0  # squared levels by which moving must explain the other frame better than standing still

ASTRAY = 1.0  # pixels that lie between a place and where going forth and back leads, for a quarter of the trust
UNLIKE = 12.0  # levels between source and source brought along the flow, likewise
CUT = 0.25  # share of the pixels that must be trusted; where there are fewer, another shot begins


@dataclass(frozen=True)
class Link:
    """Where the pixels of two neighbouring frames are in each other; number 0 is the earlier one.

    Attributes:
        flow: For each pixel of both frames how far it is away in the other one, in pixels: (2, 2, height, width), x before y.
        trust: How far that is to be believed, (2, 1, height, width) from 0 to 1; 0 everywhere where a cut parts the frames.
    """

    flow: Tensor
    trust: Tensor


def steadied(frames: Iterable[Pixels], sources: Iterable[Pixels], passes: int = PASSES) -> Iterator[Pixels]:
    """The frames of a translated video, drawn together along the motion of its source. Streams: holds two frames a pass.

    Whoever changes what it gives raises `MOTION_VERSION` of `stages.videos`, which stands in keys.

    Args:
        frames: (height, width, 3) uint8 each.
        sources: The frames that they were made from, of the same size.
        passes: How often each frame is averaged with its neighbours.
    """
    shown: Iterator[Tensor] = map(_levels, frames)
    for along in tee(links(sources), passes):
        shown = _averaged(shown, along)
    return map(_pixels, shown)


def links(sources: Iterable[Pixels]) -> Iterator[Link]:
    """How each frame corresponds to the next."""
    levels = map(_levels, sources)
    before = next(levels)
    for after in levels:
        yield link(before, after)
        before = after


def link(before: Tensor, after: Tensor) -> Link:
    """How two frames, (1, 3, height, width) in levels each, correspond."""
    frames = torch.cat([before, after])
    others = frames.flip(0)
    flow = optical_flow(frames, others)
    astray = (flow + _brought(flow.flip(0), flow)).square().sum(1, keepdim=True) / ASTRAY**2
    unlike = _unlike(frames, _brought(others, flow)) / UNLIKE**2
    trust = _is_inside(flow) / ((1 + astray) * (1 + unlike)).square()
    is_cut = int((trust > 0.5).sum()) < CUT * trust.numel()
    return Link(flow, torch.zeros_like(trust) if is_cut else trust)


def optical_flow(frames: Tensor, others: Tensor) -> Tensor:
    """How far each pixel of some frames is away in other ones.

    Args:
        frames: (frames, 3, height, width) in levels.
        others: Likewise.

    Returns:
        (frames, 2, height, width) in pixels, x before y.
    """
    pyramid = [(frames, others)]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * COARSEST:
        pyramid.append((F.avg_pool2d(pyramid[-1][0], 2), F.avg_pool2d(pyramid[-1][1], 2)))
    flow = torch.zeros_like(pyramid[-1][0][:, :2])
    for frame, other in reversed(pyramid):
        if flow.shape[-2:] != frame.shape[-2:]:
            flow = 2 * F.interpolate(flow, frame.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(UPDATES):
            flow = _mean(_mean(flow + _update(frame, _brought(other, flow, "bilinear")), SMOOTH), SMOOTH)
        moving, still = _unlike(frame, _brought(other, flow, "bilinear")), _unlike(frame, other)
        flow = flow * (_mean(moving, AROUND) < _mean(still, AROUND) - STILL)
    return flow


def _unlike(pictures: Tensor, others: Tensor) -> Tensor:
    """The mean squared difference of each pixel, (pictures, 1, height, width)."""
    return (pictures - others).square().mean(1, keepdim=True)


def _update(frame: Tensor, brought: Tensor) -> Tensor:
    """What to add to a flow: the least-squares solution around each pixel, at most one pixel far."""
    middle = F.pad((frame + brought) / 2, (1, 1, 1, 1), mode="replicate")
    x = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    y = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    rest = frame - brought
    products = torch.stack([(a * b).sum(1) for a, b in ((x, x), (x, y), (y, y), (x, rest), (y, rest))], 1)
    xx, xy, yy, xr, yr = _mean(_mean(products, AROUND), AROUND).unbind(1)
    xx, yy = xx + FLAT, yy + FLAT
    return (torch.stack([yy * xr - xy * yr, xx * yr - xy * xr], 1) / (xx * yy - xy * xy)[:, None]).clamp(-1, 1)


def _averaged(frames: Iterator[Tensor], along: Iterator[Link]) -> Iterator[Tensor]:
    """Each frame's mean with its neighbours, weighted by trust."""
    frame = next(frames)
    total, weight = frame, torch.ones_like(frame[:, :1])
    for following, each in zip(frames, along, strict=True):
        earlier, later = (_brought(torch.cat([following, frame]), each.flow) * each.trust).chunk(2)
        yield (total + earlier) / (weight + each.trust[:1])
        total, weight = following + later, 1 + each.trust[1:]
        frame = following
    yield total / weight


def _brought(pictures: Tensor, flow: Tensor, how: str = "bicubic") -> Tensor:
    """What pictures show where the flow leads; bilinear interpolation is faster, but blurs."""
    columns, rows = _places(flow)
    height, width = flow.shape[-2:]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
    return F.grid_sample(pictures, grid, how, "border", align_corners=False)


def _places(flow: Tensor) -> tuple[Tensor, Tensor]:
    height, width = flow.shape[-2:]
    return flow[:, 0] + torch.arange(width), flow[:, 1] + torch.arange(height)[:, None]


def _is_inside(flow: Tensor) -> Tensor:
    columns, rows = _places(flow)
    height, width = flow.shape[-2:]
    return ((columns >= 0) & (columns <= width - 1) & (rows >= 0) & (rows <= height - 1))[:, None]


def _mean(values: Tensor, side: int) -> Tensor:
    """The mean of the square around each pixel; shifted sums are five times as fast as pooling on a CPU."""
    rim = side // 2
    height, width = values.shape[-2:]
    padded = F.pad(values, (rim, rim, rim, rim), mode="replicate")
    rows = reduce(torch.add, (padded[..., n : n + height, :] for n in range(side)))
    return reduce(torch.add, (rows[..., n : n + width] for n in range(side))) / side**2


def _levels(pixels: Pixels) -> Tensor:
    """(1, 3, height, width) from 0 to 255."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]


def _pixels(levels: Tensor) -> Pixels:
    return levels[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
