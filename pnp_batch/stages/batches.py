"""Which items share a batch, and how a batch that fails is taken apart.

Floating-point rounding depends on a batch's composition, so the same bytes need the same batch. The rule: batches are cut
from the plan; every artifact records the members of its batch; a lost artifact is made again with the members it was made
with. So a killed run, repeated, ends with the bytes of an undisturbed one, while a prompt that is added costs only itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from pnp_batch.errors import EnvironmentFailure, ModelError
from pnp_batch.ledger import Ledger, unit_name
from pnp_batch.store import Artifact
from pnp_batch.store.artifacts import CorruptArtifact

# Latent cells in one UNet pass per guidance row: 16 results of 64x64 pixels on the built-in model, 4 of 512x512 on a CPU.
# It depends on nothing but device type and geometry: the cut into batches must be the same in every run.
BATCH_CELLS = {"cpu": 16_384}
GPU_BATCH_CELLS = 65_536
MAX_BATCH = 32


class Keyed(Protocol):
    """Something with a content key."""

    @property
    def key(self) -> str:
        """The content key."""


T = TypeVar("T", bound=Keyed)


def automatic_batch(device: str, size: tuple[int, int], cell: int) -> int:
    """Translations per UNet pass for `batch_size: auto`."""
    cells = max(size[0] * size[1] // cell**2, 1)
    return min(max(BATCH_CELLS.get(device, GPU_BATCH_CELLS) // cells, 1), MAX_BATCH)


def incomplete(planned: Sequence[Sequence[T]], find: Callable[[T], Artifact | None]) -> list[list[T]]:
    """The batches to run so that every planned item has its artifact.

    Args:
        planned: All items of the package, cut into batches as a first run would.
        find: Looks an item's artifact up.
    """
    items = {item.key: item for batch in planned for item in batch}
    found = {key: find(item) for key, item in items.items()}
    missing = {key for key, artifact in found.items() if artifact is None}
    batches: list[list[T]] = []
    for artifact in found.values():
        members = _members_lost_with(artifact, missing)
        if members and all(key in items for key in members):
            batches.append([items[key] for key in members])
            missing -= set(members)
    for batch in planned:
        if rest := [item for item in {item.key: item for item in batch}.values() if item.key in missing]:
            batches.append(rest)
            missing -= {item.key for item in rest}
    return batches


def _members_lost_with(artifact: Artifact | None, missing: set[str]) -> list[str]:
    """The whole batch of a published artifact, if a member that was published with it is missing now."""
    if artifact is None or "batch" not in artifact.meta:
        return []
    lost = set(artifact.meta["batch"]) - set(artifact.meta["failed"])
    return list(artifact.meta["batch"]) if lost & missing else []


Group = Sequence[Sequence[T]]


def attempt(
    group: Group[T],
    compute: Callable[[Group[T]], None],
    give_up: Callable[[T, BaseException], None],
    ledger: Ledger,
    stage: str,
) -> None:
    """Computes a group of batches; on an error takes it apart until the guilty item stands alone.

    Out of memory halves what is computed at once, and a corrupt artifact fails them all. Any other error puts every item on
    its own, and so does a worker's death (seen in the ledger by the next one) where another would be the last: alone, an item
    that was tried too often is given up.
    """
    items = {item.key: item for batch in group for item in batch}
    units = [unit_name(stage, key) for key in items]
    if len(items) > 1 and any(len(ledger.strikes(unit)) >= ledger.max_attempts - 1 for unit in units):
        for item in items.values():
            attempt([[item]], compute, give_up, ledger, stage)
        return
    try:
        for unit in units:
            ledger.refuse(unit)
        with ledger.attempt(units):
            compute(group)
    except (EnvironmentFailure, ModelError):
        raise  # no item is to blame
    except (
        CorruptArtifact
    ) as error:  # what one of them is made from has to be made again; then all of them, as they are
        for item in items.values():
            give_up(item, error)
    except Exception as error:
        parts = list(_parts(group, halve=is_out_of_memory(error)))
        if len(parts) == 1:
            give_up(parts[0][0][0], error)
            return
        error.__traceback__ = None  # it holds the tensors of the failed pass
        gc.collect()
        for part in parts:
            attempt(part, compute, give_up, ledger, stage)


def _parts(group: Group[T], *, halve: bool) -> Iterator[Group[T]]:
    if not halve:
        yield from ([[item]] for batch in group for item in batch)
    elif len(group) > 1:
        yield from ([batch] for batch in group)
    elif len(batch := group[0]) > 1:
        yield [batch[: len(batch) // 2]]
        yield [batch[len(batch) // 2 :]]
    else:
        yield group


R = TypeVar("R")


def at_most(rows: int, measure: Callable[[int], R]) -> R:
    """Measures something at so many rows, or at half of them, and so on, where the memory is too small for more.

    Raises:
        EnvironmentFailure: Not even one row fits.
    """
    while True:
        try:
            return measure(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if rows == 1:
                raise EnvironmentFailure(f"the memory is too small for one row of the UNet: {error}") from error
        rows //= 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the machine had too little memory (torch's CPU allocator has no type for it)."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
