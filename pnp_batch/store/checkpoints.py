"""Time-based checkpoints of long loops, so that a kill costs about a minute and not an hour.

A checkpoint belongs to one batch (the keys of its members, in order): a resumed loop continues with the very same rows
and so ends with the very same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pnp_batch.errors import disk_errors_named
from pnp_batch.store.artifacts import in_c_order
from pnp_batch.store.files import write_atomic
from pnp_batch.store.keys import key_of, sha256

Tensors = dict[str, np.ndarray[Any, Any]]

STEP = "__step__"
DIGEST_LENGTH = 64


class LoopCheckpoint:
    """The saved state of one batch's loop.

    Args:
        root: Folder of the store.
        stage: The stage that loops.
        keys: Keys of the batch's members, in order.
        seconds: Least time between two saves.
        saved: Told after every save.
    """

    def __init__(
        self,
        root: Path,
        stage: str,
        keys: Sequence[str],
        seconds: float,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = root / "checkpoints" / f"{stage}-{key_of({'keys': list(keys)})}"
        self.seconds, self._saved = seconds, saved
        self._last = time.monotonic()

    def load(self) -> tuple[int, Tensors] | None:
        """The number of steps done and the tensors, or None where there is nothing whole."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        digest, body = data[:DIGEST_LENGTH], data[DIGEST_LENGTH:]
        if sha256(body).encode() != digest:
            return None
        tensors = safetensors.numpy.load(body)
        return int(tensors.pop(STEP)), tensors

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, step: int, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Replaces the saved state.

        Raises:
            EnvironmentFailure: The disk is full or read-only.
        """
        body = safetensors.numpy.save(in_c_order(tensors) | {STEP: np.array(step)})
        with disk_errors_named("a checkpoint"):
            write_atomic(self.path, sha256(body).encode() + body)
        self._last = time.monotonic()
        self._saved()

    def clear(self) -> None:
        """Removes the saved state: the batch is published."""
        self.path.unlink(missing_ok=True)
