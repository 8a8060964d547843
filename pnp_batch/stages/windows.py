"""Stage `translate` for the frames of a window together: all of them or none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from pnp_batch import interrupts
from pnp_batch.errors import NonFiniteError
from pnp_batch.methods import METHODS
from pnp_batch.stages.batches import Group, attempt
from pnp_batch.stages.translate import STAGE, about, problem_with
from pnp_batch.stages.work import Context, Item, Unit, described
from pnp_batch.store.keys import key_of


@dataclass(frozen=True)
class Take:
    """All frames of a window for one prompt."""

    units: Sequence[Unit]

    @cached_property
    def key(self) -> str:
        """What it is called among the loops that are saved."""
        return key_of({"units": [unit.key for unit in self.units]})

    def fail(self, error: BaseException) -> None:
        """Takes all frames out of the run."""
        for unit in self.units:
            unit.fail(STAGE, error)


def run(context: Context, items: Sequence[Item]) -> None:
    """Publishes the frames of every prompt that lacks one, if all trajectories of the window are there."""
    window = items[0].job.window
    if window is None or len(items) < window.count or any(item.find() is None for item in items):
        return
    if takes := missing(items):
        context.load(context.dtype)  # before any unit is in hand: what dies here is nobody's fault
        attempt([[take] for take in takes], partial(_compute, context), Take.fail, context.ledger, STAGE)


def missing(items: Sequence[Item]) -> list[Take]:
    """The takes of a window that lack a frame."""
    takes = [Take(units) for units in zip(*(item.units for item in items), strict=True)]
    return [take for take in takes if any(unit.find() is None for unit in take.units)]


def _compute(context: Context, group: Group[Take]) -> None:
    import torch  # only when something is to be computed

    from pnp_batch.diffusion.steps import CheckpointedLoop
    from pnp_batch.methods.pnp import Target

    begin = time.monotonic()
    takes = [take for batch in group for take in batch]
    items = [unit.item for unit in takes[0].units]
    first, job = items[0].job.place, items[0].job
    trajectory = torch.stack([torch.from_numpy(item.latents()) for item in items])
    targets = [
        Target(0, unit.translation.prompt, unit.translation.settings, *unit.layers)
        for unit, *_ in (t.units for t in takes)
    ]
    loop = CheckpointedLoop(
        context.checkpoints(STAGE, [take.key for take in takes]), context.model, context.events.step
    )
    method = METHODS[job.settings.method].load_joint()
    finals = method(context.model, trajectory, job.prompt, targets, first, context.batch_of(items[0]), loop)
    seconds = (time.monotonic() - begin) / len(takes)
    for take, latents in zip(takes, finals, strict=True):
        _publish(context, take, latents, seconds)
    loop.clear()


def _publish(context: Context, take: Take, latents: Any, seconds: float) -> None:
    from pnp_batch.diffusion.model import to_pixels

    pictures = [context.model.decode(latents[i : i + 1]) for i in range(len(latents))]
    if problem := next(filter(None, (problem_with(context, picture) for picture in pictures)), None):
        take.fail(NonFiniteError(problem))
        return
    how = described(context, [unit.key for unit in take.units], [], seconds)
    with interrupts.held_back():  # a window of which one frame is lost is computed anew
        for unit, picture, latent in zip(take.units, pictures, latents, strict=True):
            shards = {"result": {"image": to_pixels(picture), "latent": latent.cpu().numpy()}}
            unit.artifact = context.store.publish(STAGE, unit.key, shards, how | about(unit))
