"""What the stages share: the context of a worker, the items of a package, and what may go wrong with one of them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pnp_batch import clips
from pnp_batch.checkpoint import Checkpoint
from pnp_batch.clips import SEGMENT, ClipReader
from pnp_batch.errors import ItemError, NonFiniteError
from pnp_batch.inputs import Translation
from pnp_batch.ledger import Ledger, unit_name
from pnp_batch.media.images import Pixels, load_rgb
from pnp_batch.methods import METHODS
from pnp_batch.plan import Job, noted_digest, trajectory_key, translation_key, unit_id
from pnp_batch.stages.batches import automatic_batch
from pnp_batch.stages.quality import Rule, Verdict
from pnp_batch.stages.remembered import Banks, Reel
from pnp_batch.store import Artifact, ArtifactStore, DigestCache
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.checkpoints import LoopCheckpoint
from pnp_batch.store.keys import key_of, sha256

if TYPE_CHECKING:
    from pnp_batch.diffusion.model import DiffusionModel
    from pnp_batch.stages.outputs import Outputs


READ = "read"  # what decoding guidance pictures is called in the ledger and in failure lists


class Events(Protocol):
    """Who is told what happens: the live view, the log, the failure list."""

    def step(self, rows: int) -> None:
        """UNet rows were computed."""

    def made(self, stage: str, count: int) -> None:
        """A stage made artifacts or files."""

    def note(self, message: str) -> None:
        """Something a person should know."""


@dataclass(frozen=True)
class Context:
    """Everything a stage needs besides the items.

    Attributes:
        store: The artifact store.
        digests: Cache of pixel digests.
        checkpoint: The model's files.
        fingerprint: The model's identity in keys.
        dtype: Of the UNet, in keys.
        device: Device type, `cpu` or `cuda`.
        load: Loads the model in a dtype, once.
        outputs: The output folder.
        events: Who is told.
        ledger: Who had what in hand when a worker died.
        batch_size: Translations in one UNet pass; None chooses by `automatic_batch`.
        checkpoint_seconds: Least time between two checkpoints of a loop.
        measure: Whether to sample back what `ddim` inverted.
        banks: Where source features come from.
        rule: Gives what the quality gate asks for, None where there is no gate.
        clips: Reads frames of videos.
        reels: What is known of videos, by dtype and `Unit.id` (`stages/videos.py`).
    """

    store: ArtifactStore
    digests: DigestCache
    checkpoint: Checkpoint
    fingerprint: str
    dtype: str
    device: str
    load: Callable[[str], DiffusionModel]
    outputs: Outputs
    events: Events
    ledger: Ledger
    batch_size: int | None
    checkpoint_seconds: float
    measure: bool
    banks: Banks
    rule: Callable[[], Rule | None] = lambda: None
    clips: ClipReader = field(default_factory=ClipReader)
    reels: dict[tuple[str, str], Reel] = field(default_factory=dict)

    @property
    def model(self) -> DiffusionModel:
        """The model, loaded on first use: a run that computes nothing loads nothing."""
        return self.load(self.dtype)

    def batch_of(self, item: Item) -> int:
        """How many items of this one's geometry go into a batch."""
        return self.batch_size or automatic_batch(self.device, item.job.size or (0, 0), self.checkpoint.cell)

    def checkpoints(self, stage: str, keys: Sequence[str]) -> Callable[[str], LoopCheckpoint]:
        """Saved states of the loops of one batch, by name of the loop."""
        return lambda name: LoopCheckpoint(
            self.store.root, f"{stage}-{name}", keys, self.checkpoint_seconds, self.ledger.progressed
        )


def items_of(jobs: Iterable[Job], context: Context) -> list[Item]:
    """Jobs in hand; those of one window know each other."""
    items = [Item(job, context) for job in jobs]
    if items and items[0].job.is_joint:
        neighbours = Neighbours(items)
        for item in items:
            item.neighbours = neighbours
    return items


@dataclass(eq=False)
class Neighbours:
    """The frames of a window that are translated together."""

    items: Sequence[Item]

    @cached_property
    def digest(self) -> str:
        """What they are, all of them, in order."""
        return key_of({"trajectories": [item.key for item in self.items]})


