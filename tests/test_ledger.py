"""The attempt ledger with processes that really die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import Project, run_with_hazard

from pnp_batch.ledger import Ledger, Quarantined
from pnp_batch.stages.batches import attempt

UNIT = "translate-" + "ab" * 32
OTHER = "translate-" + "cd" * 32

HOLDS_A_UNIT = """
import sys, time
from pathlib import Path
from pnp_batch.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), unit_timeout=float(sys.argv[2]))
ledger.beat({})
with ledger.attempt(sys.argv[3:]):
    print("in hand", flush=True)
    time.sleep(1e6)
"""

HANGS_AND_LETS_NO_OTHER_THREAD_RUN = """
import ctypes, sys
from pathlib import Path
from pnp_batch.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), unit_timeout=0.05)
with ledger.crashes_noted(), ledger.attempt(sys.argv[2:]):
    ctypes.PyDLL(None).pause()
"""


IS_INTERRUPTED_WHILE_THE_CLOCK_IS_SET = """
import faulthandler, signal, sys, time
from pathlib import Path
from pnp_batch import ledger
ledger.BACKSTOP_SECONDS = 0.0
def interrupt(frame, event, called):
    if event == "c_return" and called is faulthandler.dump_traceback_later:
        signal.raise_signal(signal.SIGINT)
sys.setprofile(interrupt)
try:
    with ledger.Ledger(Path(sys.argv[1]), unit_timeout=0.05).attempt(sys.argv[2:]):
        pass
except KeyboardInterrupt:
    time.sleep(1)
    print("alive")
"""


CRASHES_WITH_A_UNIT = """
import ctypes, sys
from pathlib import Path
from pnp_batch.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
with ledger.crashes_noted(), ledger.attempt(sys.argv[2:]):
    ctypes.string_at(0)
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def holder(ledger: Ledger, *units: str, timeout: float = 1e6) -> subprocess.Popen[str]:
    """A process that has units in hand for ever."""
    command = [sys.executable, "-c", HOLDS_A_UNIT, str(ledger.root), str(timeout), *units]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in hand\n"
    return process


def die_with(ledger: Ledger, *units: str) -> None:
    """A worker dies with units in hand and is found dead by its engine."""
    before = {mark.writer for mark in ledger.marks()}
    process = holder(ledger, *units)
    (writer,) = {mark.writer for mark in ledger.marks()} - before
    process.kill()
    process.communicate()
    ledger.bury(writer, "it was killed")


def test_a_unit_in_the_hands_of_a_living_worker_has_no_strike(ledger: Ledger) -> None:
    process = holder(ledger, UNIT)
    (mark,) = ledger.marks()
    assert not ledger.is_dead(mark.writer) and not ledger.strikes(UNIT)
    process.kill()
    process.communicate()
    assert ledger.is_dead(mark.writer)
    ledger.bury(mark.writer, "killed")
    assert len(ledger.strikes(UNIT)) == 1 and not ledger.strikes(OTHER)


def test_of_deaths_without_a_word_every_tenth_is_a_strike_though_the_worker_had_given_signs_of_life(
    ledger: Ledger,
) -> None:
    """As when a driver is killed and its workers die with it."""
    for deaths in range(1, 11):
        process = holder(ledger, UNIT)
        process.kill()
        process.communicate()
        assert len(ledger.strikes(UNIT)) == deaths // 10
    with ledger.attempt([UNIT]):
        pass
    assert not list(ledger.marks())


def test_a_crash_leaves_its_cause_and_is_a_strike(ledger: Ledger) -> None:
    command = [sys.executable, "-c", CRASHES_WITH_A_UNIT, str(ledger.root), UNIT]
    assert subprocess.run(command).returncode == -signal.SIGSEGV
    (strike,) = ledger.strikes(UNIT)
    assert "Segmentation fault" in ledger.cause_of_death(strike.writer)


