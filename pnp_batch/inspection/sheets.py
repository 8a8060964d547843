"""The paper's figures for any model: PCA of f, PCA of self-attention, the denoising trajectory. Each is a sheet of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pnp_batch.diffusion.injection import read_features
from pnp_batch.diffusion.model import DiffusionModel, to_pixels
from pnp_batch.diffusion.sites import AttentionSite, Site
from pnp_batch.inspection.pca import Basis, Moments, of_map
from pnp_batch.inspection.subjects import Subject
from pnp_batch.media.images import Pixels
from pnp_batch.methods.pnp import Target, translate
from pnp_batch.names import distinct


@dataclass(frozen=True)
class Sheet:
    """Pictures of one guidance image in rows and columns.

    Attributes:
        name: The guidance image.
        source: Its picture.
        rows: What each row shows.
        columns: What each column shows.
        pictures: (height, width, 3) uint8 by row and column.
    """

    name: str
    source: Pixels
    rows: Sequence[str]
    columns: Sequence[str]
    pictures: Sequence[Sequence[Pixels]]


def made(kind: str, model: DiffusionModel, found: Sequence[Subject], layers: Sequence[int], count: int) -> list[Sheet]:
    """The sheets of a kind: `features`, `attention` or `trajectory` (which has no layers).

    Subjects with the same timesteps come together: only these can be compared column by column, and share a basis.
    """
    grids: dict[tuple[int, ...], list[Subject]] = {}
    for subject in found:
        grids.setdefault(subject.timesteps, []).append(subject)
    if kind == "trajectory":
        return [sheet for group in grids.values() for sheet in trajectory(model, group, count)]
    of_kind = features if kind == "features" else attention
    return [sheet for group in grids.values() for sheet in of_kind(model, group, layers, count)]


def places(steps: int, count: int) -> list[int]:
    """Indices of `count` of `steps` timesteps, evenly from the noisiest to the cleanest."""
    return sorted({round(float(place)) for place in np.linspace(0, steps - 1, min(count, steps))})


@torch.inference_mode()
def features(model: DiffusionModel, found: Sequence[Subject], layers: Sequence[int], count: int) -> list[Sheet]:
    """PCA of f: at each layer and timestep one basis over all subjects.

    Args:
        model: The model.
        found: The subjects, all with the same timesteps; all take part in the basis.
        layers: Decoder layers.
        count: Timesteps.
    """
    sites = model.sites("f", tuple(layers))
    steps = places(len(found[0].timesteps), count)
    shown = [subject for subject in found if subject.shown]
    pictures: dict[tuple[int, str, int], Pixels] = {}
    bases: dict[str, Basis] = {}
    for step in steps:
        read = [_read(model, subject, step, sites) for subject in found]
        for site in sites:
            bases[site.name] = basis = _basis([own[site.name] for own in read], bases.get(site.name))
            for i, own in enumerate(own for own, subject in zip(read, found, strict=True) if subject.shown):
                pictures[i, site.name, step] = _coloured(basis, own[site.name])
    rows = {f"layer {layer}": site.name for layer, site in zip(sorted(layers), sites, strict=True)}
    return [_sheet(subject, i, rows, steps, pictures) for i, subject in enumerate(shown)]


@torch.inference_mode()
def attention(model: DiffusionModel, found: Sequence[Subject], layers: Sequence[int], count: int) -> list[Sheet]:
    """PCA of the self-attention maps, averaged over heads, in each picture's own basis; arguments as `features`."""
    sites = [site for site in model.sites("a", tuple(layers)) if isinstance(site, AttentionSite)]
    shown = [subject for subject in found if subject.shown]
    steps = places(len(found[0].timesteps), count)
    pictures: dict[tuple[int, str, int], Pixels] = {}
    for i, subject in enumerate(shown):
        height, width = subject.latents.shape[-2:]
        colours: dict[str, Tensor] = {}
        for step in steps:
            own = _read(model, subject, step, sites)
            for site in sites:
                found_map = attention_map(own[f"{site.name}.q"][0], own[f"{site.name}.k"][0], site.attention.heads)
                colours[site.name] = of_map(found_map, colours.get(site.name))
                pictures[i, site.name, step] = _as_picture(colours[site.name], height / width)
    rows = {f"layer {site.name.removeprefix('a').removesuffix('.0')}": site.name for site in sites}
    return [_sheet(subject, i, rows, steps, pictures) for i, subject in enumerate(shown)]


