"""The guidance images to look into: their kept trajectories and pictures, out of the store."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pnp_batch.errors import ItemError, ManifestError, PnpError, Problem
from pnp_batch.media.images import Pixels
from pnp_batch.names import distinct, meant
from pnp_batch.plan import TRAJECTORY_SETTINGS, Job, Plan
from pnp_batch.stages.work import Context, Item

BASIS_IMAGES = 50


class NothingToShow(PnpError):
    """There is no such input, or it has no trajectory yet."""


@dataclass(frozen=True)
class Subject:
    """A guidance image with its trajectory.

    Attributes:
        name: As in the manifest; where it has several trajectories, with the settings in which they differ.
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


@dataclass(frozen=True)
class Subjects:
    """The guidance images to look into.

    Attributes:
        found: Those to show, and others of the plan with the timesteps of one of them.
        left_out: How many guidance images are not shown although all were asked for.
    """

    found: list[Subject]
    left_out: int


def subjects(plan: Plan, context: Context, wanted: Sequence[str], most: int = BASIS_IMAGES) -> Subjects:
    """The wanted guidance images, and others of the plan for a basis over all inputs.

    Args:
        plan: The plan of the run.
        context: Of the worker that made it.
        wanted: Names as in the manifest (the end of the path will do), or numbers in its order from 0; none for all.
        most: Where all are wanted so many are shown; others take part in the basis up to this number.

    Raises:
        NothingToShow: There is no trajectory.
        ManifestError: None of that name, or several.
    """
    inputs = _inputs(plan)
    names = list(inputs)
    numbers = {_number(name, names) for name in wanted} if wanted else set(range(min(len(names), most)))
    rest = [n for n in range(len(names)) if n not in numbers][: max(most - len(numbers), 0)]
    found = [
        subject
        for number in sorted([*numbers, *rest])
        for subject in _of_input(plan, context, names[number], inputs, number in numbers, bool(wanted))
    ]
    grids = {subject.timesteps for subject in found if subject.shown}
    if not grids:
        raise NothingToShow(f"there are no trajectories yet; make them with: pnp-batch run {plan.manifest.path}")
    left_out = 0 if wanted else len(names) - len(numbers)
    return Subjects([subject for subject in found if subject.timesteps in grids], left_out)


def _inputs(plan: Plan) -> dict[str, list[Job]]:
    """The jobs of every guidance image, by its name in the manifest; of a video the first frame stands for all."""
    inputs: dict[str, list[Job]] = {}
    for job in plan.jobs():
        if job.place == 0:
            inputs.setdefault(job.source.name, []).append(job)
    return inputs


def _of_input(
    plan: Plan, context: Context, name: str, inputs: Mapping[str, list[Job]], shown: bool, is_named: bool
) -> list[Subject]:
    """A subject for each trajectory of a guidance image."""
    jobs = [job for job in inputs[name] if job.needs_trajectory]
    called = distinct([name] * len(jobs), [_decides(job) for job in jobs])
    found = [_subject(Item(job, context), each, shown) for job, each in zip(jobs, called, strict=True)]
    if shown and is_named and not any(found):
        todo = f"make it with: pnp-batch run {plan.manifest.path}"
        raise NothingToShow(f"{name} has no trajectory yet; {todo}" if jobs else f"{name} is inverted for no prompt")
    return [subject for subject in found if subject is not None]


def _decides(job: Job) -> dict[str, Any]:
    """What a trajectory is made with."""
    if job.source.generate is not None:
        return job.source.generate.model_dump() | {"size": job.size}
    return {name: getattr(job.settings, name) for name in TRAJECTORY_SETTINGS}


def _number(wanted: str, names: Sequence[str]) -> int:
    if wanted not in names and wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if (name := meant(wanted, names, "--input")) is not None:
        return names.index(name)
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"inputs have numbers from 0 to {len(names) - 1}"
    raise ManifestError([Problem("command line", None, "--input", f"there is no input '{wanted}'; {hint}")])


def _subject(item: Item, name: str, shown: bool) -> Subject | None:
    try:
        artifact = item.find()
    except ItemError:
        return None
    if artifact is None:
        return None
    store = item.context.store
    kept, preview = store.load(artifact, "trajectory"), store.load(artifact, "preview")
    latents = torch.from_numpy(kept["latents"].astype("float32"))
    return Subject(name, item, preview["source"], latents, tuple(kept["timesteps"].tolist()), shown)
