"""Stage `bank`: source features kept on disk, and the choice of where those of a group come from.

All prompts of a picture go through the timesteps side by side, so within a run one source pass serves them all and a bank
saves nothing. It is for what comes later: prompts that are added, batches that are repeated. `auto` compares seconds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pnp_batch import interrupts
from pnp_batch.diffusion.guidance import injected_steps
from pnp_batch.methods import METHODS
from pnp_batch.stages.batches import Group, at_most, attempt
from pnp_batch.stages.groups import groups, method_of, sources_of
from pnp_batch.stages.remembered import Costs, Place
from pnp_batch.stages.work import Context, Item, described
from pnp_batch.store import Artifact
from pnp_batch.store.disk import bandwidth, make_room, mark_used
from pnp_batch.store.keys import key_of

if TYPE_CHECKING:
    from pnp_batch.diffusion.banks import Extent, SourceFeatures, SourcePass

STAGE = "bank"
VERSION = 1  # part of every key: raise it when the same trajectory gives other features

HEADER_BYTES = 100  # that a safetensors header takes for each array


def run(context: Context, items: Sequence[Item]) -> None:
    """Publishes the bank of every guidance image that a missing result needs, where banks are kept on disk."""
    if context.banks.mode != "disk":
        return
    for group in groups(context, items):
        sources = sources_of(group[0])
        if not METHODS[method_of(group[0][0])].uses_layers:
            continue
        if not _all_stored(sources):
            attempt([sources], partial(_compute, context), _give_up, context.ledger, STAGE)


def _give_up(item: Item, error: BaseException) -> None:
    item.fail(STAGE, error)


def _compute(context: Context, group: Group[Item]) -> None:
    """Whoever computes one bank of a group computes all: the bytes depend on which rows share a pass."""
    from pnp_batch.diffusion.banks import fill

    (sources,) = group
    if not _has_room(context, sources):
        return
    begin, before = time.monotonic(), context.model.rows
    keys = [bank_key(item) for item in sources]
    with ExitStack() as stack:
        drafts = [stack.enter_context(context.store.draft(STAGE, key)) for key in keys]
        fill(
            _source_pass(context, sources),
            [extent_of(item) for item in sources],
            lambda i, shard, arrays: drafts[i].add(shard, arrays),
        )
        how = described(context, keys, [], time.monotonic() - begin)
        with interrupts.held_back():
            for item, draft in zip(sources, drafts, strict=True):
                draft.publish(how | {"trajectory": item.key, "compression": context.banks.compression})
    context.events.step(context.model.rows - before)
    context.events.made(STAGE, len(sources))


@contextmanager
def features(context: Context, sources: Sequence[Item]) -> Iterator[SourceFeatures]:
    """Where the source features of a group come from: a pass at each step, memory, or disk.

    Args:
        context: Of the worker.
        sources: The guidance images; their features come in this order.
    """
    from pnp_batch.diffusion.banks import BankReader, StoredBanks

    place = _place(context, sources)
    if place == "disk":
        artifacts = [artifact for item in sources if (artifact := _stored(item))]
        for artifact in artifacts:
            mark_used(artifact.path)
        readers = [BankReader(artifact.names, partial(context.store.load, artifact)) for artifact in artifacts]
        with StoredBanks(context.model, readers, context.banks.compression) as banks:
            yield banks
    elif place == "memory":
        yield _remembered(context, sources)
    else:
        yield _source_pass(context, sources)


def _place(context: Context, sources: Sequence[Item]) -> Place:
    mode = context.banks.mode
    if mode == "off" or not any(extent_of(item).steps for item in sources):
        return "off"
    if mode == "memory":
        return "memory" if _fits_memory(context, sources) else "off"
    if not _all_stored(sources):
        return "off"
    return "disk" if mode == "disk" else costs(context, sources[0], len(sources)).choice


def _source_pass(context: Context, sources: Sequence[Item]) -> SourcePass:
    import torch

    from pnp_batch.diffusion.banks import SourcePass

    trajectory = torch.stack([torch.from_numpy(item.latents()) for item in sources])
    return SourcePass(context.model, trajectory, [item.job.prompt for item in sources], context.banks.compression)


def _remembered(context: Context, sources: Sequence[Item]) -> SourceFeatures:
    """The bank in memory of just these guidance images, in this order: the bytes depend on which rows share a pass."""
    from pnp_batch.diffusion.banks import MemoryBank

    kept, name = context.banks.remembered, key_of({"banks": [bank_key(item) for item in sources]})
    bank = kept.pop(name, None) or MemoryBank(_source_pass(context, sources), [extent_of(item) for item in sources])
    kept[name] = bank
    return bank


def _fits_memory(context: Context, sources: Sequence[Item]) -> bool:
    """Whether half of the free memory takes the banks of a group, the least recently used ones making room."""
    kept = context.banks.remembered
    needed = costs(context, sources[0], len(sources)).size * len(sources)
    while needed > context.model.free_memory / 2 and kept:
        kept.pop(next(iter(kept)))
    if needed > context.model.free_memory / 2:
        context.events.note(
            f"banks of {needed / 1e6:.0f} MB do not fit into memory; source features are computed at every step"
        )
        return False
    return True


def _has_room(context: Context, sources: Sequence[Item]) -> bool:
    """Whether the disk budget takes the banks of a group, the least recently used ones making room."""
    budget = context.banks.budget
    if budget is None:
        return True
    missing = [item for item in sources if _stored(item) is None]
    needed = sum(costs(context, item, len(sources)).size for item in missing)
    if make_room(context.store, STAGE, needed, budget, keep=[bank_key(item) for item in sources]):
        return True
    context.events.note(
        f"banks of {needed / 1e6:.0f} MB do not fit bank_budget ({budget / 1e6:.0f} MB); source features are not kept"
    )
    return False


def _all_stored(sources: Sequence[Item]) -> bool:
    return all(_stored(item) or not extent_of(item).steps for item in sources)


def _stored(item: Item) -> Artifact | None:
    return item.context.store.find(STAGE, bank_key(item)) if extent_of(item).steps else None


def extent_of(item: Item) -> Extent:
    """What all the prompts of a guidance image need of it, whether or not they are done."""
    from pnp_batch.diffusion.banks import Extent

    units = [unit for unit in item.units if METHODS[method_of(unit)].uses_layers]
    steps = [injected_steps(unit.translation.settings) for unit in units]
    f_steps, attn_steps = (max(column, default=0) for column in ([f for f, _ in steps], [a for _, a in steps]))
    f_layers = {layer for unit in units for layer in unit.layers[0]} if f_steps else set()
    attn_layers = {layer for unit in units for layer in unit.layers[1]} if attn_steps else set()
    return Extent(
        tuple(sorted(f_layers)),
        tuple(sorted(attn_layers)),
        f_steps if f_layers else 0,
        attn_steps if attn_layers else 0,
    )


def bank_key(item: Item) -> str:
    """Key of a guidance image's bank: its trajectory, what is read of it, and how that is packed."""
    extent = extent_of(item)
    return key_of(
        {
            "stage": STAGE,
            "version": VERSION,
            "trajectory": item.key,
            "f_layers": extent.f_layers,
            "attn_layers": extent.attn_layers,
            "steps": [extent.f_steps, extent.attn_steps],
            "compression": item.context.banks.compression,
        }
    )