def trajectory(model: DiffusionModel, found: Sequence[Subject], count: int) -> list[Sheet]:
    """Strips of decoded latents: the kept trajectory of the guidance image, and the sampling of each of its prompts.

    The sampling is run again, since a run keeps only its end. Prompts of other methods than PnP have no strip.

    Args:
        model: The model.
        found: The subjects.
        count: Timesteps.
    """
    return [_strips(model, subject, count) for subject in found if subject.shown]


def _strips(model: DiffusionModel, subject: Subject, count: int) -> Sheet:
    steps = places(len(subject.timesteps), count)
    units = [unit for unit in subject.item.units if unit.translation.settings.method == "pnp"]
    prompts = [unit.translation.prompt for unit in units]
    names = distinct(prompts, [unit.translation.settings.meaningful() for unit in units])
    strips = [[subject.latents[step] for step in steps]]
    for unit in units:
        seen: list[Tensor] = []
        target = Target(0, unit.translation.prompt, unit.translation.settings, *unit.layers)
        translate(
            model,
            subject.latents[None],
            [subject.item.job.prompt],
            [[target]],
            watch=lambda _number, _timestep, latents, seen=seen: seen.append(latents[0].cpu()),  # type: ignore[misc]
        )
        strips.append([seen[step] for step in steps])
    decoded = [[to_pixels(model.decode(latent[None].to(model.device))) for latent in strip] for strip in strips]
    rows = ["guidance image, inverted", *names]
    return Sheet(subject.name, subject.source, rows, _columns(subject, steps), decoded)


def attention_map(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Softmax of q k^T / sqrt(d), averaged over heads: (tokens, channels) twice to (tokens, tokens)."""
    q, k = (x.float().reshape(len(x), heads, -1).transpose(0, 1) for x in (queries, keys))
    total = torch.zeros(q.shape[1], q.shape[1], device=q.device)
    for own_q, own_k in zip(q, k, strict=True):  # head by head: 4096 tokens take 64 MB each
        total += (own_q @ own_k.T / q.shape[-1] ** 0.5).softmax(-1)
    return (total / heads).cpu()


def _read(model: DiffusionModel, subject: Subject, step: int, sites: Sequence[Site]) -> dict[str, Tensor]:
    latents = subject.latents[step][None].to(model.device)
    text = [subject.item.job.prompt]
    return read_features(sites, lambda: model.predict(latents, subject.timesteps[step], text))


def _basis(maps: Sequence[Tensor], like: Basis | None) -> Basis:
    moments = Moments()
    for each in maps:
        moments.add(_rows(each))
    return moments.basis(like)


def _rows(feature: Tensor) -> Tensor:
    """(1, channels, height, width) to (places, channels) on the CPU."""
    return feature[0].flatten(1).T.cpu()


def _coloured(basis: Basis, feature: Tensor) -> Pixels:
    return _as_picture(basis.colours(_rows(feature)), feature.shape[2] / feature.shape[3])


def _as_picture(colours: Tensor, aspect: float) -> Pixels:
    """Colours of places (places, 3), row by row, as a picture of the given height over width."""
    height = round((len(colours) * aspect) ** 0.5)
    return to_pixels(colours.reshape(height, -1, 3))


def _sheet(
    subject: Subject,
    number: int,
    rows: Mapping[str, str],
    steps: Sequence[int],
    pictures: Mapping[tuple[int, str, int], Pixels],
) -> Sheet:
    cells = [[pictures[number, name, step] for step in steps] for name in rows.values()]
    return Sheet(subject.name, subject.source, list(rows), _columns(subject, steps), cells)


def _columns(subject: Subject, steps: Sequence[int]) -> list[str]:
    return [f"t = {subject.timesteps[step]}" for step in steps]
