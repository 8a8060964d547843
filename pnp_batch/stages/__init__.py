"""The stages of a run, in order. A stage takes the items of a work package and makes what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pnp_batch.stages import assemble, bank, invert, translate, videos, windows
from pnp_batch.stages.work import Context, Item


def _bank(context: Context, items: Sequence[Item]) -> None:
    if not items or not items[0].job.is_joint:  # a window reads more than a bank holds
        bank.run(context, items)


def _translate(context: Context, items: Sequence[Item]) -> None:
    joint = bool(items) and items[0].job.is_joint
    (windows if joint else translate).run(context, items)


def _assemble(context: Context, items: Sequence[Item]) -> None:
    frames = bool(items) and items[0].job.window is not None
    (videos if frames else assemble).run(context, items)


STAGES: dict[str, Callable[[Context, Sequence[Item]], None]] = {
    "invert": invert.run,
    "bank": _bank,
    "translate": _translate,
    "assemble": _assemble,
}
