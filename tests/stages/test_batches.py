"""Which items share a batch, and how a failing batch is taken apart; with torch's own out-of-memory error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.ledger import Ledger
from pnp_batch.stages.batches import attempt, automatic_batch, incomplete, is_out_of_memory
from pnp_batch.store import Artifact


@dataclass(frozen=True)
class Thing:
    key: str


A, B, C, D = (Thing(name) for name in "abcd")


def made_with(*batch: Thing, failed: Sequence[Thing] = ()) -> Artifact:
    return Artifact(Path(), {"batch": [t.key for t in batch], "failed": [t.key for t in failed]}, {})


def batches(planned: list[list[Thing]], there: dict[Thing, Artifact]) -> list[list[Thing]]:
    return incomplete(planned, there.get)


def test_a_first_run_takes_the_batches_as_planned() -> None:
    assert batches([[A, B], [C, D]], {}) == [[A, B], [C, D]]


def test_a_finished_package_has_none() -> None:
    assert batches([[A, B]], {A: made_with(A, B), B: made_with(A, B)}) == []


def test_a_lost_item_is_made_again_with_those_it_was_made_with() -> None:
    assert batches([[A, B, C]], {A: made_with(A, B, C), C: made_with(A, B, C)}) == [[A, B, C]]


def test_an_added_item_is_made_alone() -> None:
    assert batches([[A, B, C]], {A: made_with(A, B), B: made_with(A, B)}) == [[C]]


def test_an_item_that_had_failed_does_not_drag_its_batch_along() -> None:
    assert batches([[A, B]], {A: made_with(A, B, failed=[B])}) == [[B]]


def test_a_batch_with_a_member_that_left_the_plan_is_not_repeated() -> None:
    assert batches([[A, B]], {A: made_with(A, D, B)}) == [[B]]


def test_the_same_key_twice_is_made_once() -> None:
    assert batches([[A, A, B], [B]], {}) == [[A, B]]


class Outcome:
    """Notes what was computed together and who was given up."""

    def __init__(self, poisoned: Sequence[Thing] = (), room_for: int = 99, error: type[Exception] = ValueError) -> None:
        self.poisoned, self.room_for, self.error = poisoned, room_for, error
        self.computed: list[list[Thing]] = []
        self.given_up: list[Thing] = []

    def compute(self, group: Sequence[Sequence[Thing]]) -> None:
        things = [thing for batch in group for thing in batch]
        if len(things) > self.room_for:
            torch.empty(2**60, dtype=torch.uint8)  # torch's own way to say that there is no memory
        if any(thing in self.poisoned for thing in things):
            raise self.error("poisoned")
        self.computed += [list(batch) for batch in group]

    def give_up(self, thing: Thing, error: BaseException) -> None:
        self.given_up.append(thing)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def test_out_of_memory_halves_until_it_fits(ledger: Ledger) -> None:
    outcome = Outcome(room_for=1)
    attempt([[A, B], [C, D]], outcome.compute, outcome.give_up, ledger, "translate")
    assert outcome.computed == [[A], [B], [C], [D]] and not outcome.given_up


def test_an_item_that_never_fits_fails_alone(ledger: Ledger) -> None:
    outcome = Outcome(room_for=0)
    attempt([[A, B]], outcome.compute, outcome.give_up, ledger, "translate")
    assert outcome.given_up == [A, B]


def test_a_poisoned_item_fails_alone(ledger: Ledger) -> None:
    outcome = Outcome(poisoned=[B])
    attempt([[A, B, C], [D]], outcome.compute, outcome.give_up, ledger, "translate")
    assert outcome.computed == [[A], [C], [D]] and outcome.given_up == [B]


def test_a_failing_machine_is_nobodys_fault(ledger: Ledger) -> None:
    outcome = Outcome(poisoned=[B], error=EnvironmentFailure)
    with pytest.raises(EnvironmentFailure):
        attempt([[A, B]], outcome.compute, outcome.give_up, ledger, "translate")
    assert outcome.given_up == []


def test_torchs_allocation_error_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value) and not is_out_of_memory(ValueError("shape"))


def test_automatic_batches_depend_on_device_and_geometry_only() -> None:
    assert automatic_batch("cpu", (512, 512), 8) == 4
    assert automatic_batch("cuda", (512, 512), 8) == 16
    assert automatic_batch("cpu", (4096, 4096), 8) == 1
    assert automatic_batch("cpu", (64, 64), 4) == 32
