"""Motion-compensated temporal filtering: a translated video moves as its source moves, and stays the same otherwise.

Every frame is averaged with its two neighbours, brought to it along the optical flow of the *source*, as far as that flow is to
be believed (Dubois and Sabri, "Noise reduction in image sequences using motion-compensated temporal filtering", 1984); each
further pass reaches a frame further. The flow is Lucas and Kanade's ("An iterative image registration technique", 1981), dense,
in colour, coarse to fine (Bouguet, 2001), with the skip mode of video codecs: what standing still explains as well, stands still.
Inside a flat area that is all too easy, so there its outline and the rest of its colour are asked, too.

Only operations on single elements, sums over small windows, medians and counts are used, so that the number of threads changes
no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import chain

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

NEAR = 0.5  # pixels: motion that is less counts as none where it is asked what moves around a flat area
TONES = 8  # of each channel: what has the same ones is of one colour
STANDS = 0.2  # of a flat area in doubt as much must have its colour and be far from all motion, for it to stand still

FADE = 24.0  # levels by which a fade brightens or darkens from frame to frame, at most
ASTRAY = 1.0  # pixels that lie between a place and where going forth and back leads, for a quarter of the trust
UNLIKE = 12.0  # levels between source and source brought along the flow, likewise
CUT = (
    0.25  # share of the pixels with contrast or change that must be trusted; where there are fewer, another shot begins
)


@dataclass(frozen=True)
class Link:
    """Where the pixels of two neighbouring frames are in each other; number 0 is the earlier one.

    Attributes:
        flow: For each pixel of both frames how far it is away in the other one, in pixels: (2, 2, height, width), x before y.
        trust: How far that is to be believed, (2, 1, height, width) from 0 to 1; 0 everywhere where a cut parts the frames.
    """

    flow: Tensor
    trust: Tensor


_Linked = tuple[Tensor, Link | None]  # a frame and how it corresponds to the next; None for the last


def steadied(frames: Iterable[Pixels], sources: Iterable[Pixels], passes: int = PASSES) -> Iterator[Pixels]:
    """The frames of a translated video, drawn together along the motion of its source. Streams: holds two frames a pass.

    Whoever changes what it gives raises `MOTION_VERSION` of `stages.videos`, which stands in keys.

    Args:
        frames: (height, width, 3) uint8 each.
        sources: The frames that they were made from, of the same size.
        passes: How often each frame is averaged with its neighbours.
    """
    # Links go along with the frames: `itertools.tee` would keep up to 57 of them.
    shown: Iterator[_Linked] = zip(map(_levels, frames), chain(links(sources), [None]), strict=True)
    for _ in range(passes):
        shown = _averaged(shown)
    return (_pixels(frame) for frame, _ in shown)


def links(sources: Iterable[Pixels]) -> Iterator[Link]:
    """How each frame corresponds to the next."""
    levels = map(_levels, sources)
    before = next(levels)
    for after in levels:
        yield link(before, after)
        before = after


def link(before: Tensor, after: Tensor) -> Link:
    """How two frames, (1, 3, height, width) in levels each, correspond."""
    fade = (after - before).flatten(2).median(-1).values.clamp(-FADE, FADE)
    frames = torch.cat([before, after - fade[..., None, None]])
    others = frames.flip(0)
    flow, doubt = _flow_and_doubt(frames, others)
    astray = (flow + _brought(flow.flip(0), flow)).square().sum(1, keepdim=True) / ASTRAY**2
    unlike = _unlike(_mean(frames, SMOOTH), _mean(_brought(others, flow), SMOOTH)) / UNLIKE**2  # grain is no unlikeness
    trust = _is_inside(flow) * ~doubt / ((1 + astray) * (1 + unlike)).square()
    return Link(flow, torch.zeros_like(trust) if _is_cut(frames, trust) else trust)


def _is_cut(frames: Tensor, trust: Tensor) -> bool:
    """Whether the frames are of two shots; a flat area that both have says nothing about it."""
    is_telling = ~_is_flat(frames, SMOOTH) | (_unlike(frames, frames.flip(0)) > UNLIKE**2)
    return int((is_telling & (trust > 0.5)).sum()) < CUT * int(is_telling.sum())


def optical_flow(frames: Tensor, others: Tensor) -> Tensor:
    """How far each pixel of some frames is away in other ones.

    Args:
        frames: (frames, 3, height, width) in levels.
        others: Likewise.

    Returns:
        (frames, 2, height, width) in pixels, x before y.
    """
    return _flow_and_doubt(frames, others)[0]


def _flow_and_doubt(frames: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The flow, and where it is open whether what seems to stand still does, (frames, 1, height, width)."""
    pyramid = [(frames, others)]
    while min(pyramid[-1][0].shape[-2:]) >= 2 * COARSEST:
        pyramid.append((F.avg_pool2d(pyramid[-1][0], 2), F.avg_pool2d(pyramid[-1][1], 2)))
    flow = torch.zeros_like(pyramid[-1][0][:, :2])
    reached = torch.zeros_like(flow[:, :1])
    for frame, other in reversed(pyramid):
        if flow.shape[-2:] != frame.shape[-2:]:
            flow = 2 * F.interpolate(flow, frame.shape[-2:], mode="bilinear", align_corners=False)
            reached = F.interpolate(reached, frame.shape[-2:]).maximum(_moves(flow).float())
        for _ in range(UPDATES):
            flow = _mean(_mean(flow + _update(frame, _brought(other, flow, "bilinear")), SMOOTH), SMOOTH)
        moving, still = _unlike(frame, _brought(other, flow, "bilinear")), _unlike(frame, other)
        flow = flow * (_mean(moving, AROUND) < _mean(still, AROUND) - STILL)
    return flow, _doubt(frames, flow, reached > 0)