@dataclass(eq=False)
class Item:
    """A job in hand: its pixels, their digest and its keys, as far as they are known."""

    job: Job
    context: Context
    failed: bool = False
    artifact: Artifact | None = field(default=None, repr=False)
    neighbours: Neighbours | None = field(default=None, repr=False)
    digest: str | None = None
    _pixels: Pixels | None = field(default=None, repr=False)

    def fail(self, stage: str, error: BaseException) -> None:
        """Takes the item out of this run: none of its results can be made."""
        self.failed = True
        for unit in self.units:
            unit.fail(stage, error)

    @property
    def pixels(self) -> Pixels:
        """The guidance image, decoded once for all stages; no `cached_property`, which lets one thread in at a time.

        Raises:
            ItemError: It cannot be read.
        """
        if self._pixels is None:
            self._pixels = self._decoded()
        return self._pixels

    def _decoded(self) -> Pixels:
        if self.job.source.path is None or self.job.size is None:
            raise ItemError(f"{self.job.source.name} could not be read when the plan was made")
        if self.job.window is not None:
            return self.context.clips.pixels(self.job.window.clip, self.job.place, self.job.size)
        return load_rgb(self.job.source.path, self.job.size)

    @cached_property
    def key(self) -> str:
        """Key of its trajectory; reads the picture only if its digest is not known yet.

        Raises:
            ItemError: The picture cannot be read.
        """
        return trajectory_key(self.job, self._digest(), self.context.fingerprint, self.context.dtype)

    def knows_key(self) -> bool:
        """Whether the key can be told without decoding the picture; a digest that was noted is remembered."""
        noted = noted_digest(self.job)
        if noted is None or self.digest is not None:
            return True
        path, what = noted
        if self.job.size is not None and path.exists():
            self.digest = self.context.digests.get(path, what)
        return self.digest is not None

    def _digest(self) -> str | None:
        if not self.knows_key():
            if self.job.size is None:
                self._say_what_is_wrong()
            unit = unit_name(READ, self.place)
            self.context.ledger.refuse(unit)
            with self.context.ledger.attempt([unit]):
                self.read()
        return self.digest

    def _say_what_is_wrong(self) -> None:
        path = self.job.source.path
        assert path is not None
        if self.job.source.video is not None:
            clips.opened(path, self.job.source.video, self.context.store.root, self.context.ledger)
        else:
            load_rgb(path, (8, 8))
        raise ItemError(f"{path}: could not be read when the plan was made; run again")

    def read(self) -> None:
        """Notes the digest of its pixels. A picture may well kill the process that decodes it: whoever calls this marks it.

        Raises:
            ItemError: The picture cannot be read.
        """
        if (noted := noted_digest(self.job)) is not None:
            try:
                self.digest = self.context.digests.of(*noted, lambda: sha256(self.pixels.tobytes()))
            except FileNotFoundError as error:
                raise ItemError(f"{self.job.source.path}: the file has vanished") from error

    @cached_property
    def place(self) -> str:
        """Where its pixels come from: what it is called in the ledger while its key is not known."""
        return sha256(os.fsencode(f"{self.job.source.path} {self.job.place}"))

    @cached_property
    def units(self) -> list[Unit]:
        """Its translations."""
        return [Unit(self, translation) for translation in self.job.translations]

    def find(self) -> Artifact | None:
        """Its published trajectory, if there is one; remembered."""
        if self.artifact is None:
            self.artifact = self.context.store.find("invert", self.key)
        return self.artifact

    def latents(self) -> NDArray[np.float32]:
        """The kept latents of its trajectory, (steps, 4, height, width)."""
        return self.shard("trajectory")["latents"].astype(np.float32)

    def shard(self, name: str) -> dict[str, NDArray[Any]]:
        """Reads a shard of its trajectory.

        Raises:
            CorruptArtifact: It has to be made again.
        """
        artifact = self.find()
        if artifact is None:
            raise CorruptArtifact(f"the trajectory of {self.job.source.name} is gone")
        return self.context.store.load(artifact, name)


@dataclass(frozen=True)
class Outcome:
    """How one result ended.

    Attributes:
        id: `plan.unit_id` of it.
        done: Whether it is there.
        stage: Where it failed.
        error: What went wrong, or None.
        traceback: Of the error.
    """

    id: str
    done: bool
    stage: str = ""
    error: str | None = None
    traceback: str = ""


