"""Pictures as tensors, and computing them in batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pnp_batch.evaluation.values import Pair, Values
from pnp_batch.media.images import Pixels


def as_batch(pictures: Sequence[Pixels]) -> Tensor:
    """(height, width, 3) uint8 pictures of one shape as (rows, 3, height, width) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def by_shape(pairs: Sequence[Pair], compute: Callable[[Sequence[Pair]], list[Values]]) -> list[Values]:
    """Computes pairs of equal shape together; gives the values in the order of `pairs`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.source.shape, []).append(i)
    values: dict[int, Values] = {}
    for members in groups.values():
        values |= zip(members, compute([pairs[i] for i in members]), strict=True)
    return [values[i] for i in range(len(pairs))]
