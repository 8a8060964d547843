"""Principal components as colours (Plug-and-Play, figures 3 and 6): three leading components as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPREAD = 2.5  # standard deviations on either side of the mean that fill the range of a colour
COMPONENTS = 3


@dataclass(frozen=True)
class Basis:
    """What features are projected on.

    Attributes:
        mean: (channels,).
        vectors: (channels, 3), the leading first.
        deviations: (3,): standard deviation along each.
    """

    mean: Tensor
    vectors: Tensor
    deviations: Tensor

    def colours(self, rows: Tensor) -> Tensor:
        """Feature rows (places, channels) as colours (places, 3) in [0, 1]; the same feature gives the same colour everywhere."""
        scores = (rows.double() - self.mean) @ self.vectors / self.deviations.clamp(min=1e-12)
        return (0.5 + scores / (2 * SPREAD)).clamp(0, 1)


class Moments:
    """Mean and covariance of feature rows, added picture by picture, so that no set of pictures is too large."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Takes the rows (places, channels) of one picture."""
        rows = rows.double()
        self._count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + rows.T @ rows

    def basis(self, like: Basis | None = None) -> Basis:
        """The three leading components.

        Args:
            like: The basis of a neighbouring timestep: a component's sign is free, and this keeps colours from flipping.
        """
        mean = self._sum / self._count
        values, vectors = torch.linalg.eigh(self._squares / self._count - torch.outer(mean, mean))
        vectors = vectors[:, -COMPONENTS:].flip(1)
        reference = torch.ones_like(vectors) if like is None else like.vectors
        signs = torch.where((vectors * reference).sum(0) < 0, -1.0, 1.0)
        return Basis(mean, vectors * signs, values[-COMPONENTS:].flip(0).clamp(min=0).sqrt())


def of_map(attention: Tensor, like: Tensor | None = None) -> Tensor:
    """Colours (tokens, 3) of a self-attention map (tokens, tokens): each place by what it attends to.

    The basis is the picture's own, since the columns are its places. Found by subspace iteration: the covariance of
    4096 tokens is too large to take apart whole.

    Args:
        attention: The map.
        like: Colours of the same picture at a neighbouring timestep, to keep signs.
    """
    rows = attention.double()
    centred = rows - rows.mean(0)
    guess = torch.randn(rows.shape[1], 2 * COMPONENTS + 2, dtype=rows.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        guess, _ = torch.linalg.qr(centred.T @ (centred @ guess))
    _, values, vectors = torch.linalg.svd(centred @ guess, full_matrices=False)
    directions = (guess @ vectors.T)[:, :COMPONENTS]
    agreement = directions.sum(0) if like is None else ((centred @ directions) * (like - 0.5)).sum(0)
    directions = directions * torch.where(agreement < 0, -1.0, 1.0)
    return Basis(rows.mean(0), directions, values[:COMPONENTS] / len(rows) ** 0.5).colours(rows)
