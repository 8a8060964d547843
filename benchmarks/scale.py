"""A million results on a thousand workers that do not exist: the real schedule and the real attempt ledger, in virtual time.

    python benchmarks/scale.py [--workers 1000] [--results 1000000] [--plot docs/scale.svg]

A result "computes" by letting virtual time pass. Workers die at random, some are several times slower, and a few results kill
every worker that touches them. What is real: how packages are cut and handed out (`engines.schedule`), how batches are
tried again and taken apart (`stages.batches.attempt`), and every mark of the ledger, on a real disk.
"""

from __future__ import annotations

import argparse
import heapq
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pnp_batch.checkpoint import resolve
from pnp_batch.engines.schedule import Schedule
from pnp_batch.inputs import Source, Translation
from pnp_batch.ledger import Ledger
from pnp_batch.manifest import GenerateSpec, Settings, load_manifest
from pnp_batch.plan import PACKAGE_JOBS, Job, Package, package_to_json
from pnp_batch.runner import Silent, Worker
from pnp_batch.stages.batches import attempt

PROMPTS = 4
SECONDS_PER_RESULT = 1.5  # median, at full batches; lognormal around it
SECONDS_PER_INVERSION = 3.0
START_SECONDS = 60.0  # a new worker: scheduler, imports, weights
SLOW_SHARE, SLOW_FACTOR = 0.02, 4.0
HOURS_BETWEEN_DEATHS = 2.0  # of one worker
POISONED = 20
MANIFEST = """
model: builtin:shapes
output_dir: out
inputs: [{generate: {prompt: a, seed: 0}, prompts: [b]}]
run: {devices: cpu, batch_size: 16}
"""


class Death(BaseException):
    """A worker is gone."""


@dataclass(frozen=True)
class Result:
    """One unit: a number is its key."""

    number: int

    @property
    def key(self) -> str:
        return f"{self.number:016x}"[::-1]


def packages(results: int) -> Iterator[Package]:
    """The plan: generated guidance pictures with four prompts each."""
    settings = Settings().settled()
    translations = tuple(Translation(f"prompt {i}", settings, ()) for i in range(PROMPTS))
    jobs = results // PROMPTS
    for index, begin in enumerate(range(0, jobs, PACKAGE_JOBS)):
        yield Package(
            index, tuple(_job(i, settings, translations) for i in range(begin, min(begin + PACKAGE_JOBS, jobs)))
        )


def _job(number: int, settings: Settings, translations: tuple[Translation, ...]) -> Job:
    spec = GenerateSpec(prompt="a scene", seed=number)
    return Job(Source(str(number), PurePosixPath(str(number)), None, spec, ()), (512, 512), settings, translations)


class Simulation:
    """Virtual time from the first package to the last.

    Args:
        folder: Where ledger and manifest lie.
        results: How many.
        workers: How many.
    """

    def __init__(self, folder: Path, results: int, workers: int) -> None:
        (folder / "manifest.yaml").write_text(MANIFEST)
        manifest = load_manifest(folder / "manifest.yaml")
        self.worker = Worker(manifest, resolve(manifest.model, manifest.base), Silent())
        self.ledger = Ledger(folder / "ledger")
        self.random = random.Random(0)
        self.results, self.workers = results, workers
        total = results + results // PROMPTS * 2
        self.schedule = Schedule(packages(results), self.worker.parts, _cost, total, workers)
        self.done = bytearray(results)
        self.poisoned = set(self.random.sample(range(results), POISONED))
        self.given_up: list[int] = []
        self.again = self.deaths = self.pieces = 0
        self.dispatch_seconds = self.ledger_seconds = 0.0
        self.busy: list[tuple[float, float, int]] = []  # begin, end, results of a piece

    def run(self) -> float:
        """Gives the virtual seconds that the whole plan takes."""
        events = [(self.random.uniform(0, START_SECONDS), i, self._speed()) for i in range(self.workers)]
        heapq.heapify(events)
        hired, end = self.workers, 0.0
        pending: list[tuple[float, Package]] = []  # pieces of workers that will be found dead
        while events:
            now, number, speed = heapq.heappop(events)
            while pending and pending[0][0] <= now:
                self.schedule.died(pending.pop(0)[1], True, "simulated")
            begin = time.perf_counter()
            piece = self.schedule.take()
            text = package_to_json(piece) if piece else ""
            self.dispatch_seconds += time.perf_counter() - begin
            if piece is None:
                if pending:  # somebody will be found dead: this one waits for the work
                    heapq.heappush(events, (pending[0][0], number, speed))
                continue
            assert text
            self.pieces += 1
            clock = Clock(self.random, speed)
            try:
                self._compute(piece, clock, number)
                self.schedule.settled()
                heapq.heappush(events, (now + clock.seconds, number, speed))
            except Death:
                self.deaths += 1
                self.ledger.bury(self._name(number), "simulated")
                pending.append((now + clock.seconds, piece))
                pending.sort(key=lambda each: each[0])
                heapq.heappush(events, (now + clock.seconds + START_SECONDS, hired, self._speed()))
                hired += 1
            self.busy.append((now, now + clock.seconds, piece.translations))
            end = max(end, now + clock.seconds)
        return end

    def _speed(self) -> float:
        return SLOW_FACTOR if self.random.random() < SLOW_SHARE else 1.0

    @staticmethod
    def _name(number: int) -> str:
        return f"simulated-{number}-{number:08x}"

    def _compute(self, piece: Package, clock: Clock, number: int) -> None:
        """What `Worker.process` does with a piece: part by part, batch by batch, what is missing."""
        begin = time.perf_counter()
        for part in self.worker.parts(piece):
            numbers = [int(job.source.name) * PROMPTS + k for job in part.jobs for k in range(len(job.translations))]
            clock.pass_(SECONDS_PER_INVERSION * len(part.jobs) * any(not self.done[n] for n in numbers))
            for i in range(0, len(numbers), 16):
                if batch := [Result(n) for n in numbers[i : i + 16] if not self.done[n] and n not in self.given_up]:
                    self._attempt(batch, clock, number)
        self.ledger_seconds += time.perf_counter() - begin

    def _attempt(self, batch: list[Result], clock: Clock, number: int) -> None:
        in_hand: list[Result] = []

        def compute(group: Sequence[Sequence[Result]]) -> None:
            in_hand[:] = [result for each in group for result in each]
            clock.pass_(SECONDS_PER_RESULT * len(in_hand))
            if any(result.number in self.poisoned for result in in_hand):
                raise Death
            for result in in_hand:
                self.again += self.done[result.number]
                self.done[result.number] = 1

        try:
            attempt([batch], compute, lambda result, _: self.given_up.append(result.number), self.ledger, "translate")
        except Death:  # a process that dies takes nothing back: put the marks there again, in the dead worker's name
            self.ledger.writer, alive = self._name(number), self.ledger.writer
            for result in in_hand:
                self.ledger._mark(f"translate-{result.key}", is_alone=len(in_hand) == 1).path.touch()
            self.ledger.writer = alive
            raise


