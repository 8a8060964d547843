"""The one loop of a worker: take a package, make what is missing, stage by stage, batch by batch."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.inputs import Translation
from pnp_batch.ledger import Ledger
from pnp_batch.manifest import Manifest
from pnp_batch.names import counted
from pnp_batch.plan import Job, Package, Plan
from pnp_batch.stages import STAGES, bank, read, videos
from pnp_batch.stages.batches import MAX_BATCH, at_most
from pnp_batch.stages.outputs import Outputs, Rows
from pnp_batch.stages.parts import parts
from pnp_batch.stages.quality import PASSED, Rule
from pnp_batch.stages.remembered import Banks
from pnp_batch.stages.work import Context, Events, Item, Unit, items_of
from pnp_batch.store import ArtifactStore, DigestCache
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.keys import key_of

if TYPE_CHECKING:
    from pnp_batch.diffusion.model import DiffusionModel
    from pnp_batch.evaluation.gate import Gate

log = logging.getLogger(__name__)

ATTEMPT_STAGES = tuple(name for name in STAGES if name != "assemble")  # of the gate's attempts: they are not exported

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Worker:
    """Makes packages on one device. Holds the model, loaded when first needed.

    Args:
        manifest: What to do.
        checkpoint: Its model.
        events: Who is told.
        fail_fast: Whether the stages of a package end once something in it failed for good.
        rows: Who takes the rows of `metadata.jsonl`; the file itself if omitted.
    """

    def __init__(
        self,
        manifest: Manifest,
        checkpoint: Checkpoint,
        events: Events,
        fail_fast: bool = False,
        rows: Rows | None = None,
    ) -> None:
        self.manifest, self.checkpoint, self.events, self.fail_fast = manifest, checkpoint, events, fail_fast
        self.store = ArtifactStore(manifest.store)
        self.digests = DigestCache(manifest.store / "digests")
        self.outputs = Outputs(manifest.output, rows)
        self.ledger = ledger_of(manifest)
        self._load = cache(self._load_model)

    @cached_property
    def context(self) -> Context:
        """The context of the stages; costs reading the model's files once, if they changed."""
        run = self.manifest.run
        device = self.device_type
        return Context(
            store=self.store,
            digests=self.digests,
            checkpoint=self.checkpoint,
            fingerprint=fingerprint(self.checkpoint, self.digests),
            dtype=run.dtype_on(device),
            device=device,
            load=self._load,
            outputs=self.outputs,
            events=self.events,
            ledger=self.ledger,
            batch_size=None if run.batch_size == "auto" else run.batch_size,
            checkpoint_seconds=run.checkpoint_seconds,
            measure=run.reconstruction == "measured",
            rule=lambda: self.rule,
            banks=Banks(run.bank, run.bank_compression, run.bank_budget),
        )

    @cached_property
    def rule(self) -> Rule | None:
        """What the quality gate asks for.

        Raises:
            EnvironmentFailure: The weights that it measures with are not here and cannot be had.
        """
        if self.manifest.quality is None:
            return None
        from pnp_batch.evaluation.rule import rule_of

        return rule_of(self.manifest, self.digests)

    @cached_property
    def _gate(self) -> Gate:
        """The quality gate; its backbones are loaded once, when first needed."""
        from pnp_batch.evaluation.gate import Gate

        return Gate(self.manifest, self.context, lambda context, jobs: self._made(context, jobs, ATTEMPT_STAGES))

    def process(self, package: Package, stages: Sequence[str] = tuple(STAGES)) -> list[Unit]:
        """Makes what is missing of a package, one part of it after the other.

        What half precision turned into NaN is tried once more in float32; what was lost to a corrupt artifact is made
        again once. Results that were in hand when workers died are given up in the end (see `ledger`).

        Args:
            package: The work.
            stages: Names of the stages to run, in order.

        Returns:
            Its results, each done or with its error; with `fail_fast` those of the parts up to the first failure.

        Raises:
            EnvironmentFailure: The machine failed; nothing is lost, and running again goes on from here.
        """
        units: list[Unit] = []
        for part in self.parts(package):
            units += self._made(self.context, part.jobs, stages)
            if self.fail_fast and any(unit.error is not None for unit in units):
                break
        return units

    def is_done(self, package: Package) -> bool:
        """Whether nothing of a package is to be computed or written, as far as can be told without decoding a picture."""
        items = items_of(package.jobs, self.context)
        asked = (
            items[:1] if items[0].job.window is not None else items
        )  # a video is out for all of its frames or for none
        return all(item.knows_key() for item in items) and all(
            self._is_out(unit) for item in asked for unit in item.units
        )

    def _is_out(self, unit: Unit) -> bool:
        if unit.item.job.window is not None:
            name = videos.name_of(self.context, unit)
        elif result := unit.result():
            name = self.outputs.name(unit.item.job.source.stem, unit.translation.prompt, result.key)
        else:
            return False
        return name is not None and self.outputs.has(name)

    def parts(self, package: Package) -> list[Package]:
        """The pieces into which a package may be cut without changing a byte of its results."""
        context = self.context
        pieces = parts(context, [Item(job, context) for job in package.jobs])
        return [Package(package.index, tuple(item.job for item in piece)) for piece in pieces]

    def _made(self, context: Context, jobs: Sequence[Job], stages: Sequence[str]) -> list[Unit]:
        items = self._run_stages(context, jobs, stages)
        units = _by_id(items)
        for again in (self._after_corruption(context, items, stages), self._in_float32(context, items, stages)):
            units |= _by_id(again)
        return list(units.values())

    def _run_stages(self, context: Context, jobs: Iterable[Job], stages: Sequence[str]) -> list[Item]:
        items = items_of(jobs, context)
        readable = read.run(context, items)
        if any(item.job.is_joint for item in items) and len(readable) < len(items):
            readable = []  # a window lacks a frame, which has failed
        for name in stages:
            is_to_end = self.fail_fast and any(unit.is_given_up for item in items for unit in item.units)
            if is_to_end and name != "assemble":  # what was computed is still written
                continue
            STAGES[name](context, [item for item in readable if not item.failed])
            _share_failures(readable)
            if name == "translate" and context.rule() is not None:
                self._settle([unit for item in readable if item.job.window is None for unit in item.units])
        if "assemble" not in stages and any(item.job.window is not None for item in items):
            self._look_for_videos(items)
        return items

    def _look_for_videos(self, items: Sequence[Item]) -> None:
        """Where nothing is assembled in this run, a video may be there all the same."""
        for number, unit in enumerate(items[0].units):
            is_out = unit.error is None and self._is_out(unit)
            for item in items:
                item.units[number].is_assembled = is_out

    def _settle(self, units: Sequence[Unit]) -> None:
        """Has results judged; where all have their verdict, nothing is loaded."""
        there = [unit for unit in units if unit.error is None and unit.find() is not None]
        if any(unit.result() is None for unit in there):
            self._gate.settle(there)
        for verdict in (unit.verdict for unit in there if unit.error is None):
            if verdict is not None:
                self.events.made(verdict.word, 1)
                self.events.made("saved", int(verdict.word == PASSED and verdict.attempt > 0))

    def _after_corruption(self, context: Context, items: Sequence[Item], stages: Sequence[str]) -> list[Item]:
        """All of the jobs, not just those that it happened to: lost results are made again with the others of their batches."""
        if not any(isinstance(unit.error, CorruptArtifact) for item in items for unit in item.units):
            return []
        return self._run_stages(context, [item.job for item in items], stages)

    def _in_float32(self, context: Context, items: Sequence[Item], stages: Sequence[str]) -> list[Item]:
        jobs = _jobs_with(items, lambda unit: unit.needs_float32)
        if not jobs:
            return []
        results = counted(sum(len(job.translations) for job in jobs), "result is", "results are")
        self.events.note(f"{results} not finite in {context.dtype}; trying float32")
        again = self._run_stages(replace(context, dtype="float32"), jobs, stages)
        halves = {(unit.id, item.job.place): unit for item in items for unit in item.units}
        for unit in (unit for item in again for unit in item.units):
            if unit.error is None and unit.find():
                half = halves[unit.id, unit.item.job.place].key
                self.store.publish("translate", half, {}, {"fallback": unit.key, "dtype": "float32"})
        if "assemble" in stages and any(job.window is not None for job in jobs):
            self._assemble_videos(context, jobs, again)
        return again

    def _assemble_videos(self, context: Context, jobs: Sequence[Job], again: Sequence[Item]) -> None:
        """The other windows of a video are there in half precision, under keys that a float32 context does not know."""
        items = items_of(jobs, context)
        STAGES["assemble"](context, items)
        is_assembled = {(unit.id, item.job.place): unit.is_assembled for item in items for unit in item.units}
        for unit in (unit for item in again for unit in item.units):
            unit.is_assembled = unit.is_assembled or is_assembled[unit.id, unit.item.job.place]

    @cached_property
    def device_type(self) -> str:
        """`cpu` or `cuda`; torch is asked only where there could be a GPU, since importing it takes seconds.

        A device that the manifest names decides the keys also where this machine has none, as that of a cluster's workers does;
        whether it is here is asked when the model is loaded.
        """
        wanted = self.manifest.run.device
        if (elsewhere := self.manifest.run.device_elsewhere) is not None:
            return elsewhere
        if wanted != "auto":
            return wanted.partition(":")[0]
        if not NVIDIA_DRIVER.exists():
            return "cpu"
        from pnp_batch.diffusion.model import pick_device

        return pick_device(wanted).type

    @property
    def is_at_work_here(self) -> bool:
        """Whether this machine has the kind of device that the work is done on, so that it can tell how long that takes."""
        return self.device_type == "cpu" or NVIDIA_DRIVER.exists()

    def _load_model(self, dtype: str) -> DiffusionModel:
        from pnp_batch.diffusion.model import load_model, pick_device

        begin = time.monotonic()
        model = load_model(self.checkpoint, pick_device(self.manifest.run.device), dtype)
        log.info("loaded %s in %s on %s in %.1f s", self.checkpoint.name, dtype, model.device, time.monotonic() - begin)
        return model


