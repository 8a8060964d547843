"""Looking at a run from outside: what is done, what is left and what that will cost. Computes nothing, changes nothing."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pnp_batch.failures import FailureList
from pnp_batch.monitor import PROGRESS_FILE
from pnp_batch.plan import Estimate, Job, Plan, pixels_of
from pnp_batch.runner import Worker
from pnp_batch.stages.work import Item
from pnp_batch.store.files import is_alive

STALE_SECONDS = 600.0  # a run on another machine that has not written its progress for so long is not going on


@dataclass
class Survey:
    """Counts of a plan as the store has it.

    Attributes:
        sources: In the plan.
        inverted: Of them with a trajectory.
        translations: Results in the plan.
        translated: Of them with a picture in the store.
        assembled: Of them with a file in the output folder.
        failed: Of them listed in `failures.jsonl`.
        left: What the rest costs.
    """

    sources: int = 0
    inverted: int = 0
    translations: int = 0
    translated: int = 0
    assembled: int = 0
    failed: int = 0
    left: Estimate = field(default_factory=Estimate)


def survey(plan: Plan, worker: Worker) -> Survey:
    """Counts what is there. Pictures that were never decoded are not decoded now: nothing of them can be done."""
    result = Survey()
    failed = FailureList(plan.manifest).rows
    for job in plan.jobs():
        item = Item(job, worker.context)
        known = _knows_key(job, worker)
        has_trajectory = known and _is_there(worker, "invert", item.key)
        result.inverted += has_trajectory
        missing = []
        for unit in item.units:
            done = known and _is_there(worker, "translate", unit.key)
            result.translated += done
            result.assembled += done and worker.outputs.has_file(
                worker.outputs.name(job.source.stem, unit.translation.prompt, unit.result_key)
            )
            result.failed += unit.id in failed and not done
            if not done:
                missing.append(unit.translation)
        result.sources += 1
        result.translations += len(item.units)
        if missing:
            result.left.add(replace(job, translations=tuple(missing)), plan.checkpoint, has_trajectory=has_trajectory)
    return result


def keys_in_use(plan: Plan, worker: Worker) -> Iterator[str]:
    """Keys of all artifacts that a plan names; pictures whose digest is not known are decoded to tell theirs.

    Raises:
        ItemError: A picture cannot be read, so that its artifacts cannot be told from unused ones.
    """
    for job in plan.jobs():
        item = Item(job, worker.context)
        yield item.key
        for unit in item.units:
            yield unit.key
            if artifact := unit.find():  # in float32, where the result fell back to that
                yield from (artifact.key, artifact.meta["trajectory"])


def _knows_key(job: Job, worker: Worker) -> bool:
    """Whether the key can be told without decoding the picture."""
    path = job.source.path
    if path is None:
        return True
    return job.size is not None and path.exists() and worker.digests.get(path, pixels_of(job.size)) is not None


def _is_there(worker: Worker, stage: str, key: str) -> bool:
    return (worker.store.folder(stage, key) / "meta.json").exists()


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
