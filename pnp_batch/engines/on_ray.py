"""Engine `ray`: one long-lived worker per device, on this machine or on a Ray cluster.

A loop of our own over `ray.wait`, one package in flight per worker, and no retries by Ray: the attempt ledger decides what is
tried again. (`ActorPool` stops at the first exception; Ray Data begins a package that kills its worker again and again.)
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil

from pnp_batch.engines.devices import gpus_needed, visible_as, visible_gpus, workers_on
from pnp_batch.engines.driver import Driver, driving, rows_of
from pnp_batch.engines.orphans import descendants, no_orphans
from pnp_batch.engines.remote import RemoteWorker, Report
from pnp_batch.engines.run import Run, Summary
from pnp_batch.engines.schedule import Schedule
from pnp_batch.errors import EnvironmentFailure
from pnp_batch.interrupts import interruptible
from pnp_batch.manifest import Manifest
from pnp_batch.names import counted
from pnp_batch.plan import Package, package_to_json
from pnp_batch.runner import Silent, Worker

# Before Ray is imported: it reports its use to its makers by default, and looks for a cloud's metadata to do so.
NOWHERE = "http://127.0.0.1:9"
PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": NOWHERE,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A frozen node is noticed after some 15 s instead of a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
os.environ.update({name: os.environ.get(name, value) for name, value in PRIVATE.items()})

import ray  # noqa: E402
from ray._private import ray_constants  # noqa: E402
from ray._private.ray_constants import ENABLE_RAY_CLUSTERS_ENV_VAR  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.5
DRAIN_SECONDS = 10.0
NODE_PATIENCE_SECONDS = 300.0
START_ATTEMPTS = 3
VISIBLE = "CUDA_VISIBLE_DEVICES"
OBJECT_STORE_BYTES = 100_000_000  # nothing but short texts goes through it


@dataclass
class Hand:
    """One worker as the driver sees it.

    Attributes:
        actor: Ray's handle.
        token: Ends its name in the ledger.
        name: What a person calls it.
        package: What it has in hand; None while it starts.
    """

    actor: Any
    token: str
    name: str
    package: Package | None = None


def run_ray(run: Run) -> Summary:
    """Makes everything a plan names that is not there yet, on many devices.

    Raises:
        EnvironmentFailure: The cluster cannot do it, or another run works in the folder.
    """
    with driving(run) as driver, _cluster(run) as crew:
        with interruptible():  # again: `ray.init` puts handlers of its own in the place of ours
            Loop(driver, crew).go()
        driver.finish()
        return driver.summary(driver.corrupt)


@dataclass(frozen=True)
class Crew:
    """The workers to start.

    Attributes:
        count: How many.
        resources: Of each, as `actor.options` takes them.
        device: `cpu` or `cuda`.
        threads: CPU threads of each.
    """

    count: int
    resources: dict[str, Any]
    device: str
    threads: int


@contextmanager
def _cluster(run: Run) -> Iterator[Crew]:
    """A Ray of this run alone, or the one at `ray.address`; gives the workers that it can hold."""
    manifest = run.plan.manifest
    alone = manifest.run.ray.address is None
    before = descendants()
    if alone:
        _start(manifest, before)
    else:
        _init(_remote(manifest))
    with no_orphans(descendants() - before):
        try:
            yield _crew(run)
        finally:
            ray.shutdown()


def _start(manifest: Manifest, before: Collection[psutil.Process]) -> None:
    """Starts a Ray for this run alone; again where the machine is so busy that it is not up in the time that it gives itself."""
    options = _local(manifest)
    for attempt in range(START_ATTEMPTS):
        try:
            with _environment(manifest):
                _init(options)
            return
        except EnvironmentFailure as failure:
            for process in descendants() - set(before):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if attempt + 1 == START_ATTEMPTS:
                raise
            log.warning("%s; trying again", failure)


def _init(options: dict[str, Any]) -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace=secrets.token_hex(8), **options)
    except Exception as error:  # a bare one where a server of Ray's is late
        ray.shutdown()
        raise EnvironmentFailure(f"Ray cannot be reached or started: {_first_line(error)}") from error


@contextmanager
def _environment(manifest: Manifest) -> Iterator[None]:
    """What Ray starts within the block sees the GPUs of this run, listens on the loopback address only and sends nothing out.

    On Linux Ray takes 127.0.0.1 for a mistake, unless told that there are no clusters, as on a Mac. Without a dashboard and with
    usage reports off it still asks for a cloud's metadata, with plain HTTP: that goes to a proxy that is not there.
    """
    changed = {ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "http_proxy": NOWHERE, "no_proxy": "127.0.0.1,localhost"}
    if isinstance(manifest.run.devices, tuple):
        changed[VISIBLE] = visible_as(manifest.run.devices, os.environ.get(VISIBLE))
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    ray_constants.ENABLE_RAY_CLUSTER, clusters = False, ray_constants.ENABLE_RAY_CLUSTER  # read when Ray was imported
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _local(manifest: Manifest) -> dict[str, Any]:
    """Options of `ray.init` for a Ray of this run alone, on this machine and for nobody else."""
    spec = manifest.run.ray
    gpus = gpus_needed(manifest.run, visible_gpus())
    count = manifest.run.devices_wanted or workers_on(gpus, spec.num_gpus or 1) or 1
    return {
        "num_cpus": max(count * spec.num_cpus, os.cpu_count() or 1),
        "num_gpus": gpus,
        "resources": {name: amount * count for name, amount in spec.resources},
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
    }


def _remote(manifest: Manifest) -> dict[str, Any]:
    """Options of `ray.init` for a cluster that is there."""
    if isinstance(manifest.run.devices, tuple):
        raise EnvironmentFailure("numbers of GPUs belong to one machine; on a Ray cluster write how many: `devices: N`")
    return {"address": manifest.run.ray.address}


def _crew(run: Run) -> Crew:
    """How many workers of what kind, checked against the cluster: Ray waits for ever for what it does not have.

    Raises:
        EnvironmentFailure: The cluster cannot hold them.
    """
    manifest = run.plan.manifest
    spec, wanted, there = manifest.run.ray, manifest.run.devices_wanted, _resources()
    gpus = spec.num_gpus if spec.num_gpus is not None else float(there.get("GPU", 0) > 0)
    needs = {"CPU": float(spec.num_cpus), "GPU": float(gpus), **dict(spec.resources)}
    rooms = [int(there.get(name, 0) / amount) for name, amount in needs.items() if amount and name != "GPU"]
    if gpus:
        rooms.append(workers_on(there.get("GPU", 0), gpus))
    room = min(rooms)
    if wanted is None and not gpus:
        raise EnvironmentFailure(
            f"the Ray cluster shows no GPU; say how many CPU workers with `devices: N` ({room} fit)"
        )
    count = room if wanted is None else wanted
    if not 1 <= count <= room:
        listed = ", ".join(f"{there.get(name, 0):g} {name}" for name in needs)
        each = ", ".join(f"{n:g} {name}" for name, n in needs.items() if n)
        raise EnvironmentFailure(
            f"{counted(max(count, 1), 'worker')} of {each} asked for; the cluster has {listed}, room for {room}"
        )
    resources = {"num_cpus": spec.num_cpus, "num_gpus": gpus, "resources": dict(spec.resources)}
    return Crew(count, resources, "cuda" if gpus else "cpu", max(int(spec.num_cpus), 1))


class Loop:
    """Hands packages to workers until all are settled."""

    def __init__(self, driver: Driver, crew: Crew) -> None:
        self.driver, self.crew, self.run = driver, crew, driver.run
        plan, manifest = self.run.plan, self.run.plan.manifest
        theirs = manifest.run.ray.model_copy(update={"num_gpus": crew.resources["num_gpus"]})
        cutter = Worker(manifest.with_run({"devices": crew.device, "ray": theirs}), plan.checkpoint, Silent())
        driver.note_dtype(cutter)  # which tells the model's fingerprint once, here: the workers find it noted
        self.schedule = Schedule(
            plan.packages(),
            cutter.parts,
            lambda package: rows_of(self.run, package),
            driver.monitor.state.rows_total,
            crew.count,
        )
        self.flying: dict[Any, Hand] = {}
        self.idle: list[Hand] = []
        self.hired = 0
        self.last_answer = time.monotonic()

    def go(self) -> None:
        """Works until nothing is left.

        Raises:
            EnvironmentFailure: The workers die of nothing in particular, or there is no node left.
            ModelError: The model cannot be used.
        """
        try:
            for _ in range(self.crew.count):
                self._hire()
            while self._is_busy() or (self.schedule.has_more() and not self.driver.is_stopped):
                self._wait()
        except KeyboardInterrupt:
            self._drain()
            raise
        finally:
            self.driver.watch_workers(force=True)

    def _is_busy(self) -> bool:
        return any(hand.package for hand in self.flying.values())

    def _hire(self) -> None:
        """Starts a worker. It gets its first package when it is ready: it may have to wait for a node."""
        token, self.hired = secrets.token_hex(4), self.hired + 1
        name = f"worker {self.hired}"
        spec = self.driver.spec(self.crew.device, name, token, self.crew.threads)
        remote_class: Any = ray.remote(_Actor)
        actor = remote_class.options(max_restarts=0, max_task_retries=0, **self.crew.resources).remote(spec.to_json())
        self.flying[actor.ready.remote()] = Hand(actor, token, name)

    def _wait(self) -> None:
        done, _ = ray.wait(list(self.flying), num_returns=1, timeout=WAIT_SECONDS)
        self.driver.watch_workers()
        for future in done:
            hand = self.flying.pop(future)
            try:
                self._answered(hand, ray.get(future))
            except RayTaskError:
                raise  # an error of ours, in the worker
            except RayError as error:  # it died, was killed for want of memory, or its node is gone
                ray.kill(hand.actor)
                self._died(hand, _first_line(error))
        if not done and not self._is_busy() and time.monotonic() - self.last_answer > NODE_PATIENCE_SECONDS:
            raise EnvironmentFailure(
                f"no worker could be started for {NODE_PATIENCE_SECONDS:.0f} s; the cluster has {_resources()}"
            )

    def _answered(self, hand: Hand, answer: str) -> None:
        self.last_answer = time.monotonic()
        if hand.package is not None:
            report = Report.from_json(answer)
            if report.failure is not None or (report.interrupted and not self.driver.is_stopped):
                ray.kill(hand.actor)
                self._died(hand, report.failure or "it was interrupted")
                return
            self.driver.take(hand.package, report)
            self.schedule.settled()
        if self.driver.is_stopped:
            self.driver.ask_to_stop()
        self._offer(hand)

    def _offer(self, hand: Hand) -> None:
        """The next package for a worker, if there is one."""
        hand.package = None if self.driver.is_stopped else self.schedule.take()
        if hand.package is None:
            self.idle.append(hand)
        else:
            self.flying[hand.actor.process.remote(package_to_json(hand.package))] = hand

    def _died(self, hand: Hand, cause: str) -> None:
        log.warning("%s died: %s", hand.name, cause)
        self.driver.monitor.note(f"{hand.name} died ({cause[:200]}); what it had in hand goes to another one")
        blamed = self.driver.bury({hand.token}, cause)
        self.schedule.died(hand.package, blamed, cause)
        if self.idle:
            self._offer(self.idle.pop())
        else:
            self._hire()

    def _drain(self) -> None:
        """Lets the workers stop at their next step, so that nothing of what they had in hand counts as a strike."""
        self.driver.ask_to_stop()
        busy = {future: hand for future, hand in self.flying.items() if hand.package}
        end = time.monotonic() + DRAIN_SECONDS
        while busy and time.monotonic() < end:
            done, _ = ray.wait(list(busy), num_returns=1, timeout=WAIT_SECONDS)
            for future in done:
                hand = busy.pop(future)
                try:
                    self.driver.take_rows(Report.from_json(ray.get(future)))
                except RayError as error:
                    log.warning("%s died while it was asked to stop: %s", hand.name, _first_line(error))


class _Actor:
    """A remote worker as Ray starts it."""

    def __init__(self, spec: str) -> None:
        self.worker = RemoteWorker(spec)

    def ready(self) -> str:
        """Answers when the worker is there."""
        return ""

    def process(self, package: str) -> str:
        """See `RemoteWorker.process`."""
        return self.worker.process(package)


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
