"""Looking at a run from outside: what is done, what is left and what that will cost. Computes nothing, changes nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pnp_batch.failures import FailureList, Row
from pnp_batch.inputs import PROGRESS_FILE, Translation
from pnp_batch.leftovers import wanted
from pnp_batch.manifest import Manifest
from pnp_batch.monitor import WorkerState
from pnp_batch.plan import TRAJECTORY_SETTINGS, Estimate, Job, Plan
from pnp_batch.runner import Silent, Worker, ledger_of
from pnp_batch.stages import videos
from pnp_batch.stages.work import Item, Unit, items_of
from pnp_batch.store.files import is_alive
from pnp_batch.store.keys import sha256

LARGE = 20_000  # results from which on looking at every one of them takes more than a few seconds

DTYPES = ("float32", "float16", "bfloat16")  # that results may have been computed in

BEFORE_TRAJECTORY = ("read", "invert")  # stages of failures

STALE_SECONDS = 600.0  # a run on another machine that has not written its progress for so long is not going on


@dataclass
class Survey:
    """Counts of a plan as the store has it.

    Attributes:
        sources: Guidance images in the plan; a video is one.
        trajectories: Of them one for each set of settings that decides it, and for each frame.
        inverted: Of the trajectories those that are there.
        not_inverted: Of the trajectories those whose results all failed before it was there, as `failures.jsonl` says.
        translations: Results in the plan.
        translated: Of them with a picture in the store.
        assembled: Of them with a file in the output folder.
        failed: Of them listed in `failures.jsonl`.
        judged: Of them by the quality gate's verdict; empty where there is no gate.
        unjudged: Pictures that have no verdict yet (videos get none).
        quarantined: Units (pictures or results) that took their workers down too often.
        leftovers: Results in the output folder that the manifest does not ask for any more.
        left: What the rest costs.
        retries: What the gate costs at most: every retry of everything that has no verdict yet.
    """

    sources: int = 0
    trajectories: int = 0
    inverted: int = 0
    not_inverted: int = 0
    translations: int = 0
    translated: int = 0
    assembled: int = 0
    failed: int = 0
    judged: dict[str, int] = field(default_factory=dict)
    unjudged: int = 0
    quarantined: int = 0
    leftovers: int = 0
    left: Estimate = field(default_factory=Estimate)
    retries: Estimate = field(default_factory=Estimate)


def as_last_run(plan: Plan) -> Plan:
    """A plan to look at results with: where its dtype is `auto`, that of the last run.

    That run may have had a GPU where this machine has none, or the other way round, and its dtype is in the keys.
    """
    run, worker = plan.manifest.run, Worker(plan.manifest, plan.checkpoint, Silent())
    noted = (progress(plan.manifest.output) or {}).get("dtype") if run.dtype == "auto" else None
    changed = {"dtype": noted or run.dtype_on(worker.device_type)}
    if not worker.is_at_work_here:
        changed["devices"] = "auto"  # measuring and looking inside are done with what there is
    return replace(plan, manifest=plan.manifest.with_run(changed))


def survey(plan: Plan, worker: Worker) -> Survey:
    """Counts what is there. Pictures that were never decoded are not decoded now: nothing of them can be done."""
    result = Survey()
    failed = FailureList(plan.manifest).rows
    whole: dict[str, bool] = {}  # by video, whether all frames so far are there
    sources: set[int] = set()  # hashes: of a million pictures the names would fill memory
    for package in plan.packages():
        sources.update(hash(job.source.place) for job in package.jobs)
        items = items_of(package.jobs, worker.context)
        if package.jobs[0].window is None:
            for item in items:
                _count(result, item, plan, worker, failed)
        else:
            _count_frames(result, items, plan, worker, failed, whole)
    result.sources = len(sources)
    result.quarantined = len(worker.ledger.quarantined())
    if worker.outputs.row_count() > result.assembled:
        result.leftovers = wanted(plan, worker.context).leftovers(worker.outputs)
    return result


def _failed_to_invert(item: Item, listed: Mapping[str, Row]) -> bool:
    """Whether all results of a picture without a trajectory are listed as failed on the way to one."""
    rows = [listed.get(unit.id) for unit in item.units]
    return all(row is not None and row["stage"] in BEFORE_TRAJECTORY for row in rows)


def _count(result: Survey, item: Item, plan: Plan, worker: Worker, listed: Mapping[str, Row]) -> None:
    """Counts a picture and its results."""
    job = item.job
    known = item.knows_key()
    has_trajectory = known and _is_there(worker, "invert", item.key)
    result.inverted += has_trajectory
    result.not_inverted += not has_trajectory and _failed_to_invert(item, listed)
    missing, open_ = [], []
    for unit in item.units:
        done = known and _is_there(worker, "translate", unit.key)
        stands = unit.result() if done else None
        result.translated += done
        result.assembled += stands is not None and worker.outputs.has(
            worker.outputs.name(job.source.stem, unit.translation.prompt, stands.key)
        )
        result.failed += unit.id in listed and stands is None
        if unit.verdict is not None:
            result.judged[unit.verdict.word] = result.judged.get(unit.verdict.word, 0) + 1
        if not done:
            missing.append(unit.translation)
        if stands is None:
            open_.append(unit.translation)
    result.trajectories += 1
    result.translations += len(item.units)
    if missing:
        result.left.add(replace(job, translations=tuple(missing)), plan.checkpoint, has_trajectory=has_trajectory)
    result.unjudged += len(open_)
    _add_retries(result.retries, plan, job, open_)


def _count_frames(
    result: Survey, items: Sequence[Item], plan: Plan, worker: Worker, listed: Mapping[str, Row], whole: dict[str, bool]
) -> None:
    """Counts the trajectories of a window's frames, and at the end of a clip its videos as results.

    The key of a frame that is translated with its window is known once all of them are.
    """
    known = [item.knows_key() for item in items]
    for item, knows in zip(items, known, strict=True):
        job, missing = item.job, []
        has_trajectory = knows and _is_there(worker, "invert", item.key)
        result.trajectories += not job.is_repeat
        result.inverted += has_trajectory and not job.is_repeat
        result.not_inverted += not (has_trajectory or job.is_repeat) and _failed_to_invert(item, listed)
        for unit in item.units:
            done = (all(known) if job.is_joint else knows) and _is_there(worker, "translate", unit.key)
            whole[unit.id] = whole.get(unit.id, True) and done
            if not done:
                missing.append(unit.translation)
            if job.is_last:
                name = videos.name_of(worker.context, unit) if whole[unit.id] else None
                result.translations += 1
                result.translated += whole[unit.id]
                result.assembled += name is not None and worker.outputs.has(name)
                result.failed += unit.id in listed and name is None
        if missing:
            left = replace(job, translations=tuple(missing))
            result.left.add(left, plan.checkpoint, has_trajectory=has_trajectory)


def _add_retries(estimate: Estimate, plan: Plan, job: Job, translations: Sequence[Translation]) -> None:
    """What it costs to make some results of a job with every retry of the quality gate."""
    for other in plan.retries(job.source, translations):
        same = all(getattr(other.settings, name) == getattr(job.settings, name) for name in TRAJECTORY_SETTINGS)
        estimate.add(other, plan.checkpoint, has_trajectory=same)


def keys_in_use(plan: Plan, worker: Worker) -> Iterator[str]:
    """Keys of all artifacts that a plan names; pictures whose digest is not known are decoded to tell theirs.

    Those of every dtype, whatever the manifest and this machine say: another machine may have made what is here.

    Raises:
        ItemError: A picture cannot be read, so that its artifacts cannot be told from unused ones.
    """
    contexts = [replace(worker.context, dtype=dtype) for dtype in DTYPES]
    for package, context in ((package, context) for package in plan.packages() for context in contexts):
        items = items_of(package.jobs, context)
        for item in items:
            yield item.key
            for unit in item.units:
                yield unit.key
                if artifact := unit.find():  # in float32, where the result fell back to that
                    yield from (artifact.key, artifact.meta["trajectory"])
                yield from _keys_of_verdict(unit)
        yield from videos.keys_of(context, items)


def _keys_of_verdict(unit: Unit) -> Iterator[str]:
    """The verdict on a result, all that was tried for it, and what that was made from."""
    rule, own = unit.item.context.rule(), unit.find()
    if rule is None or own is None or unit.result() is None or unit.verdict is None:
        return
    yield rule.key(own)
    for key in unit.verdict.tried:
        yield key
        if attempt := unit.item.context.store.find("translate", key):
            yield attempt.meta["trajectory"]


def _is_there(worker: Worker, stage: str, key: str) -> bool:
    return (worker.store.folder(stage, key) / "meta.json").exists()


def workers(manifest: Manifest) -> list[WorkerState]:
    """The workers in other processes that are at work, whether or not the process that started them still lives."""
    ledger = ledger_of(manifest)
    beats = (beat for writer, beat in ledger.workers().items() if not ledger.is_dead(writer))
    return sorted((WorkerState.of(beat) for beat in beats), key=lambda worker: worker.name)


def content_digest(manifest: Manifest) -> str:
    """Of what a manifest asks for, so that a run's own count is not taken for that of another manifest."""
    return sha256(manifest.model_dump_json(exclude={"run"}, warnings=False).encode())


def counted_by_run(manifest: Manifest) -> Mapping[str, Any] | None:
    """What a run counts of a large plan while it goes on, or counted when it went through; else every result is to be looked at.

    A plan of a million results is not even listed then, so pictures that were added to a folder since are not known.
    """
    last = progress(manifest.output)
    if last is None or not last.get("whole") or last["translations"] < LARGE:
        return None
    is_through = last["done"] + last["failed"] == last["translations"]
    known = (last["running"] or is_through) and last.get("manifest") == content_digest(manifest)
    return last if known else None


def progress(output: Path) -> Mapping[str, Any] | None:
    """The progress file of the last run, with `running`: whether it still goes on. None where nothing ever ran."""
    try:
        content = json.loads((output / PROGRESS_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    fresh = time.time() - content["updated"] < STALE_SECONDS
    if content["host"] == socket.gethostname():
        fresh = is_alive(content["pid"])
    return {**content, "running": not content["ended"] and fresh}
