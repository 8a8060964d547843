"""Choosing an engine and devices, cutting packages, handing them out; without any cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from films import film
from running import FEW_STEPS, Project
from runs import BATCH, PROMPTS, planned

from pnp_batch.checkpoint import resolve
from pnp_batch.engines import engine_for
from pnp_batch.engines.devices import gpus_needed, visible_as, workers_on
from pnp_batch.engines.driver import driving, rows_of
from pnp_batch.engines.remote import RemoteWorker, Report, Spec
from pnp_batch.engines.run import Run
from pnp_batch.engines.schedule import Schedule
from pnp_batch.errors import EnvironmentFailure, ManifestError
from pnp_batch.manifest import Manifest, load_manifest
from pnp_batch.monitor import PlainView
from pnp_batch.plan import Package, Plan, package_from_json, package_to_json, unit_id
from pnp_batch.runner import Silent, Worker, ledger_of
from pnp_batch.store.files import TEMP_PREFIX, temp_name


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return planned(tmp_path / "project")


def plan_of(project: Project) -> Plan:
    manifest = load_manifest(project.manifest)
    return Plan(manifest, resolve(manifest.model, manifest.base))


def parts_of(project: Project) -> list[Package]:
    plan = plan_of(project)
    (package,) = plan.packages()
    return Worker(plan.manifest, plan.checkpoint, Silent()).parts(package)


def with_run(project: Project, **run: object) -> Manifest:
    return load_manifest(project.manifest).with_run(run)


# Devices


@pytest.mark.parametrize(
    ("written", "devices", "wanted", "device"),
    [
        ("auto", "auto", None, "auto"),
        ("all", "all", None, "auto"),
        ("2", 2, 2, "auto"),
        (1, 1, 1, "auto"),
        ("0,2", (0, 2), 2, "cuda:0"),
        ("[1]", (1,), 1, "cuda:1"),
        ([3, 1], (3, 1), 2, "cuda:3"),
        ("cpu", "cpu", 1, "cpu"),
        ("cuda:1", "cuda:1", 1, "cuda:1"),
    ],
)
def test_devices_as_written(
    project: Project, written: object, devices: object, wanted: int | None, device: str
) -> None:
    run = with_run(project, devices=written).run
    assert (run.devices, run.devices_wanted, run.device) == (devices, wanted, device)


@pytest.mark.parametrize("written", ["toaster", "0", 0, -1, [], [0, 0], [-1], ["a"], [[]], True, "1,1", 1.5])
def test_devices_that_mean_nothing(project: Project, written: object) -> None:
    with pytest.raises(ManifestError, match="--devices"):
        with_run(project, devices=written)


@pytest.mark.parametrize("name", ["partition", "gres", "account", "python"])
def test_nothing_in_a_slurm_script_gets_lines_of_its_own(project: Project, name: str) -> None:
    with pytest.raises(ManifestError, match="cannot hold a line break"):
        with_run(project, engine="slurm", slurm={name: "x\n#SBATCH --wrap=evil"})


def test_several_devices_mean_ray_unless_an_engine_is_written(project: Project) -> None:
    assert engine_for(with_run(project)) == "local"
    assert engine_for(with_run(project, devices=1)) == "local"
    assert engine_for(with_run(project, devices=2)) == "ray"
    assert engine_for(with_run(project, engine="slurm", devices=2)) == "slurm"
    with pytest.raises(EnvironmentFailure, match="engine local uses one device, 2 are asked for"):
        engine_for(with_run(project, engine="local", devices=2))


@pytest.mark.parametrize(
    ("devices", "each", "there", "needed"),
    [
        ("auto", None, 0, 0),
        ("auto", None, 2, 2),
        (2, None, 0, 0),
        (2, None, 4, 2),
        ([0, 3], None, 4, 2),
        (4, 0.5, 2, 2),
        (3, 0.5, 2, 2),
        (5, 0.4, 4, 3),
        (10, 0.1, 1, 1),
        (3, 1 / 3, 1, 1),
        (1, 2, 4, 2),
        (2, 0, 4, 0),
    ],
)
def test_gpus_that_a_run_needs(project: Project, devices: object, each: float | None, there: int, needed: int) -> None:
    assert gpus_needed(with_run(project, devices=devices, ray={"num_gpus": each}).run, there) == needed


@pytest.mark.parametrize(
    ("devices", "each", "there", "why"),
    [
        (3, None, 2, "3 devices of 1 GPU are asked for, and this machine shows 2"),
        (5, 0.5, 2, "5 devices of 0.5 GPU"),
        (5, 0.4, 2, "5 devices of 0.4 GPU"),
        ([0, 1], 0.5, 2, "a list of GPUs means one worker on each"),
        (2, 2, 2, "2 devices of 2 GPU"),
        ([0, 2], None, 2, "there is no GPU 2: this machine shows 2"),
    ],
)
def test_more_gpus_than_there_are_are_refused(
    project: Project, devices: object, each: float | None, there: int, why: str
) -> None:
    with pytest.raises(EnvironmentFailure, match=why):
        gpus_needed(with_run(project, devices=devices, ray={"num_gpus": each}).run, there)


def test_no_worker_gets_parts_of_two_gpus() -> None:
    rooms = [workers_on(*both) for both in ((2, 0.4), (1, 0.1), (7, 0.07), (0, 0.5), (4, 1), (5, 2))]
    assert rooms == [4, 10, 98, 0, 4, 2]


def test_numbers_of_devices_count_those_that_a_batch_system_gave_out() -> None:
    assert visible_as((2, 0), None) == "2,0"
    assert visible_as((2, 0), "GPU-a, 5,7") == "7,GPU-a"


def test_keys_are_those_of_the_workers_device_wherever_they_are_told(project: Project) -> None:
    """A machine that submits to a cluster's GPUs often has none."""
    gpus = with_run(project, engine="slurm", slurm={"gres": "gpu:1"})
    plan = plan_of(project)
    assert Worker(gpus, plan.checkpoint, Silent()).context.dtype == "float16"
    for run in ({"engine": "slurm"}, {"engine": "ray", "ray": {"num_gpus": 0}}):
        assert Worker(with_run(project, **run), plan.checkpoint, Silent()).context.dtype == "float32"
    project.write([{"image": "0.png", "prompts": ["x"]}], run={"engine": "ray", "ray": {"num_gpus": 1}})
    assert "cannot be told on this machine" in project.pnp("run", "--dry-run")


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "submitit"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name.partition(".")[0])
sys.meta_path.insert(0, Missing())
from pnp_batch.cli import main
sys.argv[0] = "pnp-batch"
main()
"""


@pytest.mark.parametrize(("engine", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_says_how_to_get_it(project: Project, engine: str, library: str) -> None:
    command = [sys.executable, "-c", WITHOUT, "run", str(project.manifest), "--engine", engine]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 3
    assert f"needs {library}, which is not installed: pip install 'pnp-batch[{engine}]'" in ended.stderr


def test_neither_ray_nor_submitit_is_imported_before_it_is_used() -> None:
    code = "import sys, pnp_batch, pnp_batch.cli, pnp_batch.engines; print({'ray', 'submitit', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# Parts


def test_a_package_is_cut_between_batches(project: Project) -> None:
    assert [[job.source.name for job in part.jobs] for part in parts_of(project)] == [
        ["0.png", "1.png"],
        ["2.png", "3.png"],
        ["4.png", "5.png"],
        ["6.png", "7.png"],
    ]


def test_no_batch_of_translations_is_cut_either(project: Project) -> None:
    """Batches of four results are two pictures, but one of three pictures with one prompt each joins what lies between."""
    inputs = [{"image": f"{i}.png", "prompts": PROMPTS} for i in range(8)]
    project.write(inputs, run={"batch_size": 3})
    sizes = [len(part.jobs) for part in parts_of(project)]  # inversions in threes, pictures of two prompts one by one
    assert sizes == [3, 3, 2]
    for each in inputs:
        each["prompts"] = [PROMPTS[0], {"prompt": PROMPTS[1], "pnp_f_layers": [5]}]
    project.write(inputs, run={"batch_size": 3})
    assert [len(part.jobs) for part in parts_of(project)] == [3, 3, 2]
    inputs[0]["prompts"] = PROMPTS[:1]
    inputs[1]["prompts"] = PROMPTS[:1]
    inputs[2]["prompts"] = [PROMPTS[0], "a doll", "a marble bust"]
    for each in inputs[3:]:
        each["prompts"] = PROMPTS[:1]
    project.write(inputs, run={"batch_size": 3})
    # Results: {0, 1}, {2}, {3, 4, 5}, {6, 7}; inversions: {0, 1, 2}, {3, 4, 5}, {6, 7}.
    assert [len(part.jobs) for part in parts_of(project)] == [3, 3, 2]
    inputs[2]["prompts"] = PROMPTS
    project.write(inputs, run={"batch_size": 3})
    # Results: {0, 1}, {2, 3}, {4, 5, 6}, {7}: nothing can be cut.
    assert [len(part.jobs) for part in parts_of(project)] == [8]


def test_parts_one_by_one_give_the_bytes_of_the_whole(project: Project, undisturbed: Project) -> None:
    plan = plan_of(project)
    worker = Worker(plan.manifest, plan.checkpoint, Silent())
    for part in reversed(parts_of(project)):
        worker.process(part)
    assert project.pictures() == undisturbed.pictures() and project.tensors() == undisturbed.tensors()


def test_a_picture_that_cannot_be_read_moves_the_batches_of_its_own_part_alone(
    project: Project, undisturbed: Project
) -> None:
    data = (project.folder / "0.png").read_bytes()
    (project.folder / "0.png").write_bytes(data[: len(data) // 2])
    project.pnp("run", code=1)
    others = {name: data for name, data in undisturbed.pictures().items() if name[7] not in "01"}
    assert {name: data for name, data in project.pictures().items() if name[7] not in "01"} == others


# Packages and workers by text


def test_a_package_survives_being_text(project: Project) -> None:
    project.write(
        [
            {"image": project.picture("sub/ä.png"), "prompts": [{"prompt": "x", "pnp_f_layers": [5]}, "y"]},
            {"generate": {"prompt": "a horse", "seed": 50}, "prompts": ["a zebra"], "height": 128, "width": 64},
        ]
    )
    (project.folder / "prompts.csv").write_text("prompt,guidance_scale\na toy,3\n")
    inputs = [{"images": "sub", "prompts": "prompts.csv"}]
    for each in (None, inputs):
        if each:
            project.write(each)
        for package in plan_of(project).packages():
            again = package_from_json(package_to_json(package), project.store)
            assert again == package
            assert [[t.id for t in job.translations] for job in again.jobs] == [
                [t.id for t in job.translations] for job in package.jobs
            ]


def test_the_windows_of_a_clip_survive_being_text_and_are_never_cut(project: Project) -> None:
    film(project.folder / "a.mp4", seconds=3, sound=False)
    project.write([{"video": "a.mp4", "prompts": PROMPTS}], run=BATCH)
    plan = plan_of(project)
    packages = list(plan.packages())
    assert len(packages) == 3  # 75 frames in windows of 40 that share 8
    worker = Worker(plan.manifest, plan.checkpoint, Silent())
    for package in packages:
        assert package_from_json(package_to_json(package), plan.manifest.store) == package
        assert worker.parts(package) == [package]


def spec_of(project: Project, **changes: object) -> str:
    manifest = load_manifest(project.manifest)
    spec = Spec(
        manifest.to_json(),
        str(manifest.path),
        "cpu",
        "worker 1",
        "cafe0001",
        ["invert", "translate", "assemble"],
        False,
        1,
    )
    return replace(spec, **changes).to_json()  # type: ignore[arg-type]


def test_a_remote_worker_gives_outcomes_and_rows_and_writes_no_list(project: Project, undisturbed: Project) -> None:
    worker = RemoteWorker(spec_of(project))
    (package,) = plan_of(project).packages()
    report = Report.from_json(worker.process(package_to_json(package)))
    assert all(outcome.done for outcome in report.outcomes) and len(report.outcomes) == 16
    assert [row["file_name"] for row in report.rows] == [row["file_name"] for row in undisturbed.rows()]
    assert not (project.output / "metadata.jsonl").exists() and project.pictures() == undisturbed.pictures()
    (beat,) = worker.worker.ledger.workers().values()
    assert beat["made"] == {"invert": 8, "translate": 16, "assemble": 16} and beat["rows"] > 0


def test_a_video_that_vanished_since_it_was_planned_fails_and_the_worker_goes_on(project: Project) -> None:
    path = film(project.folder / "a.mp4", seconds=0.4, sound=False)
    project.write([{"video": "a.mp4", "prompts": PROMPTS}], run=BATCH)
    (package,) = plan_of(project).packages()
    path.unlink()
    report = Report.from_json(RemoteWorker(spec_of(project)).process(package_to_json(package)))
    assert report.failure is None and {outcome.stage for outcome in report.outcomes} == {"read"}
    assert len(report.outcomes) == len(PROMPTS) and "a.mp4" in str(report.outcomes[0].error)
    (job, *_) = package.jobs
    assert {outcome.id for outcome in report.outcomes} == {unit_id(job.source, each) for each in job.translations}


def test_a_remote_worker_stops_when_a_file_asks_for_it(project: Project) -> None:
    worker = RemoteWorker(spec_of(project))
    (package,) = plan_of(project).packages()
    (worker.worker.ledger.root / "stop").touch()
    report = Report.from_json(worker.process(package_to_json(package)))
    assert report.interrupted and not report.outcomes and not list(worker.worker.ledger.marks())


def test_a_manifest_for_workers_has_everything_but_its_inputs(project: Project) -> None:
    project.write([{"image": "0.png", "prompts": ["x"]}], run=BATCH | {"dtype": "float16", "store": "elsewhere"})
    manifest = load_manifest(project.manifest)
    again = Manifest.from_json(manifest.to_json(), manifest.path)
    assert (again.output, again.store, again.run, again.defaults) == (
        manifest.output,
        manifest.store,
        manifest.run,
        manifest.defaults,
    )
    assert again.inputs == () and json.loads(manifest.to_json())["defaults"]["width"] == FEW_STEPS["width"]


def test_resources_of_ray_workers_are_a_mapping_of_numbers(project: Project) -> None:
    run = with_run(project, ray={"resources": {"a100": 1}}).run
    assert dict(run.ray.resources) == {"a100": 1} and hash(run)
    for wrong in ({"a100": "x"}, {"a100": 0}, "a100"):
        with pytest.raises(ManifestError, match="resources"):
            with_run(project, ray={"resources": wrong})


# A run


def test_what_workers_of_a_run_left_half_written_is_gone_at_its_end(project: Project) -> None:
    with driving(Run(plan_of(project), PlainView())):
        child = subprocess.Popen(["true"])
        child.wait()
        for folder in (project.output, project.store / "invert", project.output / "ledger/workers"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / temp_name().replace(f"-{os.getpid()}-", f"-{child.pid}-")).touch()
    assert not list(project.output.rglob(".tmp-*"))


def test_the_dead_are_no_longer_shown_and_what_they_did_still_counts(project: Project) -> None:
    with driving(Run(plan_of(project), PlainView())) as driver:
        workers = [ledger_of(driver.run.plan.manifest) for _ in range(3)]
        for number, ledger in enumerate(workers):
            ledger.writer = f"elsewhere-{number}-cafe000{number}"
            ledger.beat(
                {"name": "task", "doing": f"package {number}", "began": 0.0, "rows": 10, "made": {"translate": 1}}
            )
        left = driver.ledger.root / "workers" / f"{TEMP_PREFIX}elsewhere-1-00"
        left.touch()
        with workers[1].attempt(["translate-" + "ab" * 32]):
            assert driver.bury({"cafe0000", "cafe0001"}, "the array ended") and not left.exists()
        assert not driver.bury({"cafe0000"}, "the array ended")
        driver.watch_workers(force=True)
        state = driver.monitor.state
        assert [worker.doing for worker in state.workers] == ["package 2"]
        assert (state.rows, state.translated) == (30, 3)


# The schedule


def schedule_of(project: Project, workers: int, packages: Sequence[Package] | None = None) -> Schedule:
    plan = plan_of(project)
    run = Run(plan, PlainView())
    worker = Worker(plan.manifest, plan.checkpoint, Silent())
    all_packages = list(plan.packages()) if packages is None else list(packages)
    total = sum(rows_of(run, package) for package in all_packages)
    return Schedule(all_packages, worker.parts, lambda package: rows_of(run, package), total, workers)


def drained(schedule: Schedule) -> list[list[str]]:
    pieces = []
    while (piece := schedule.take()) is not None:
        pieces.append([job.source.name for job in piece.jobs])
    return pieces


def test_packages_are_whole_at_first_and_end_in_small_pieces(project: Project) -> None:
    (package,) = plan_of(project).packages()
    pieces = drained(schedule_of(project, 2, [package] * 12))
    sizes = [len(piece) for piece in pieces]
    assert sizes[:2] == [8, 8] and sizes[-2:] == [2, 2] and sum(sizes) == 96
    assert sum(sizes[: len(sizes) // 2]) > 1.5 * sum(sizes[len(sizes) // 2 :])
    for piece in pieces:
        assert int(piece[0][0]) % 2 == 0 and len(piece) % 2 == 0


def test_one_worker_gets_everything_once(project: Project) -> None:
    assert sorted(name for piece in drained(schedule_of(project, 1)) for name in piece) == [
        f"{i}.png" for i in range(8)
    ]


def test_what_a_dead_worker_had_is_handed_out_again_and_workers_that_only_die_end_the_run(project: Project) -> None:
    schedule = schedule_of(project, 1)
    piece = schedule.take()
    assert piece is not None
    schedule.died(piece, True, "killed")
    again = [job for piece in iter(schedule.take, None) for job in piece.jobs]
    assert set(again) >= set(piece.jobs) and len(again) == 8
    for _ in range(4):
        schedule.died(None, False, "no driver")
    schedule.settled()
    for _ in range(4):
        schedule.died(None, False, "no driver")
    with pytest.raises(
        EnvironmentFailure, match=r"5 workers died one after the other before they did any work.*no driver"
    ):
        schedule.died(None, False, "no driver")