class Clock:
    """Virtual time of one worker with one piece; it may die at any moment."""

    def __init__(self, source: random.Random, factor: float) -> None:
        self._random, self._factor, self.seconds = source, factor, 0.0
        self._death = source.expovariate(1 / (HOURS_BETWEEN_DEATHS * 3600))

    def pass_(self, seconds: float) -> None:
        """Lets time pass."""
        self.seconds += seconds * self._factor * self._random.lognormvariate(0, 0.25)
        if self.seconds > self._death:
            self.seconds = self._death
            raise Death


def _cost(package: Package) -> int:
    """In place of UNet rows: seconds, an inversion counting as two results."""
    return package.translations + len(package.jobs) * 2


def plot(path: Path, busy: Sequence[tuple[float, float, int]], workers: int, end: float) -> None:
    """Workers at work, and how large the pieces were that they were given, over time."""
    width, height, left, low = 720, 300, 60, 250
    changes = sorted([(begin, 1) for begin, _, _ in busy] + [(stop, -1) for _, stop, _ in busy])
    steps, count = [], 0
    for moment, change in changes:
        count += change
        steps.append((moment, count))
    thinned = [step for i, step in enumerate(steps) if i % max(len(steps) // 2000, 1) == 0] + steps[-1:]

    def x(seconds: float) -> float:
        return left + seconds / end * (width - left - 20)

    line = " ".join(f"{x(moment):.1f},{low - n / workers * 220:.1f}" for moment, n in thinned)
    largest = max(size for _, _, size in busy)
    dots = "".join(
        f'<circle cx="{x(begin):.1f}" cy="{low - size / largest * 220:.1f}" r="1.2"/>' for begin, _, size in busy[::7]
    )
    ticks = "".join(
        f'<text x="{x(m * 60):.0f}" y="{low + 18}" text-anchor="middle">{m:.0f}</text>'
        for m in range(0, int(end / 60) + 1, 5)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<g fill="#b0b0b0">{dots}</g><polyline points="{line}" fill="none" stroke="#0b61a4" stroke-width="1.5"/>'
        f'<text x="{left}" y="16" fill="#0b61a4">workers at work (of {workers})</text>'
        f'<text x="{width - 20}" y="16" fill="#707070" text-anchor="end">'
        f"dots: results in a piece when handed out (at most {largest})</text>"
        f'<text x="{left - 6}" y="{low - 216}" text-anchor="end">{workers}</text>'
        f'<text x="{left - 6}" y="{low}" text-anchor="end">0</text>'
        f'{ticks}<text x="{width / 2}" y="{low + 38}" text-anchor="middle">minutes</text></svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--results", type=int, default=1_000_000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(Path(folder), options.results, options.workers)
        end = simulation.run()
        left = sum(1 for _ in simulation.ledger.marks())
    busy = sum(stop - begin for begin, stop, _ in simulation.busy)
    last_full = max(begin for begin, _, _ in simulation.busy)
    print(
        f"results: {sum(simulation.done)} done, {simulation.again} of them twice, {len(simulation.given_up)} quarantined"
    )
    print(
        f"poisoned: {len(simulation.poisoned)}; all of them and nothing else quarantined: "
        f"{set(simulation.given_up) == simulation.poisoned}"
    )
    print(f"workers: {options.workers}, {simulation.deaths} deaths, {SLOW_SHARE:.0%} slower by {SLOW_FACTOR:g}")
    print(f"virtual time: {end / 60:.1f} min; from the last hand-out to the end {end - last_full:.0f} s")
    print(f"workers at work: {busy / (end * options.workers):.1%} of the time")
    print(
        f"pieces handed out: {simulation.pieces}; dispatch {simulation.dispatch_seconds / options.results * 1e6:.0f} us a result"
    )
    print(
        f"ledger and batches: {simulation.ledger_seconds / options.results * 1e6:.0f} us a result; marks left: {left}"
    )
    if options.plot:
        plot(options.plot, simulation.busy, options.workers, end)


if __name__ == "__main__":
    main()
