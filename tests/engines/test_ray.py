"""Engine `ray` on a real Ray: processes that are killed, nodes that are lost, and the bytes of a local run in the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from films import film
from running import Project, program
from runs import (
    BATCH,
    PICTURES,
    PROMPTS,
    SLOWLY,
    assert_others_done,
    assert_same,
    nothing_done_twice,
    planned,
    started,
    until,
    watched,
)

from pnp_batch.ledger import Ledger

pytest.importorskip("ray")

RESULTS = PICTURES * len(PROMPTS)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return planned(tmp_path / "ray", engine="ray", devices=2)


ISOLATED = """
set -e
ip link set lo up
echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6
ip link add outside type veth peer name nowhere
ip addr add 198.51.100.1/24 dev outside
ip link set outside up
ip link set nowhere up
ip route add default dev outside
"$@" & pid=$!
listening=""
while kill -0 $pid 2>/dev/null; do
  listening="$listening $(ss -Hltn | awk '{print $4}' | grep -v '^127.0.0.1:' || true)"
  sleep 1
done
wait $pid
test -z "${listening// }" || { echo "listened for others: $listening"; exit 98; }
test "$(awk '$1 == "outside:" {print $11}' /proc/self/net/dev)" = 0 || { echo "packets left this machine"; exit 99; }
"""


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one_and_nothing_is_sent_out_or_listens_to_others(
    project: Project, undisturbed: Project
) -> None:
    alone = ["unshare", "--net", "bash", "-c", ISOLATED, "bash"]
    if why := subprocess.run([*alone, "true"], capture_output=True, text=True).stderr:
        pytest.skip(f"NO NETWORK NAMESPACES HERE, THAT RAY SENDS NOTHING OUT IS NOT TESTED: {why}")
    ended = subprocess.run(
        [*alone, *program("run", str(project.manifest))],
        env={name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same(project, undisturbed)
    assert f"{RESULTS} of {RESULTS} results are there ({RESULTS} computed now, {PICTURES} inversions" in ended.stderr
    assert (project.output / "run.log").read_text().count(": loaded") == 2  # the model, by either worker
    assert "0 UNet rows" in project.pnp("run", "--engine", "local", "--devices", "1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "segfault", "hang"])
def test_a_worker_that_dies_once_is_replaced(tmp_path: Path, undisturbed: Project, how: str) -> None:
    project = planned(tmp_path / "ray", engine="ray", devices=2, unit_timeout=5)
    victim = undisturbed.rows()[5]["key"]
    with started(project, hazard=f"{how} /{victim}", once=tmp_path / "hit") as run:
        run.until_there(tmp_path / "hit")
        with nothing_done_twice(project):
            assert run.wait() == 0, run.printed
    assert "died" in run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_a_poisoned_result_is_left_out_and_all_others_are_done(project: Project, undisturbed: Project) -> None:
    victim = undisturbed.rows()[0]
    with started(project, hazard=f"kill /{victim['key']}") as run:
        run.until_some_are_done()
        with nothing_done_twice(project):
            assert run.wait() == 1, run.printed
    assert f"{RESULTS - 1} of {RESULTS} results are there" in run.printed
    assert_others_done(project, undisturbed, victim)


@pytest.mark.slow
def test_the_windows_of_a_clip_on_two_workers_give_the_bytes_of_one(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", seconds=3)  # once: ffmpeg does not give the same bytes twice on a busy machine
    files = []
    for engine in ({}, {"engine": "ray", "devices": 2}):
        project = planned(tmp_path / str(len(files)), **engine)
        shutil.copy(clip, project.folder)
        inputs = [{"video": clip.name, "prompts": PROMPTS[:1]}]
        project.write(inputs, run={**BATCH, **engine}, defaults={"height": 32, "width": 48})
        with started(project) as run:
            assert run.wait() == 0, run.printed
        assert "1 of 1 result is there" in run.printed and len(project.rows()) == 1
        files.append({path.name: path.read_bytes() for path in (project.output / "videos").iterdir()})
        tensors = project.tensors()
    assert files[0] == files[1] and len(files[0]) == 1
    assert tensors == Project(tmp_path / "0").tensors()


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_no_process_and_the_next_run_repeats_nothing_finished(
    project: Project, undisturbed: Project
) -> None:
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        run.process.kill()
        assert run.wait() == -signal.SIGKILL
    assert "not running" in project.pnp("status")
    with nothing_done_twice(project), started(project) as run:
        assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_ctrl_c_stops_at_the_next_step_and_blames_nobody(project: Project, undisturbed: Project) -> None:
    with started(project, hazard=SLOWLY) as run:
        run.until_some_are_done()
        assert "worker 1 on" in project.pnp("status")
        run.process.send_signal(signal.SIGINT)
        assert run.wait() == 130, run.printed
    assert "Go on with the same command" in run.printed
    assert not list(Ledger(project.output / "ledger").marks())
    with nothing_done_twice(project), started(project) as run:
        assert run.wait() == 0, run.printed
    assert_same(project, undisturbed)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head without room for workers and two nodes with room for one each; what they start is slow."""
    from pnp_batch.engines.on_ray import PRIVATE

    for name, value in {**watched(SLOWLY), **PRIVATE}.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("graceful", [True, False])
def test_the_loss_of_a_node_loses_nothing(
    cluster: object, tmp_path: Path, undisturbed: Project, graceful: bool
) -> None:
    lost = cluster.add_node(num_cpus=1)  # type: ignore[attr-defined]
    project = planned(tmp_path / "ray", engine="ray", devices=2, ray={"address": cluster.address})  # type: ignore[attr-defined]
    with started(project) as run:
        run.until_some_are_done()
        cluster.remove_node(lost, allow_graceful=graceful)  # type: ignore[attr-defined]
        with nothing_done_twice(project):
            assert run.wait() == 0, run.printed
    assert "died" in run.printed
    assert_same(project, undisturbed)


@pytest.mark.slow
def test_more_workers_than_the_cluster_can_hold_are_refused(cluster: object, tmp_path: Path) -> None:
    project = planned(tmp_path / "ray", engine="ray", devices=5, ray={"address": cluster.address})  # type: ignore[attr-defined]
    with started(project) as run:
        assert run.wait() == 3
    assert "5 workers of 1 CPU asked for; the cluster has 1 CPU, 0 GPU, room for 1" in run.printed
    until(lambda: not (project.output / "images").exists(), 1, "nothing was made")


@pytest.mark.slow
def test_workers_that_cannot_even_start_end_the_run(project: Project, tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early/sitecustomize.py").write_text(
        "import os, sys\nif 'default_worker' in ' '.join(sys.orig_argv): sys.modules['pydantic_core'] = None\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'early'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    ended = subprocess.run(
        program("run", str(project.manifest)), env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 3 and "died one after the other" in ended.stderr, ended.stderr
