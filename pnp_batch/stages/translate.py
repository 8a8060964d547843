"""Stage `translate`: trajectories and target prompts to pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from pnp_batch import interrupts
from pnp_batch.errors import NonFiniteError
from pnp_batch.methods import METHODS
from pnp_batch.plan import INVERSION_SETTINGS
from pnp_batch.stages import bank
from pnp_batch.stages.batches import Group, attempt
from pnp_batch.stages.groups import groups, method_of, sources_of
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
    ready = groups(context, items)
    if ready:
        context.load(context.dtype)  # before any unit is in hand: what dies here is nobody's fault
    for group in ready:
        attempt(group, partial(_compute, context), _give_up, context.ledger, STAGE)


def _give_up(unit: Unit, error: BaseException) -> None:
    unit.fail(STAGE, error)


def _compute(context: Context, group: Group[Unit]) -> None:
    import torch  # only when something is to be computed

    from pnp_batch.diffusion.steps import CheckpointedLoop
    from pnp_batch.methods.pnp import Target

    begin = time.monotonic()
    sources = sources_of(group[0])
    method = METHODS[method_of(group[0][0])]
    given = _trajectory if method.needs == "trajectory" else _clean_latent
    kept = torch.stack([given(context, item) for item in sources])
    targets = [
        [Target(sources.index(u.item), u.translation.prompt, u.translation.settings, *u.layers) for u in batch]
        for batch in group
    ]
    keys = [unit.key for batch in group for unit in batch]
    loop = CheckpointedLoop(context.checkpoints(STAGE, keys), context.model, context.events.step)
    prompts = [item.job.prompt for item in sources]

    def finals_of() -> list[Tensor]:
        with ExitStack() as stack:
            features = {"features": stack.enter_context(bank.features(context, sources))} if method.uses_layers else {}
            return method.load()(context.model, kept, prompts, targets, loop, **features)  # type: ignore[no-any-return]

    try:
        finals = finals_of()
    except CorruptArtifact:  # a bank, which is set aside by now or made room for another; a source pass takes its place
        loop = CheckpointedLoop(context.checkpoints(STAGE, keys), context.model, context.events.step)
        finals = finals_of()
    seconds = time.monotonic() - begin
    for batch, latents in zip(group, finals, strict=True):
        _publish(context, batch, latents, seconds * len(batch) / len(keys))
    loop.clear()


def _trajectory(context: Context, item: Item) -> Tensor:
    """The kept latents of an item, (steps, 4, height, width) float32."""
    import torch

    return torch.from_numpy(item.latents())


def _clean_latent(context: Context, item: Item) -> Tensor:
    """What its guidance image encodes to, (4, height, width) float32."""
    return context.model.encode_image(item.shard("preview")["source"])[0].cpu()


def _publish(context: Context, batch: Sequence[Unit], latents: Any, seconds: float) -> None:
    from pnp_batch.diffusion.model import to_pixels

    pictures = [context.model.decode(latents[i : i + 1]) for i in range(len(batch))]
    problems = [problem_with(context, picture) for picture in pictures]
    failed = [unit.key for unit, problem in zip(batch, problems, strict=True) if problem]
    how = described(context, [unit.key for unit in batch], failed, seconds)
    with interrupts.held_back():  # a batch of which one is lost is computed anew
        for i, (unit, picture, problem) in enumerate(zip(batch, pictures, problems, strict=True)):
            if problem:
                unit.fail(STAGE, NonFiniteError(problem))
                continue
            shards = {"result": {"image": to_pixels(picture), "latent": latents[i].cpu().numpy()}}
            unit.artifact = context.store.publish(STAGE, unit.key, shards, how | about(unit))
            context.events.made(STAGE, unit.item.job.window is None)  # a video is counted once it is written


def problem_with(context: Context, picture: Any) -> str | None:
    """Why a picture is no result, if it is none."""
    from pnp_batch.diffusion.model import flaw_in

    flaw = flaw_in(picture)
    return f"{flaw} in {context.dtype}" if flaw else None


def about(unit: Unit) -> dict[str, Any]:
    """What the artifact of a result says about it."""
    errors = trajectory.meta["errors"] if (trajectory := unit.item.find()) else {}
    return {
        "prompt": unit.translation.prompt,
        "settings": settings_of(unit),
        "bank_compression": unit.bank_compression,
        "trajectory": unit.item.key,
        "errors": {name: errors.get(name) for name in FIGURES},
    }


def settings_of(unit: Unit) -> dict[str, Any]:
    """What a result is made with, all that the model and the picture decide filled in; its picture is not decoded."""
    settings = unit.translation.settings
    width, height = unit.item.job.size or (None, None)
    values = settings.meaningful() | {"width": width, "height": height}
    if unit.item.job.window is None:
        values.pop("consistency", None)
    if (generated := unit.item.job.generated) is not None:  # then nothing is inverted
        values = {name: value for name, value in values.items() if name not in INVERSION_SETTINGS}
        values["generate"] = generated
    if METHODS[settings.method].uses_layers:
        values |= {"pnp_f_layers": list(unit.layers[0]), "pnp_attn_layers": list(unit.layers[1])}
    return values