def ledger_of(manifest: Manifest) -> Ledger:
    """The attempt ledger of an output folder."""
    return Ledger(manifest.output / "ledger", manifest.run.max_attempts, manifest.run.unit_timeout)


class Silent:
    """Events that nobody watches."""

    def step(self, rows: int) -> None:
        """UNet rows were computed."""

    def made(self, stage: str, count: int) -> None:
        """A stage made artifacts or files."""

    def note(self, message: str) -> None:
        """Something a person should know."""


def seconds_per_row_cell(plan: Plan, worker: Worker) -> float | None:
    """Seconds of one UNet row per latent cell, from one timed pass at the first readable picture's geometry."""
    item = _first_readable(plan, worker)
    if item is None or item.job.size is None:
        return None
    cells = item.job.size[0] * item.job.size[1] // plan.checkpoint.cell**2
    size, model = item.job.size, worker.context.model
    rows = 2 * min(worker.context.batch_of(item), plan.limit or MAX_BATCH)
    return at_most(rows, lambda rows: model.seconds_per_pass(size, rows) / (rows * cells))


def bank_forecast(plan: Plan, worker: Worker) -> list[str]:
    """What banks would take and save, measured at the first readable picture, and which place the manifest's mode takes."""
    item = _first_readable(plan, worker)
    if item is None or not bank.extent_of(item).steps:
        return ["off (nothing is injected)"]
    return bank.forecast(worker.context, item, sum(1 for _ in plan.jobs()))


