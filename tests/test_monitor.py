"""What a person sees of workers in other processes."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from pnp_batch.monitor import LiveView, Monitor, PlainView
from pnp_batch.plan import Estimate


def beat(name: str, rows: int, doing: str = "package 3", silent: float = 0.0) -> dict[str, object]:
    now = time.time()
    return {
        "name": name,
        "host": "node7",
        "doing": doing,
        "rows": rows,
        "made": {"invert": 2, "translate": 3, "flagged": 1},
        "began": now - 100 - silent,
        "updated": now - silent,
    }


def test_the_live_view_has_a_row_for_each_worker_and_drops_those_that_are_gone(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    view = LiveView(console)
    monitor = Monitor(Estimate(trajectories=8, translations=16, target_rows=1000), tmp_path, view)
    beats = {"a": beat("worker 1", 200), "b": beat("worker 2", 100, "package 4")}
    monitor.watch(beats, ["a", "b"])
    monitor.made("flagged", 1)
    state = monitor.state
    assert (state.rows, state.inverted, state.translated, state.flagged) == (300, 4, 6, 3)
    rows = {task.description: task.fields["about"] for task in view._progress.tasks}
    assert rows["worker 1"] == "2.0/s  package 3 (node7)" and rows["worker 2"] == "1.0/s  package 4 (node7)"
    monitor.watch(beats | {"b": beat("worker 2", 150)}, ["b"])
    assert monitor.state.rows == 350  # what a dead worker did was done
    assert "worker 1" not in [task.description for task in view._progress.tasks]
    view.close()


def test_plain_lines_name_the_workers_and_those_that_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = PlainView()
    monitor = Monitor(Estimate(trajectories=8, translations=16, target_rows=1000), tmp_path, view)
    view._last = 0.0
    monitor.watch({"a": beat("worker 1", 200), "b": beat("worker 2", 100, silent=90)}, ["a", "b"])
    printed = capsys.readouterr().err
    assert "worker 1 on node7: package 3, 200 UNet rows, 2.0/s\n" in printed
    assert "worker 2 on node7: package 3, 100 UNet rows, 1.0/s, silent for 0:0" in printed


def test_a_run_that_computes_more_than_was_planned_is_not_shown_as_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = PlainView()
    monitor = Monitor(Estimate(trajectories=1, translations=2, target_rows=1000), tmp_path, view)
    monitor.settled(rows=500, done=1, failed=0)
    for rows in (400, 100, 100):
        view._last = 0.0
        monitor.step(rows)
    first, exact, second = capsys.readouterr().err.splitlines()
    assert first.startswith(" 90%") and "planned" not in first
    assert exact.startswith(" 99%") and "planned" not in exact  # nothing is left but to write what was computed
    assert second.startswith(" 99%") and second.endswith("ETA unknown (more rows than planned)")
    monitor.settled(rows=500, done=1, failed=0)
    assert monitor.state.percent == 100 and not monitor.state.is_beyond_plan
