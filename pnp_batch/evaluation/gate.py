"""The quality gate: results that miss a threshold are made again with other settings, or flagged.

It works in rounds over all results of a work package: measure, then make what failed with the next of the listed settings.
Who takes part in a round depends on the plan and on the figures alone, so batches, and with them the bytes, are the same on
every engine and after every interruption. Rejected attempts stay in the store and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.evaluation.measures import BATCH, Finding, Measures, is_number
from pnp_batch.evaluation.values import Value
from pnp_batch.inputs import Source, Translation
from pnp_batch.manifest import Manifest, Settings, column_of
from pnp_batch.plan import TRAJECTORY_SETTINGS, Job, jobs_of, packages_of, unit_id
from pnp_batch.stages.quality import FLAGGED, NOT_JUDGED, PASSED, STAGE, Verdict
from pnp_batch.stages.work import Context, Events, Unit
from pnp_batch.store import Artifact
from pnp_batch.store.artifacts import CorruptArtifact

Make = Callable[[Context, Sequence[Job]], Sequence[Unit]]


@dataclass(frozen=True)
class Attempt:
    """A result that was measured.

    Attributes:
        number: 0 for its own settings, else which retry.
        settings: What it was made with.
        key: Of its artifact; empty where nothing finite came out.
        figures: By column, or in words why there is none.
        missed: The thresholds it does not reach, in words.
        unmeasured: The thresholds that could not be asked, in words.
        cause: The columns of `missed`.
    """

    number: int
    settings: Settings
    key: str
    figures: Mapping[str, Value]
    missed: Sequence[str]
    unmeasured: Sequence[str]
    cause: frozenset[str]


@dataclass(eq=False)
class Trial:
    """A result on trial: what was tried so far, and what is to be measured next."""

    unit: Unit
    current: Unit | None
    attempts: list[Attempt] = field(default_factory=list)

    def wants(self, settings: Settings) -> bool:
        """Whether making it with these settings could help."""
        if self.unit.error is not None or not self.attempts[-1].missed:
            return False
        if any(settings.meaningful() == attempt.settings.meaningful() for attempt in self.attempts):
            return False
        return _may_mend(self.attempts[-1], settings)


def _may_mend(attempt: Attempt, settings: Settings) -> bool:
    """What only the inversion is to blame for, no setting mends that leaves the inversion alone."""
    same = all(getattr(attempt.settings, name) == getattr(settings, name) for name in TRAJECTORY_SETTINGS)
    return not same or any(not column.startswith("reconstruction_") for column in attempt.cause)


class Gate:
    """Settles the results of work packages by a rule. Holds the backbones, loaded when first needed.

    Args:
        manifest: Says where the backbones lie.
        context: Of the worker; its rule is what is asked for.
        make: Makes the results of some jobs, inversions included, and says how it went.
    """

    def __init__(self, manifest: Manifest, context: Context, make: Make) -> None:
        rule = context.rule()
        assert rule is not None
        self.manifest, self.context, self.rule, self.make = manifest, context, rule, make
        self.columns = {name: column_of(name) for name in rule.thresholds}

    @cached_property
    def measures(self) -> Measures:
        """The metrics behind the thresholds."""
        return Measures(self.manifest, self.context, self.columns.values())

    def settle(self, units: Sequence[Unit]) -> None:
        """Gives every result its verdict, and makes what that takes.

        Args:
            units: All results of the package that are there, judged or not: the rounds are made of all of them.

        Raises:
            EnvironmentFailure: A backbone is not what it should be.
        """
        trials = [Trial(unit, unit) for unit in units]
        self._measure(trials, 0)
        for number, retry in enumerate(self.rule.retries, 1):
            wanting = [t for t in trials if t.attempts and t.wants(t.unit.translation.settings.retried(retry))]
            self._retry(wanting, retry)
            self._measure(wanting, number)
        for trial in trials:
            if trial.unit.error is None and trial.attempts:
                self._conclude(trial)

    def _measure(self, trials: Sequence[Trial], number: int) -> None:
        """Adds an attempt to each trial."""
        there = [trial for trial in trials if trial.current is not None and trial.unit.error is None]
        for i in range(0, len(there), BATCH):
            part = there[i : i + BATCH]
            findings = [Finding(*_found(trial.current), masks=None) for trial in part]  # no threshold asks for a mask
            rows = self.measures.of(findings)
            self._refuse_unavailable()
            for trial, finding, values in zip(part, findings, rows, strict=True):
                if finding.error is not None:
                    trial.unit.fail(STAGE, finding.error)
                else:
                    trial.attempts.append(self._attempt(finding, values, number))

    def _refuse_unavailable(self) -> None:
        """A gate that cannot see lets nothing pass and rejects nothing."""
        for name, column in self.columns.items():
            if column in self.measures.unavailable:
                raise EnvironmentFailure(f"quality.{name} cannot be measured: {self.measures.unavailable[column]}")

    def _attempt(self, finding: Finding, values: Mapping[str, Value], number: int) -> Attempt:
        figures = {column: values[column] for column in self.columns.values()}
        missed, unmeasured, cause = [], [], set()
        for name, bound in self.rule.thresholds.items():
            column = self.columns[name]
            value = figures[column]
            if isinstance(value, str):
                unmeasured.append(f"{column}: {value}")
            elif not (value >= bound if name.startswith("min_") else value <= bound):  # NaN misses either way
                missed.append(f"{column} {value:.4g} is {_beyond(name, value)} {bound:g}")
                cause.add(column)
        settings = finding.unit.translation.settings
        return Attempt(number, settings, finding.artifact.key, figures, missed, unmeasured, frozenset(cause))

    def _retry(self, trials: Sequence[Trial], retry: Settings) -> None:
        """Makes the next attempt of each trial: `current` is it, or None where nothing finite came out."""
        made: dict[str, Unit] = {}
        for context, jobs in self._work(trials, retry):
            made |= {unit.id: unit for unit in self.make(context, jobs)}
        for trial in trials:
            unit = made[_other(trial.unit, retry)[1]]
            trial.current = unit if unit.error is None and unit.find() is not None else None
            if isinstance(unit.error, CorruptArtifact):
                trial.unit.fail(unit.stage, unit.error)  # it is made again
            elif unit.error is not None:  # what was made before stands
                self.context.events.note(f"a retry of {unit.item.job.source.name} failed at {unit.stage}: {unit.error}")

    def _work(self, trials: Sequence[Trial], retry: Settings) -> Iterator[tuple[Context, Sequence[Job]]]:
        """The jobs of a round, by dtype (a result that half precision could not hold stays in float32) and geometry."""
        by_dtype: dict[str, dict[Source, dict[str, Translation]]] = {}
        for trial in trials:
            _, first = _found(trial.unit)
            translation, name = _other(trial.unit, retry)
            sources = by_dtype.setdefault(str(first.meta["dtype"]), {})
            sources.setdefault(trial.unit.item.job.source, {})[name] = translation
        for dtype, sources in by_dtype.items():
            # Without a rule: attempts are judged here, and nowhere else.
            context = replace(self.context, dtype=dtype, events=Aside(self.context.events), rule=lambda: None)
            checkpoint = self.context.checkpoint
            jobs = (job for source, own in sources.items() for job in jobs_of(source, own.values(), checkpoint))
            yield from ((context, package.jobs) for package in packages_of(jobs))

    def _conclude(self, trial: Trial) -> None:
        """Publishes the verdict: the attempt that misses the fewest thresholds, mostly none; the earliest of those."""
        chosen = min(trial.attempts, key=lambda attempt: (len(attempt.missed), attempt.number))
        word = FLAGGED if chosen.missed else NOT_JUDGED if chosen.unmeasured else PASSED
        _, first = _found(trial.unit)
        meta = {
            "result": first.key,
            "word": word,
            "chosen": chosen.key,
            "attempt": chosen.number,
            "reason": "; ".join([*chosen.missed, *chosen.unmeasured]),
            "figures": _plain(chosen.figures),
            "tried": [attempt.key for attempt in trial.attempts],
            "attempts": [
                {"number": each.number, "key": each.key, "figures": _plain(each.figures), "missed": list(each.missed)}
                for each in trial.attempts
            ],
        }
        trial.unit.verdict = Verdict.of(self.context.store.publish(STAGE, self.rule.key(first), {}, meta))


@dataclass(frozen=True)
class Aside:
    """Events of attempts: their UNet rows count as work, what they make counts as no result."""

    events: Events

    def step(self, rows: int) -> None:
        """UNet rows were computed."""
        self.events.step(rows)

    def made(self, stage: str, count: int) -> None:
        """A stage made artifacts."""
        self.events.made(f"retry {stage}", count)

    def note(self, message: str) -> None:
        """Something a person should know."""
        self.events.note(message)


def _found(unit: Unit | None) -> tuple[Unit, Artifact]:
    """A unit with its artifact, which is there by now."""
    artifact = unit.find() if unit else None
    assert unit is not None and artifact is not None
    return unit, artifact


def _other(unit: Unit, retry: Settings) -> tuple[Translation, str]:
    """A result's translation with the settings of a retry, and what it is called."""
    translation = replace(unit.translation, settings=unit.translation.settings.retried(retry))
    return translation, unit_id(unit.item.job.source, translation)


def _beyond(name: str, value: float) -> str:
    return "no number, not" if math.isnan(value) else "below" if name.startswith("min_") else "above"


def _plain(figures: Mapping[str, Value]) -> dict[str, float | None]:
    return {name: value if isinstance(value, float) and is_number(value) else None for name, value in figures.items()}
