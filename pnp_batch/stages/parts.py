"""Where a work package may be cut: between batches, never inside one, so that its parts give the bytes of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pnp_batch.stages import groups, invert
from pnp_batch.stages.work import Context, Item


def parts(context: Context, items: Sequence[Item]) -> list[list[Item]]:
    """The smallest runs of items that no batch of any stage crosses.

    Every worker makes one part after the other, whatever it was handed, so an item that fails moves the batches of its own
    part alone; and an engine may spread the parts of a package over several workers.
    """
    if items[0].job.window is not None:
        return [list(items)]  # the frames of a window belong together
    place = {id(item): i for i, item in enumerate(items)}
    batches = [[place[id(item)] for item in batch] for batch in invert.planned(context, items)]
    batches += [[place[id(unit.item)] for unit in batch] for batch in groups.planned(context, items)]
    inside = {k for batch in batches for k in range(min(batch) + 1, max(batch) + 1)}
    cuts = [0, *(k for k in range(1, len(items)) if k not in inside), len(items)]
    return [list(items[begin:end]) for begin, end in pairwise(cuts)]
