"""Which results are computed together: batches share UNet passes, groups of batches share their guidance images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pnp_batch.methods import METHODS
from pnp_batch.stages.batches import incomplete
from pnp_batch.stages.work import Context, Item, Unit

Batch = list[Unit]


def groups(context: Context, items: Sequence[Item]) -> list[list[Batch]]:
    """The batches to run now, those of the same guidance images together.

    The members of a group go through the timesteps side by side, so that its source features are there once for all.

    Args:
        context: Of the worker.
        items: All items of the package.

    Returns:
        Those whose trajectories are all there.
    """
    found: dict[Any, list[Batch]] = {}
    for batch in missing(context, items):
        if all(item.find() for item in sources_of(batch)):
            found.setdefault((method_of(batch[0]), *sources_of(batch)), []).append(batch)
    return list(found.values())


def missing(context: Context, items: Sequence[Item]) -> list[Batch]:
    """The batches to run so that every result is there; a lost result brings back all members of its batch."""
    if all(unit.find() for item in items for unit in item.units):
        return []
    return incomplete(list(planned(context, items)), Unit.find)


def planned(context: Context, items: Sequence[Item]) -> Iterator[Batch]:
    """All units of a package, cut into batches: whole images while they fit, one image's prompts in parts where they do not.

    All members of a batch have one method and inject at the same layers. Batches that share an image share all of them, so
    its source rows are computed once for all of its prompts.
    """
    for kind in sorted({_kind(unit) for item in items for unit in item.units}):
        batch: Batch = []
        for item in items:
            size = context.batch_of(item)
            units = [unit for unit in item.units if _kind(unit) == kind]
            if len(batch) + len(units) > size:
                yield from _parts(batch, size)
                batch = []
            batch.extend(units)
            if len(batch) >= size:
                yield from _parts(batch, size)
                batch = []
        yield from _parts(batch, size)


def method_of(unit: Unit) -> str:
    """Name of its method."""
    return unit.translation.settings.method


def _kind(unit: Unit) -> tuple[Any, ...]:
    return (list(METHODS).index(method_of(unit)), *unit.layers)


def _parts(units: Batch, size: int) -> Iterator[Batch]:
    for i in range(0, len(units), size):
        yield units[i : i + size]


def sources_of(batch: Iterable[Unit]) -> list[Item]:
    """The distinct guidance images of a batch, in order."""
    return list(dict.fromkeys(unit.item for unit in batch))
