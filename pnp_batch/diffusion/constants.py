"""Numbers that passes are given, put on the device once: whatever is copied there makes the host wait for the device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor


def indices(values: Iterable[int], device: torch.device) -> Tensor:
    """Row numbers, (rows,) int64."""
    return _constant(tuple(values), torch.int64, device)


def numbers(values: Iterable[float], device: torch.device) -> Tensor:
    """Weights and sizes, (values,) float32."""
    return _constant(tuple(values), torch.float32, device)


@lru_cache(maxsize=4096)  # a run has a few for each step and shape of its batches, some kilobytes in all
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)
