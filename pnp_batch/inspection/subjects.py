"""The guidance images to look into: their kept trajectories and pictures, out of the store."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pnp_batch.errors import ItemError, ManifestError, PnpError, Problem
from pnp_batch.media.images import Pixels
from pnp_batch.plan import Plan
from pnp_batch.stages.work import Context, Item

BASIS_IMAGES = 50


class NothingToShow(PnpError):
    """There is no such input, or it has no trajectory yet."""


@dataclass(frozen=True)
class Subject:
    """A guidance image with its trajectory.

    Attributes:
        name: As in the manifest.
        item: Its job.
        source: (height, width, 3), as the run decoded it.
        latents: (steps, 4, height, width) float32, from the noisiest down.
        timesteps: Of the latents.
        shown: Whether pictures of it were asked for; the others only take part in the basis.
    """

    name: str
    item: Item
    source: Pixels
    latents: Tensor
    timesteps: tuple[int, ...]
    shown: bool


def subjects(plan: Plan, context: Context, wanted: Sequence[str], others: int = BASIS_IMAGES) -> list[Subject]:
    """The wanted guidance images, and others of the plan with the same timesteps.

    Args:
        plan: The plan of the run.
        context: Of the worker that made it.
        wanted: Names as in the manifest, or numbers in its order from 0; none for all.
        others: At most so many more, for a basis over all inputs.

    Raises:
        NothingToShow: None of that name, or no trajectory.
    """
    found = list(_found(plan, context, wanted, others))
    shown = [subject for subject in found if subject.shown]
    grids = {subject.timesteps for subject in shown}
    if len(grids) > 1:
        raise NothingToShow("these inputs have different timesteps; look at them one at a time with --input")
    return [subject for subject in found if subject.timesteps in grids]


def _found(plan: Plan, context: Context, wanted: Sequence[str], others: int) -> list[Subject]:
    jobs = list(plan.jobs())
    names = [job.source.name for job in jobs]
    numbers = {_number(name, names) for name in wanted} if wanted else set(range(min(len(jobs), others)))
    rest = [n for n in range(len(jobs)) if n not in numbers][: max(others - len(numbers), 0)]
    found = []
    for number in sorted([*numbers, *rest]):
        subject = _subject(Item(jobs[number], context), number in numbers)
        if subject is not None:
            found.append(subject)
        elif number in numbers and wanted:
            raise NothingToShow(
                f"{names[number]} has no trajectory yet; make it with: pnp-batch run {plan.manifest.path}"
            )
    if not any(subject.shown for subject in found):
        raise NothingToShow(f"there are no trajectories yet; make them with: pnp-batch run {plan.manifest.path}")
    return found


def _number(wanted: str, names: Sequence[str]) -> int:
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"inputs have numbers from 0 to {len(names) - 1}"
    raise ManifestError([Problem("command line", None, "--input", f"there is no input '{wanted}'; {hint}")])


def _subject(item: Item, shown: bool) -> Subject | None:
    try:
        artifact = item.find()
    except ItemError:
        return None
    if artifact is None or not item.job.needs_trajectory:
        return None
    store = item.context.store
    kept, preview = store.load(artifact, "trajectory"), store.load(artifact, "preview")
    latents = torch.from_numpy(kept["latents"].astype("float32"))
    return Subject(item.job.source.name, item, preview["source"], latents, tuple(kept["timesteps"].tolist()), shown)
