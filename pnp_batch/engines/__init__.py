"""Who runs workers where. An engine takes a plan and gives a summary; correctness never depends on it."""

from __future__ import annotations

from collections.abc import Callable

from pnp_batch.engines.local import run_local
from pnp_batch.engines.run import Run, Summary

ENGINES: dict[str, Callable[[Run], Summary]] = {"local": run_local}

__all__ = ["ENGINES", "Run", "Summary"]