def costs(context: Context, item: Item, rows: int) -> Costs:
    """Measures what a guidance image's features cost: one timed source pass of each depth, and a sample file in the store.

    Args:
        context: Of the worker.
        item: The guidance image.
        rows: How many share a source pass.
    """
    extent = extent_of(item)
    name = (context.dtype, item.job.size, extent, rows)
    if name not in context.banks.costs:
        seconds, size = at_most(rows, partial(_measured, context, item, extent))
        context.banks.costs[name] = Costs(seconds, size, bandwidth(context.store.root))
    return context.banks.costs[name]


def forecast(context: Context, item: Item, sources: int) -> list[str]:
    """For a person who decides: what the mode does, and what banks would take and save.

    Args:
        context: Of the worker.
        item: A guidance image that stands for all.
        sources: Guidance images in the plan.
    """
    together = max(min(context.batch_of(item) // len(item.units), sources), 1)
    each, prompts = costs(context, item, together), len(item.units)
    place = _place(context, [item]) if item.knows_key() and item.find() else "off"
    needed, free = together * each.size, context.model.free_memory
    because = {
        "off": f"one source pass of {each.seconds:.2f} s a picture serves all of its prompts ({prompts}), so that a bank "
        "would save nothing now",
        "disk": f"its bank is there: {each.read_seconds:.2f} s to read instead of {each.seconds:.2f} s of source pass",
    }
    return [
        f"{place} by auto: {because[place]}" if context.banks.mode == "auto" else context.banks.mode,
        f"on disk {each.size / 1e6:.1f} MB a picture, {sources * each.size / 1e6:.0f} MB in all, compression "
        f"{context.banks.compression}; {each.write_seconds:.2f} s to write",
        f"in memory {needed / 1e6:.0f} MB for the {together} pictures of a batch; {free / 1e6:.0f} MB are free",
        f"a prompt added later reads a bank on disk in {each.read_seconds:.2f} s instead of {each.seconds:.2f} s of "
        f"source pass{'' if each.choice == 'disk' else ', so that `auto` would not read it'}",
    ]


def _measured(context: Context, item: Item, extent: Extent, rows: int) -> tuple[float, int]:
    """Seconds and bytes of one guidance image's features at all steps."""
    import torch

    from pnp_batch.diffusion.banks import SourcePass

    width, height = item.job.size or (0, 0)
    cell, steps = context.checkpoint.cell, item.job.settings.num_inference_steps
    noise = torch.randn(rows, 1, 4, height // cell, width // cell).expand(-1, steps, -1, -1, -1)
    source = SourcePass(context.model, noise, [item.job.prompt] * rows, context.banks.compression)
    depths = Counter(tuple(extent.sites(context.model, step)) for step in range(extent.steps))
    seconds, size = 0.0, 0
    for sites, count in depths.items():
        for _ in range(2):  # the first pass pays for allocation and kernel choice
            begin = time.perf_counter()
            kept = source.packed(0, sites)
            sum(float(tensor.flatten()[0]) for tensor in kept.values())  # waits for the device
            once = time.perf_counter() - begin
        seconds += count * once / rows
        size += count * sum(tensor.nbytes // rows + HEADER_BYTES for tensor in kept.values())
    return seconds, size
