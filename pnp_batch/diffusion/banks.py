"""Where source features come from: a source pass at each step, or a bank that keeps what one gave.

A bank holds, for each of the first sampling steps, the outputs of the injection sites' leaves for one guidance image. It
changes what a result costs and, unless it is compressed, nothing else: it holds just what the pass gave, bit by bit. (Where
that pass had other guidance images beside it than one made now would have, rounding differs as between any two batches.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnp_batch.diffusion.compression import SCALE, packed, stored_type, unpacked
from pnp_batch.diffusion.injection import Features, read_features
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.sites import Site

Arrays = dict[str, NDArray[Any]]

SHARD_BYTES = 64_000_000  # two steps of Stable Diffusion 1.5 at all layers, all steps with f alone

# NumPy knows neither of these, so their bits are kept under a type of the same size.
_AS_BITS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}


@dataclass(frozen=True)
class Extent:
    """What of a guidance image's features is needed: at which decoder layers, for how many of the first sampling steps."""

    f_layers: tuple[int, ...]
    attn_layers: tuple[int, ...]
    f_steps: int
    attn_steps: int

    @property
    def steps(self) -> int:
        """Sampling steps with any feature."""
        return max(self.f_steps, self.attn_steps)

    def sites(self, model: DiffusionModel, step: int) -> list[Site]:
        """The sites that are read at a step."""
        f = model.sites("f", self.f_layers) if step < self.f_steps else []
        attn = model.sites("a", self.attn_layers) if step < self.attn_steps else []
        return [*f, *attn]


class SourceFeatures(Protocol):
    """Gives the features of some guidance images, in one order."""

    def at(self, step: int, sites: Sequence[Site]) -> Features:
        """The features of the sites at a sampling step, a row for each guidance image."""
        ...


class SourcePass:
    """Features by a UNet pass over all the guidance images, no deeper than the last wanted site.

    Args:
        model: The model.
        trajectory: (sources, steps, 4, height, width) float32: the kept latents, descending.
        prompts: The prompt each source was inverted (or generated) with.
        compression: `none`, or `int8` or `fp8` for features rounded as a bank would.
    """

    def __init__(
        self, model: DiffusionModel, trajectory: Tensor, prompts: Sequence[str], compression: str = "none"
    ) -> None:
        self.model, self.trajectory, self.prompts, self.compression = model, trajectory, prompts, compression
        self.timesteps = model.checkpoint.schedule.timesteps(trajectory.shape[1])

    def at(self, step: int, sites: Sequence[Site]) -> Features:
        """See `SourceFeatures`."""
        return unpacked(self.packed(step, sites), self.model.dtype) if sites else {}

    def packed(self, step: int, sites: Sequence[Site]) -> dict[str, Tensor]:
        """The features of some sites as a bank keeps them."""
        latents = self.trajectory[:, step].to(self.model.device)
        features = read_features(sites, lambda: self.model.predict(latents, self.timesteps[step], self.prompts))
        return packed(features, self.compression)


class MemoryBank:
    """Features that are computed when first wanted and then remembered, on the model's device.

    Args:
        source: Computes them.
        extents: What each guidance image needs: all that anyone will ask for.
    """

    def __init__(self, source: SourcePass, extents: Sequence[Extent]) -> None:
        self.source, self.extents = source, extents
        self._steps: dict[int, dict[str, Tensor]] = {}

    def at(self, step: int, sites: Sequence[Site]) -> Features:
        """See `SourceFeatures`."""
        if not sites:
            return {}
        if step not in self._steps:
            self._steps[step] = self.source.packed(step, all_sites(self.source.model, self.extents, step))
        return unpacked(self._steps[step], self.source.model.dtype)

    @property
    def bytes(self) -> int:
        """What is remembered so far."""
        return sum(tensor.nbytes for step in self._steps.values() for tensor in step.values())


def all_sites(model: DiffusionModel, extents: Sequence[Extent], step: int) -> list[Site]:
    """The sites that any of some guidance images needs at a step."""
    return list(dict.fromkeys(site for extent in extents for site in extent.sites(model, step)))


