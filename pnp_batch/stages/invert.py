"""Stage `invert`: pictures to trajectories, with their reconstruction error; generated guidance images likewise.

Of a picture that only methods without inversion want, just the decoded pixels are kept, and what the VAE makes of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from pnp_batch import interrupts
from pnp_batch.clips import SEGMENT
from pnp_batch.errors import NonFiniteError
from pnp_batch.plan import INVERSION_SETTINGS, Job
from pnp_batch.stages import groups, read, windows
from pnp_batch.stages.batches import Group, attempt, incomplete
from pnp_batch.stages.work import Context, Item, described

if TYPE_CHECKING:
    from pnp_batch.diffusion.trajectories import Trajectory

STAGE = "invert"


def run(context: Context, items: Sequence[Item]) -> None:
    """Publishes the trajectory of every item that still needs one."""
    needing = _needed(context, items)
    if not needing:
        return
    context.load(context.dtype)  # before any unit is in hand: what dies here is nobody's fault
    for batch in incomplete(planned(context, items), Item.find):
        if any(item.key in needing for item in batch):
            attempt([batch], partial(_compute, context), _give_up, context.ledger, STAGE)


def _give_up(item: Item, error: BaseException) -> None:
    item.fail(STAGE, error)


def _needed(context: Context, items: Sequence[Item]) -> set[str]:
    """Keys of the trajectories to make: those that results are computed from now, and those that turned out to be corrupt.

    A lost result is computed with its whole batch, a lost frame with its whole window, so that more than its own
    trajectory is needed.
    """
    lost = [item for item in items if item.find() is None]
    if not lost:
        return set()
    if items[0].job.is_joint:
        used = {item.key for item in items} if windows.missing(items) else set()
    else:
        used = {unit.item.key for batch in groups.missing(context, items) for unit in batch}
    return {item.key for item in lost if item.key in used or context.store.was_corrupt(STAGE, item.key)}


def planned(context: Context, items: Sequence[Item]) -> list[list[Item]]:
    """The items of a package, cut into batches; frames never across a segment, which two windows may hold."""
    size = context.batch_of(items[0])
    blocks = groupby(items, lambda item: item.job.place // SEGMENT if item.job.window else None)
    return [block[i : i + size] for block in (list(group) for _, group in blocks) for i in range(0, len(block), size)]


def _compute(context: Context, group: Group[Item]) -> None:
    from pnp_batch.diffusion import trajectories  # imports torch: only when something is to be computed
    from pnp_batch.diffusion.steps import CheckpointedLoop

    (batch,) = group
    if not batch[0].job.needs_trajectory:
        _keep_pictures(context, batch)
        return
    begin = time.monotonic()
    keys = [item.key for item in batch]
    job, prompts = batch[0].job, [item.job.prompt for item in batch]
    loop = CheckpointedLoop(context.checkpoints(STAGE, keys), context.model, context.events.step)
    settings = job.settings
    if job.source.generate:
        specs = [item.job.source.generate for item in batch if item.job.source.generate]
        steps = settings.num_inference_steps
        made = trajectories.of_prompts(context.model, specs, job.size or (0, 0), job.own_steps or steps, steps, loop)
    else:
        pictures = read.pixels_of(context, batch)
        made = trajectories.of_pictures(context.model, pictures, prompts, settings, loop, context.measure)
    failed = [item.key for item, trajectory in zip(batch, made, strict=True) if not trajectory.is_finite]
    how = described(context, keys, failed, time.monotonic() - begin)
    with interrupts.held_back():  # a batch of which one is lost is computed anew
        for item, trajectory in zip(batch, made, strict=True):
            _publish(context, item, trajectory, how)
    loop.clear()


def _keep_pictures(context: Context, batch: Sequence[Item]) -> None:
    from pnp_batch.diffusion.trajectories import of_picture_alone

    for item, pixels in zip(batch, read.pixels_of(context, batch), strict=True):
        begin = time.monotonic()
        kept = of_picture_alone(context.model, pixels)
        how = described(context, [item.key], [], time.monotonic() - begin)
        shards = {"preview": {"source": kept.source, "reconstruction": kept.reconstruction}}
        meta = how | {"source": item.job.source.name, "settings": {}, "errors": kept.errors}
        item.artifact = context.store.publish(STAGE, item.key, shards, meta)


def _publish(context: Context, item: Item, trajectory: Trajectory, how: dict[str, Any]) -> None:
    if not trajectory.is_finite:
        item.fail(STAGE, NonFiniteError(f"the inversion holds NaN or infinity in {context.dtype}"))
        return
    kept = np.float32 if context.dtype == "float32" else np.float16
    shards: dict[str, dict[str, Any]] = {
        "trajectory": {"latents": trajectory.latents.astype(kept), "timesteps": np.array(trajectory.timesteps)},
        "preview": {"source": trajectory.source},
    }
    if trajectory.reconstruction is not None:
        shards["preview"]["reconstruction"] = trajectory.reconstruction
    meta = how | {"source": item.job.source.name, "settings": _settings(item.job), "errors": trajectory.errors}
    item.artifact = context.store.publish(STAGE, item.key, shards, meta)
    context.events.made(STAGE, 1)


def _settings(job: Job) -> dict[str, Any]:
    if job.source.generate:
        return job.source.generate.model_dump()
    return {name: getattr(job.settings, name) for name in ("num_inference_steps", *INVERSION_SETTINGS)}