def test_a_buried_worker_is_dead_though_nobody_has_waited_for_its_process(ledger: Ledger) -> None:
    process = holder(ledger, UNIT)
    (mark,) = ledger.marks()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # now it is a zombie
    ledger.bury(mark.writer, "killed")
    assert len(ledger.strikes(UNIT)) == 1
    process.communicate()


def test_a_unit_that_took_three_workers_down_is_refused(ledger: Ledger) -> None:
    for _ in range(2):
        die_with(ledger, UNIT)
    ledger.refuse(UNIT)
    die_with(ledger, UNIT)
    with pytest.raises(Quarantined, match="the worker died 3 times"):
        ledger.refuse(UNIT)
    assert ledger.quarantined() == [UNIT]
    ledger.forgive()
    ledger.refuse(UNIT)
    assert not list(ledger.marks())


def test_nothing_is_refused_before_it_died_alone_twice(ledger: Ledger) -> None:
    for _ in range(3):
        die_with(ledger, UNIT, OTHER)
    die_with(ledger, OTHER)
    ledger.refuse(UNIT)
    ledger.refuse(OTHER)
    die_with(ledger, OTHER)
    ledger.refuse(UNIT)
    with pytest.raises(Quarantined, match="the worker died 5 times"):
        ledger.refuse(OTHER)
    assert ledger.quarantined() == [OTHER]


def test_an_end_in_good_order_takes_the_marks_back(ledger: Ledger) -> None:
    die_with(ledger, UNIT)
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), ledger.attempt([UNIT]):
            raise error
        assert len(ledger.strikes(UNIT)) == 1
    with ledger.attempt([UNIT]):
        pass
    assert not list(ledger.marks())


def test_getting_further_forgives_but_not_the_last_attempt(ledger: Ledger) -> None:
    die_with(ledger, UNIT)
    with ledger.attempt([UNIT]):
        ledger.progressed()
        assert not ledger.strikes(UNIT)
    for _ in range(2):
        die_with(ledger, UNIT)
    with ledger.attempt([UNIT]):
        ledger.progressed()
        assert len(ledger.strikes(UNIT)) == 2


def test_a_process_that_a_unit_holds_for_too_long_ends_itself(ledger: Ledger) -> None:
    process = holder(ledger, UNIT, OTHER, timeout=0.05)
    _, printed = process.communicate()
    assert process.returncode == 3 and "was not done within 0.1 s" in printed
    assert "what goes on hanging is left out" in printed
    (strike,) = ledger.strikes(UNIT)
    assert "unit_timeout" in ledger.cause_of_death(strike.writer)


def test_a_hang_that_lets_no_other_thread_run_ends_too(ledger: Ledger) -> None:
    command = [sys.executable, "-c", HANGS_AND_LETS_NO_OTHER_THREAD_RUN, str(ledger.root), UNIT]
    assert subprocess.run(command).returncode == 1
    (strike,) = ledger.strikes(UNIT)
    assert "Timeout" in ledger.cause_of_death(strike.writer)


def test_a_signal_while_the_clock_is_set_stops_the_clock(ledger: Ledger) -> None:
    command = [sys.executable, "-c", IS_INTERRUPTED_WHILE_THE_CLOCK_IS_SET, str(ledger.root), UNIT]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr
    assert not list(ledger.marks())


def test_what_a_worker_says_of_its_end_stands(ledger: Ledger) -> None:
    ledger.bury("elsewhere-1-cafe0000", "it hung")
    ledger.bury("elsewhere-1-cafe0000", "it is gone")
    assert ledger.cause_of_death("elsewhere-1-cafe0000") == "it hung"


def test_in_a_container_every_run_has_the_same_process_number(ledger: Ledger) -> None:
    with ledger.attempt([UNIT]):
        (mark,) = ledger.marks()
        assert Ledger(ledger.root).is_dead(mark.writer)