@dataclass(eq=False)
class Unit:
    """One translation in hand."""

    item: Item
    translation: Translation
    error: BaseException | None = None
    stage: str = ""
    traceback: str = ""
    artifact: Artifact | None = field(default=None, repr=False)
    verdict: Verdict | None = None
    is_assembled: bool = False

    def fail(self, stage: str, error: BaseException) -> None:
        """Takes this result out of the run; the others go on."""
        self.stage, self.error = stage, error
        self.traceback = "".join(traceback.format_exception(error))
        error.__traceback__ = None  # it holds the tensors of the failed pass

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Injection layers (f, A); none where the method injects nothing."""
        settings = self.translation.settings
        if not METHODS[settings.method].uses_layers:
            return (), ()
        if settings.pnp_f_layers is not None and settings.pnp_attn_layers is not None:
            return settings.layers(((), ()))
        return settings.layers(self.item.context.checkpoint.layers)

    @cached_property
    def key(self) -> str:
        """Key of its result."""
        window = self._window
        return translation_key(self.translation, self.item.key, self.layers, self.bank_compression, window)

    @property
    def bank_compression(self) -> str:
        """How its source features are packed: `none` where it has none, and for frames that are translated together."""
        banked = METHODS[self.translation.settings.method].uses_layers and self._window is None
        return self.item.context.banks.compression if banked else "none"

    @property
    def _window(self) -> dict[str, Any] | None:
        """What decides a frame besides itself: its neighbours, where it stands, and where keyframes are drawn."""
        neighbours, window = self.item.neighbours, self.item.job.window
        if neighbours is None or window is None:
            return None
        return {"frames": neighbours.digest, "first": window.first, "place": self.item.job.place, "segment": SEGMENT}

    @cached_property
    def id(self) -> str:
        """What it is called in failure lists, whether or not its pixels can be read."""
        return unit_id(self.item.job.source, self.translation)

    @property
    def is_done(self) -> bool:
        """Whether its result is there, and judged where there is a quality gate; that of a frame is the whole video."""
        if self.error is not None:
            return False
        return self.is_assembled if self.item.job.window else self.result() is not None

    @property
    def outcome(self) -> Outcome:
        """How it ended, for those who were not there."""
        error = None if self.error is None else str(self.error) or type(self.error).__name__
        return Outcome(self.id, self.is_done, self.stage, error, self.traceback)

    @property
    def is_given_up(self) -> bool:
        """Whether it failed and nothing is left to try."""
        return self.error is not None and not self.needs_float32 and not isinstance(self.error, CorruptArtifact)

    @property
    def needs_float32(self) -> bool:
        """Whether half precision gave no picture, so that float32 is to be tried."""
        return isinstance(self.error, NonFiniteError) and self.item.context.dtype != "float32"

    def find(self) -> Artifact | None:
        """Its published result, if there is one; remembered. A note of a fallback leads to the result in float32."""
        if self.artifact is None:
            store = self.item.context.store
            self.artifact = store.find("translate", self.key)
            if self.artifact and "fallback" in self.artifact.meta:
                self.artifact = store.find("translate", self.artifact.meta["fallback"])
        return self.artifact

    def result(self) -> Artifact | None:
        """The result that stands: its own, or the one that the quality gate settled on; None before that.

        Raises:
            EnvironmentFailure: The weights of the gate's metrics are not here.
        """
        own = self.find()
        rule = self.item.context.rule() if own else None
        if own is None or rule is None:
            return own
        store = self.item.context.store
        self.verdict = self.verdict or rule.find(store, own)
        return store.find("translate", self.verdict.chosen) if self.verdict else None


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("pnp-batch", "torch", "diffusers", "transformers")}


def described(context: Context, members: Sequence[str], failed: Sequence[str], seconds: float) -> dict[str, Any]:
    """The part of an artifact's `meta` that says how it was made.

    `batch` is what makes a lost result reproducible to the byte: the members of its batch, in order.
    """
    return {
        "model": context.checkpoint.name,
        "fingerprint": context.fingerprint,
        "dtype": context.dtype,
        "device": context.device,
        "hardware": context.model.hardware,
        "versions": _versions(),
        "batch": list(members),
        "failed": list(failed),
        "seconds": round(seconds / max(len(members), 1), 3),
    }
