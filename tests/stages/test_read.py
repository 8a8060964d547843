"""Guidance pictures that are decoded at once: the real decoders, without a model."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from running import TINY_SD, Project

from pnp_batch.checkpoint import resolve
from pnp_batch.errors import ItemError
from pnp_batch.ledger import Ledger, unit_name
from pnp_batch.manifest import load_manifest
from pnp_batch.media.images import load_rgb
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.stages import read
from pnp_batch.stages.work import READ, Item, items_of

BROKEN = ("03.png", "04.png", "17.png")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    project = Project(tmp_path)
    for i in range(20):
        project.picture(f"{i:02}.png", i, size=(96, 80))
    return project.write([{"images": "*.png", "prompts": ["a toy"]}])


def worker_of(project: Project) -> tuple[Worker, list[Item]]:
    """A worker and what it has to do."""
    manifest = load_manifest(project.manifest)
    worker = Worker(manifest, resolve(str(TINY_SD), project.folder), Silent())
    jobs = itertools.chain.from_iterable(package.jobs for package in Plan(manifest, worker.checkpoint).packages())
    return worker, items_of(jobs, worker.context)


def test_torn_pictures_fail_and_the_others_are_read(project: Project) -> None:
    for name in BROKEN:
        path = project.folder / name
        path.write_bytes(path.read_bytes()[:-300])
    worker, items = worker_of(project)
    readable = read.run(worker.context, items)
    assert readable == [item for item in items if item.job.source.stem.name + ".png" not in BROKEN]
    for item in items:
        (unit,) = item.units
        assert item.failed == (item not in readable)
        assert unit.stage == ("read" if item.failed else "") and isinstance(unit.error, ItemError) == item.failed
    assert not list(worker.ledger.marks())


def test_pixels_and_keys_are_those_of_pictures_read_one_by_one(project: Project) -> None:
    worker, items = worker_of(project)
    assert read.run(worker.context, items) == items
    _, alone = worker_of(project)
    assert [item.key for item in items] == [item.key for item in alone]
    again, known = worker_of(project)  # digests are known now, pixels are decoded when they are needed
    for pixels, item in zip(read.pixels_of(again.context, known), items, strict=True):
        assert item.job.source.path is not None
        assert np.array_equal(pixels, load_rgb(item.job.source.path, (64, 64))) and np.array_equal(pixels, item.pixels)


def test_a_picture_that_took_its_worker_down_too_often_is_refused_and_those_in_hand_with_it_are_read(
    project: Project,
) -> None:
    worker, items = worker_of(project)
    guilty = items[2]
    with ExitStack() as workers_at_work:
        for number in range(3):
            dead = Ledger(worker.ledger.root)
            dead.writer = f"elsewhere-{number}-cafe0000"
            workers_at_work.enter_context(dead.attempt([unit_name(READ, guilty.place)]))
            dead.bury(dead.writer, "a decoder crashed")
        assert read.run(worker.context, items) == [item for item in items if item is not guilty]
    assert "quarantined" in str(guilty.units[0].error)