def test_a_worker_of_another_machine_is_dead_when_it_is_silent_or_buried(ledger: Ledger) -> None:
    ledger.writer = "elsewhere-1-cafe0000"
    ledger.beat({})
    with ledger.attempt([UNIT]):
        here = Ledger(ledger.root)
        beat = ledger.root / "workers" / ledger.writer
        assert not here.is_dead(ledger.writer)
        os.utime(beat, (time.time() - 3600,) * 2)
        assert here.is_dead(ledger.writer)
        ledger.beat({})
        assert not here.is_dead(ledger.writer)
        here.bury(ledger.writer, "its node was lost")
        assert here.strikes(UNIT) and here.cause_of_death(ledger.writer) == "its node was lost"
        here.remove_the_dead()
        assert here.strikes(UNIT)
    here.remove_the_dead()
    assert not list((ledger.root / "dead").iterdir())


class Thing:
    def __init__(self, key: str) -> None:
        self.key = key


def test_a_batch_is_repeated_once_then_taken_apart_and_the_guilty_one_alone_is_given_up(ledger: Ledger) -> None:
    guilty, innocent = Thing("ab" * 32), Thing("cd" * 32)
    computed: list[list[Thing]] = []
    given_up: list[Thing] = []

    def work() -> None:
        computed.clear()
        attempt(
            [[guilty, innocent]],
            lambda group: computed.extend(list(batch) for batch in group),
            lambda thing, error: given_up.append(thing),
            ledger,
            "translate",
        )

    die_with(ledger, UNIT, OTHER)
    work()
    assert computed == [[guilty, innocent]] and not list(ledger.marks())  # a success forgives
    for _ in range(2):
        die_with(ledger, UNIT, OTHER)
    work()
    assert computed == [[guilty], [innocent]] and not list(ledger.marks())
    for units in ([UNIT, OTHER], [UNIT, OTHER], [UNIT], [OTHER]):  # the innocent one is in hand when a node is lost
        die_with(ledger, *units)
    work()
    assert computed == [[guilty], [innocent]] and not given_up
    for units in ([UNIT, OTHER], [UNIT, OTHER], [UNIT], [UNIT]):
        die_with(ledger, *units)
    work()
    assert computed == [[innocent]] and given_up == [guilty]


def test_ten_thousand_units_leave_nothing_behind(ledger: Ledger) -> None:
    for i in range(10_000):
        with ledger.attempt([f"translate-{i:064x}"]):
            pass
    assert not list(ledger.marks())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["segfault", "hang"])
def test_a_result_that_takes_the_run_down_alone_as_well_is_left_out_and_its_batch_mates_are_done(
    tmp_path: Path, how: str
) -> None:
    project = Project(tmp_path)
    prompts = [f"toy number {i}" for i in range(4)]
    project.write([{"image": project.picture("a.png"), "prompts": prompts}], run={"batch_size": 1})
    project.pnp("run")
    alone, rows = project.pictures(), project.rows()
    project = Project(tmp_path / "poisoned")
    project.folder.mkdir()
    project.picture("a.png")
    project.write([{"image": "a.png", "prompts": prompts}], run={"unit_timeout": 2, "batch_size": 4})
    poison = f"{how} /{rows[0]['key']}"
    died = {"segfault": -signal.SIGSEGV, "hang": 3}[how]
    for _ in range(4):  # twice with its batch, twice alone
        assert run_with_hazard(project, poison).returncode == died
    ended = run_with_hazard(project, poison)
    assert ended.returncode == 1 and "3 of 4 results are there" in ended.stderr
    assert project.failures()[0]["prompt"] == prompts[0] and "quarantined" in project.failures()[0]["error"]
    assert "1 in quarantine" in project.pnp("status")
    lost = rows[0]["file_name"]
    assert project.pictures() == {name: data for name, data in alone.items() if name != lost}
    assert run_with_hazard(project, poison).returncode == 1  # and stays so, at no cost
    project.pnp("run", "--retry-failed")
    assert project.pictures() == alone
