"""What a metric is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pnp_batch.errors import PnpError
from pnp_batch.media.images import Pixels

Mask = NDArray[np.bool_]
Value = float | str
"""A number (NaN where the computation gave none), or in words why there is no number."""
Values = Mapping[str, Value]

NOT_INVERTED = "nothing was inverted: a generated guidance image, or a method that needs no trajectory"
NOT_SAMPLED_BACK = "the inversion was not sampled back (run.reconstruction: skipped)"
INVERSION_GONE = "the store no longer holds the inversion; its figure is in metadata.jsonl"


class Unavailable(PnpError):
    """A metric cannot be computed on this machine: no weights, or none that it understands."""


@dataclass(frozen=True)
class Pair:
    """A result and the guidance image it was made from.

    Attributes:
        source: (height, width, 3), as the run decoded it.
        result: Likewise.
        prompt: The target prompt.
        source_key: Equal for pairs of one source: what is computed of it is computed once.
        mask: (height, width), True where the edit is wanted; None where no mask is known.
        reconstruction: (height, width, 3), what sampling the inversion back gives; in words why there is none.
    """

    source: Pixels
    result: Pixels
    prompt: str
    source_key: str
    mask: Mask | None = None
    reconstruction: Pixels | str = NOT_INVERTED


class Metric(Protocol):
    """One computation that fills one or more columns of a row.

    Attributes:
        name: In the store.
        version: Part of the key: raise it when the same pictures give other numbers.
        columns: The columns it fills.
        identity: What else decides its numbers (the backbone's fingerprint); part of the key.
        uses_mask: Whether a mask gives it more columns; then the mask is part of the key, too.
    """

    name: str
    version: int
    columns: tuple[str, ...]
    identity: Mapping[str, Any]
    uses_mask: bool

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """Its columns for each pair."""
        ...
