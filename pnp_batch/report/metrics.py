"""The figures of results, for the report: what `pnp-batch evaluate` wrote last, and what the quality gate measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pnp_batch.evaluation.columns import METRICS_FILE, NOT_METRICS
from pnp_batch.stages.outputs import RowFile

Row = Mapping[str, Any]
Figures = dict[str, float]


class Metrics:
    """Figures by result: a picture made anew has another key, so no figure outlives what it was measured of."""

    def __init__(self, root: Path) -> None:
        self._evaluated = {
            (row.get("key"), row.get("source")): _numbers(row) for row in RowFile(root / METRICS_FILE).read()
        }

    def of(self, row: Row) -> Figures:
        """The figures of a row of `metadata.jsonl`, in the order of the evaluation's columns."""
        gate = row.get("quality_figures")
        figures = self._evaluated.get((row.get("key"), row.get("source")), {})
        of_gate = _numbers(gate if isinstance(gate, Mapping) else {})
        own = _numbers({"reconstruction_psnr": row.get("reconstruction_psnr")})  # rounded, so it comes last
        for more in (of_gate, own):
            figures = figures | {name: value for name, value in more.items() if name not in figures}
        return figures


def _numbers(row: Row) -> Figures:
    return {
        name: float(value)
        for name, value in row.items()
        if name not in NOT_METRICS and isinstance(value, int | float) and not isinstance(value, bool)
    }