def _moves(flow: Tensor) -> Tensor:
    return flow.square().sum(1, keepdim=True) > NEAR**2


def _doubt(frames: Tensor, flow: Tensor, reached: Tensor) -> Tensor:
    """Flat pixels without a flow that one reached on a coarser level, unless much of their colour is far from all flow.

    They may be inside of something that moves, or beside it; a colour that is seen far away, too, is the background's.
    """
    is_open = reached & ~_moves(flow) & _is_flat(frames, AROUND)
    tones = (frames * (TONES / 256)).long().clamp(0, TONES - 1)
    colours = (tones[:, :1] * TONES + tones[:, 1:2]) * TONES + tones[:, 2:]
    colours += TONES**3 * torch.arange(len(frames)).view(-1, 1, 1, 1)
    unreached, doubted = (
        torch.bincount(colours[which], minlength=len(frames) * TONES**3) for which in (~reached, is_open)
    )
    return is_open & (unreached < STANDS * doubted)[colours]


def _unlike(pictures: Tensor, others: Tensor) -> Tensor:
    """The mean squared difference of each pixel, (pictures, 1, height, width)."""
    return (pictures - others).square().mean(1, keepdim=True)


def _update(frame: Tensor, brought: Tensor) -> Tensor:
    """What to add to a flow: the least-squares solution around each pixel, at most one pixel far."""
    x, y = _gradients((frame + brought) / 2)
    rest = frame - brought
    products = torch.stack([(a * b).sum(1) for a, b in ((x, x), (x, y), (y, y), (x, rest), (y, rest))], 1)
    xx, xy, yy, xr, yr = _mean(_mean(products, AROUND), AROUND).unbind(1)
    xx, yy = xx + FLAT, yy + FLAT
    return (torch.stack([yy * xr - xy * yr, xx * yr - xy * xr], 1) / (xx * yy - xy * xy)[:, None]).clamp(-1, 1)


def _is_flat(pictures: Tensor, side: int) -> Tensor:
    """Where there is no contrast in the square around a pixel, (pictures, 1, height, width)."""
    x, y = _gradients(pictures)
    return _mean((x.square() + y.square()).sum(1, keepdim=True), side) < FLAT


def _gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return x, y


def _averaged(frames: Iterator[_Linked]) -> Iterator[_Linked]:
    """Each frame's mean with its neighbours, weighted by trust."""
    frame, along = next(frames)
    total, weight = frame, torch.ones_like(frame[:, :1])
    for following, further in frames:
        assert along is not None
        earlier, later = (_brought(torch.cat([following, frame]), along.flow) * along.trust).chunk(2)
        yield (total + earlier) / (weight + along.trust[:1]), along
        total, weight = following + later, 1 + along.trust[1:]
        frame, along = following, further
    yield total / weight, None


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