def _first_readable(plan: Plan, worker: Worker) -> Item | None:
    job = next((job for job in plan.jobs() if job.size is not None), None)
    return None if job is None else Item(job, worker.context)


def fingerprint(checkpoint: Checkpoint, digests: DigestCache) -> str:
    """The model's identity in keys: the bytes of its weights and configs, wherever they lie."""
    content = {}
    for path in checkpoint.weight_files():
        name = "weights" if path == checkpoint.weights else f"{path.parent.name}/{path.name}"
        content[name] = digests.of(path, "bytes", partial(_digest_of, path))
    return key_of(content)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _share_failures(items: Sequence[Item]) -> None:
    """Two files with the same pixels are computed once; where that failed, it failed for both."""
    units = [unit for item in items for unit in item.units]
    failed = {unit.key: unit for unit in units if unit.error is not None}
    for unit in units:
        twin = failed.get(unit.key)
        if twin is not None and twin.error is not None and unit.error is None and unit.find() is None:
            unit.fail(twin.stage, twin.error)


def _by_id(items: Iterable[Item]) -> dict[str, Unit]:
    """Units by what they are called; the frames of a video are called the same, and a failed one speaks for them."""
    units: dict[str, Unit] = {}
    for unit in (unit for item in items for unit in item.units):
        if unit.id not in units or units[unit.id].error is None:
            units[unit.id] = unit
    return units


def _jobs_with(items: Sequence[Item], wanted: Callable[[Unit], bool]) -> list[Job]:
    """The jobs of some items, cut down to the translations that are wanted; of a video for all frames of the package."""
    jobs = []
    frames = {unit.id for item in items if item.job.window for unit in item.units if wanted(unit)}
    for item in items:
        translations: tuple[Translation, ...] = tuple(
            unit.translation for unit in item.units if wanted(unit) or unit.id in frames
        )
        if translations:
            jobs.append(replace(item.job, translations=translations))
    return jobs