def fill(source: SourcePass, extents: Sequence[Extent], write: Callable[[int, str, Arrays], None]) -> None:
    """Computes the banks of some guidance images together, and hands them on a range of timesteps at a time.

    Args:
        source: Computes the features.
        extents: What each bank holds.
        write: Takes the number of a guidance image, the name of a shard (`steps-000-003`) and its arrays, which are called
            `002.f4` or `002.a4.0.q` by their step.
    """
    writers = [_ShardWriter(extent, partial(write, i)) for i, extent in enumerate(extents)]
    for step in range(max(extent.steps for extent in extents)):
        kept = source.packed(step, all_sites(source.model, extents, step))
        for i, (writer, extent) in enumerate(zip(writers, extents, strict=True)):
            own = {name for site in extent.sites(source.model, step) for name in site.leaves}
            writer.add(step, {name: t[i : i + 1] for name, t in kept.items() if name.removesuffix(SCALE) in own})


class _ShardWriter:
    """Collects the steps of one bank into shards."""

    def __init__(self, extent: Extent, write: Callable[[str, Arrays], None]) -> None:
        self._last, self._write = extent.steps - 1, write
        self._first, self._arrays = 0, Arrays()

    def add(self, step: int, features: Mapping[str, Tensor]) -> None:
        """Takes one step's features, in order; nothing where the extent has ended."""
        if step > self._last:
            return
        self._arrays |= {f"{step:03}.{name}": _as_array(feature) for name, feature in features.items()}
        size = sum(array.nbytes for array in self._arrays.values())
        # A step takes no more than the one before, since sites drop out and none come in.
        if step == self._last or size + size // (step - self._first + 1) > SHARD_BYTES:
            self._write(f"steps-{self._first:03}-{step:03}", self._arrays)
            self._first, self._arrays = step + 1, Arrays()


class BankReader:
    """Reads one picture's bank in order, a shard at a time.

    Args:
        shards: Names of its shards.
        load: Reads and checks one.
    """

    def __init__(self, shards: Sequence[str], load: Callable[[str], Arrays]) -> None:
        self._shard_of = {step: name for name in shards for step in _steps_of(name)}
        self._load = load
        self._open: tuple[str, Arrays] = ("", {})

    def step(self, step: int) -> Arrays:
        """The arrays of one step by feature; none after the last."""
        if step not in self._shard_of:
            return {}
        if self._open[0] != self._shard_of[step]:
            self._open = self._shard_of[step], self._load(self._shard_of[step])
        prefix = f"{step:03}."
        return {name.removeprefix(prefix): a for name, a in self._open[1].items() if name.startswith(prefix)}


class StoredBanks:
    """Features from stored banks, read one step ahead of who asks, in a thread of its own. A context manager.

    Args:
        model: Whose features they are.
        readers: One for each guidance image.
        compression: What the banks were packed with.
    """

    def __init__(self, model: DiffusionModel, readers: Sequence[BankReader], compression: str) -> None:
        self.model, self.readers = model, readers
        self._type = stored_type(compression, model.dtype)
        self._thread = ThreadPoolExecutor(1, "bank")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def __enter__(self) -> StoredBanks:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def at(self, step: int, sites: Sequence[Site]) -> Features:
        """See `SourceFeatures`."""
        if not sites:
            return {}
        kept = (self._ahead.get(step) or self._thread.submit(self._read, step)).result()
        self._ahead = {step + 1: self._thread.submit(self._read, step + 1)}
        moved = {name: tensor.to(self.model.device, non_blocking=True) for name, tensor in kept.items()}
        return unpacked(moved, self.model.dtype)

    def _read(self, step: int) -> dict[str, Tensor]:
        """The features of a step for all guidance images, on the CPU; runs in the thread."""
        pictures = [reader.step(step) for reader in self.readers]
        known = {name: array for arrays in pictures for name, array in arrays.items()}
        # A picture without a feature at this step has no target that asks for it: its row is never looked at.
        rows = {
            name: torch.cat([self._tensor(name, arrays.get(name, np.zeros_like(some))) for arrays in pictures])
            for name, some in known.items()
        }
        return {name: row.pin_memory() for name, row in rows.items()} if self.model.device.type == "cuda" else rows

    def _tensor(self, name: str, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if name.endswith(SCALE) else tensor.view(self._type)


def _steps_of(shard: str) -> range:
    _, first, last = shard.split("-")
    return range(int(first), int(last) + 1)


def _as_array(tensor: Tensor) -> NDArray[Any]:
    bits = _AS_BITS.get(tensor.dtype)
    return (tensor if bits is None else tensor.view(bits)).cpu().numpy()
