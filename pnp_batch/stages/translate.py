"""Stage `translate`: trajectories and target prompts to pictures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from pnp_batch.errors import NonFiniteError
from pnp_batch.methods import METHODS
from pnp_batch.stages.batches import Group, attempt, incomplete
from pnp_batch.stages.work import Context, Item, Unit, described
from pnp_batch.store.artifacts import CorruptArtifact

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "translate"

# What a result's row says about its guidance image's inversion; null where it does not apply.
FIGURES = (
    "reconstruction_psnr",
    "vae_psnr",
    "reconstruction_mse",
    "reconstruction_is_estimated",
    "inverted_by",
    "inversion_rows",
    "inversion_residual",
    "inversion_converged",
)


def run(context: Context, items: Sequence[Item]) -> None:
    """Publishes every result that is missing and whose trajectory is there."""
    ready = [item for item in items if item.find() is not None]
    missing = [unit for item in ready for unit in item.units if unit.find() is None]
    if not missing:
        return
    batches = incomplete(list(planned(context, ready)), Unit.find)
    for _, group in groupby(batches, key=lambda batch: (_method(batch), _sources(batch))):
        attempt(list(group), lambda g: _compute(context, g), lambda unit, error: unit.fail(STAGE, error))


def planned(context: Context, items: Sequence[Item]) -> Iterator[list[Unit]]:
    """All units of a package, cut into batches: whole images while they fit, one image's prompts in parts where they do not.

    All members of a batch have one method and inject at the same layers. Batches that share an image share all of them, so
    its source rows are computed once for all of its prompts.
    """
    for kind in sorted({_kind(unit) for item in items for unit in item.units}):
        batch: list[Unit] = []
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


def _kind(unit: Unit) -> tuple[Any, ...]:
    method = unit.translation.settings.method
    return (list(METHODS).index(method), *unit.layers)


def _method(batch: Sequence[Unit]) -> str:
    return batch[0].translation.settings.method


def _parts(units: list[Unit], size: int) -> Iterator[list[Unit]]:
    for i in range(0, len(units), size):
        yield units[i : i + size]


def _sources(batch: Iterable[Unit]) -> list[Item]:
    """The distinct images of a batch, in order."""
    return list(dict.fromkeys(unit.item for unit in batch))


def _compute(context: Context, group: Group[Unit]) -> None:
    import torch  # only when something is to be computed

    from pnp_batch.diffusion.steps import CheckpointedLoop
    from pnp_batch.methods.pnp import Target

    begin = time.monotonic()
    sources = _sources(group[0])
    method = METHODS[_method(group[0])]
    given = _trajectory if method.needs == "trajectory" else _clean_latent
    kept = torch.stack([given(context, item) for item in sources])
    targets = [
        [Target(sources.index(u.item), u.translation.prompt, u.translation.settings, *u.layers) for u in batch]
        for batch in group
    ]
    keys = [unit.key for batch in group for unit in batch]
    loop = CheckpointedLoop(context.checkpoints(STAGE, keys), context.model, context.events.step)
    finals = method.load()(context.model, kept, [item.job.prompt for item in sources], targets, loop)
    seconds = time.monotonic() - begin
    for batch, latents in zip(group, finals, strict=True):
        _publish(context, batch, latents, seconds * len(batch) / len(keys))
    loop.clear()


def _trajectory(context: Context, item: Item) -> Tensor:
    """The kept latents of an item, (steps, 4, height, width) float32."""
    import torch

    return torch.from_numpy(_shard(context, item, "trajectory")["latents"].astype(np.float32))


def _clean_latent(context: Context, item: Item) -> Tensor:
    """What its guidance image encodes to, (4, height, width) float32."""
    return context.model.encode_image(_shard(context, item, "preview")["source"])[0].cpu()


def _shard(context: Context, item: Item, name: str) -> dict[str, np.ndarray[Any, Any]]:
    artifact = item.find()
    if artifact is None:
        raise CorruptArtifact(f"the trajectory of {item.job.source.name} is gone")
    return context.store.load(artifact, name)


def _publish(context: Context, batch: Sequence[Unit], latents: Any, seconds: float) -> None:
    from pnp_batch.diffusion.model import to_pixels

    pictures = [context.model.decode(latents[i : i + 1]) for i in range(len(batch))]
    problems = [_problem(context, picture) for picture in pictures]
    failed = [unit.key for unit, problem in zip(batch, problems, strict=True) if problem]
    how = described(context, [unit.key for unit in batch], failed, seconds)
    for i, (unit, picture, problem) in enumerate(zip(batch, pictures, problems, strict=True)):
        if problem:
            unit.fail(STAGE, NonFiniteError(problem))
            continue
        shards = {"result": {"image": to_pixels(picture), "latent": latents[i].cpu().numpy()}}
        unit.artifact = context.store.publish(STAGE, unit.key, shards, how | _about(unit))
        context.events.made(STAGE, 1)


def _problem(context: Context, picture: Any) -> str | None:
    """Why a picture is no result: NaN in any channel, or nothing but black, which is what NaN decodes to on some devices."""
    if not bool(picture.isfinite().all()):
        return f"the result holds NaN or infinity in {context.dtype}"
    return f"the result is all black in {context.dtype}" if float(picture.max()) * 255 < 0.5 else None


def _about(unit: Unit) -> dict[str, Any]:
    settings = unit.translation.settings
    width, height = unit.item.job.size or (None, None)
    values = settings.meaningful() | {"width": width, "height": height}
    if METHODS[settings.method].uses_layers:
        values |= {"pnp_f_layers": list(unit.layers[0]), "pnp_attn_layers": list(unit.layers[1])}
    errors = trajectory.meta["errors"] if (trajectory := unit.item.find()) else {}
    return {
        "prompt": unit.translation.prompt,
        "settings": values,
        "trajectory": unit.item.key,
        "errors": {name: errors.get(name) for name in FIGURES},
    }
