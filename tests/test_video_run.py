"""Videos through the whole program: real files, the real CLI, the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import yaml
from films import ffmpeg, film, tones
from PIL import Image
from running import Project, start
from typer.testing import CliRunner

from pnp_batch.checkpoint import resolve
from pnp_batch.cli import app
from pnp_batch.clips import survey_unit
from pnp_batch.manifest import load_manifest
from pnp_batch.media.motion import steadied
from pnp_batch.media.video import VideoReader, survey_of
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.clips import clip
from pnp_batch.store import Artifact, ArtifactStore
from pnp_batch.survey import keys_in_use, survey

PROMPT = "a bronze statue"
SIZE = {"height": 32, "width": 32}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def videos(project: Project) -> dict[str, bytes]:
    found = sorted(path for path in (project.output / "videos").rglob("*") if path.is_file())
    return {path.name: path.read_bytes() for path in found}


def write(project: Project, **inputs: object) -> None:
    project.write([{"video": "a.mp4", "prompts": [PROMPT], **inputs}], defaults=SIZE)


def _process(plan: Plan, worker: Worker) -> None:
    for package in plan.packages():
        worker.process(package)


def _are_done(plan: Plan, worker: Worker) -> bool:
    return all(worker.is_done(package) for package in plan.packages())


class TestAClip:
    def test_comes_back_with_its_frames_rate_aspect_and_sound_in_one_file_and_one_row(self, project: Project) -> None:
        film(project.folder / "a.mp4", rate="24000/1001", seconds=0.5)
        write(project)
        printed = project.pnp("run")
        assert "1 of 1 result is there (1 computed now, 12 inversions" in printed
        assert f"videos:   {project.output / 'videos'}" in printed and "pictures:" not in printed
        (row,) = project.rows()
        assert row["file_name"].startswith("videos/a--a-bronze-statue-") and row["file_name"].endswith(".mp4")
        assert (row["source"], row["frames"], row["consistency"]) == ("a.mp4", 12, "keyframes")
        assert len(row["frame_reconstruction_psnr"]) == 12 and row["reconstruction_psnr"] == pytest.approx(
            np.mean(row["frame_reconstruction_psnr"]), abs=1e-3
        )
        assert isinstance(row["frame_rate"], float) and "fps" not in row
        result = survey_of(project.output / row["file_name"])
        assert (len(result.timing.times), result.timing.rate) == (12, Fraction(24000, 1001))
        assert Fraction(*result.size) == Fraction(3, 2)  # the source's, though pixels were squeezed into a square
        path = project.output / row["file_name"]
        assert tones(path, 0.5) == tones(project.folder / "a.mp4", 0.5)
        assert iio.improps(path, plugin="pyav").shape[1:] == (32, 32, 3)
        assert not (project.output / "images").exists()

    def test_a_second_run_computes_and_decodes_nothing(self, project: Project) -> None:
        path = film(project.folder / "a.mp4", seconds=0.4)
        write(project)
        project.pnp("run")
        before = videos(project)
        times = path.stat()
        data = path.read_bytes()
        path.write_bytes(b"x" * len(data))  # whoever decodes it now, fails
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        path.write_bytes(data)
        project.pnp("run")
        assert project.progress()["rows"] == 0 and videos(project) == before and len(project.rows()) == 1
        for stage in ("invert", "translate"):
            assert "1 of 1 result is there" in project.pnp("run", "--only", stage)

    def test_a_worker_keeps_no_frames_keys_of_a_video_that_is_written_named_or_counted(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.2, sound=False)
        write(project)
        manifest = load_manifest(project.manifest)
        plan = Plan(manifest, resolve(manifest.model, manifest.base))
        for look in (_process, survey, _are_done, lambda *both: list(keys_in_use(*both))):
            worker = Worker(manifest, plan.checkpoint, Silent())
            look(plan, worker)
            assert worker.context.reels and not any(reel.windows for reel in worker.context.reels.values())
        assert len(videos(project)) == 1 and _are_done(plan, worker)

    @pytest.mark.slow
    def test_a_lost_file_is_written_again_with_the_same_bytes(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.4)
        write(project)
        project.pnp("run")
        before = videos(project)
        (name,) = before
        (project.output / "videos" / name).unlink()
        project.pnp("run")
        assert videos(project) == before and project.progress()["rows"] == 0

    @pytest.mark.slow
    def test_a_corrupt_frame_is_made_again_with_the_same_bytes(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.4)
        write(project)
        project.pnp("run")
        before = videos(project)
        shard = sorted(project.store.glob("translate/*/*/result.safetensors"))[3]
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
        for name in before:
            (project.output / "videos" / name).unlink()
        assert "set aside" in project.pnp("run")
        assert videos(project) == before

    def test_a_lost_frame_is_made_again_though_all_trajectories_are_lost_too(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.4)
        write(project)
        project.pnp("run")
        before = videos(project)
        for folder in (project.store / "invert", project.output / "videos"):
            shutil.rmtree(folder)
        assert "0 UNet rows" in project.pnp("run")  # the frames are enough
        shutil.rmtree(sorted(project.store.glob("translate/*/*"))[3])
        (project.output / "videos" / next(iter(before))).unlink()
        assert "1 of 1 result is there" in project.pnp("run")
        assert videos(project) == before

    @pytest.mark.slow
    def test_a_new_prompt_computes_only_that_prompt(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.4)
        write(project)
        project.pnp("run")
        before = videos(project)
        write(project, prompts=[PROMPT, "a pink toy"])
        assert "(1 computed now, 0 inversions" in project.pnp("run")
        assert before.items() <= videos(project).items() and len(project.rows()) == 2
        both = videos(project)
        project.store.rename(project.folder / "old")
        (project.output / "metadata.jsonl").unlink()
        project.pnp("run")
        assert videos(project) == both

    @pytest.mark.slow
    def test_the_range_is_cut_and_the_sound_with_it(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=3)
        write(project, start=25, stop=60, stride=7)
        project.pnp("run")
        (row,) = project.rows()
        result = survey_of(project.output / row["file_name"])
        assert (row["frames"], row["duration"]) == (5, pytest.approx(1.4)) and result.timing.seconds == pytest.approx(
            1.4
        )
        assert tones(project.output / row["file_name"], 1.4) == tones(project.folder / "a.mp4", 3)[4:9]
        artifact = ArtifactStore(project.store).find("assemble", row["key"])
        assert artifact is not None
        source = VideoReader(project.folder / "a.mp4", survey_of(project.folder / "a.mp4"))
        wanted = [source.frame(n, (32, 32)) for n in (25, 32, 39, 46, 53)]
        (project.folder / "source.mp4").write_bytes(artifact.load("preview")["source"].tobytes())
        shown = iio.imread(project.folder / "source.mp4", plugin="pyav")
        far = [[np.abs(a.astype(int) - b).mean() for b in wanted] for a in shown]
        assert np.argmin(far, axis=1).tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.slow
    def test_a_turned_clip_stays_turned(self, project: Project) -> None:
        ffmpeg(
            "-display_rotation",
            90,
            "-i",
            film(project.folder / "b.mp4", seconds=0.2),
            "-c",
            "copy",
            project.folder / "a.mp4",
        )
        project.write([{"video": "a.mp4", "prompts": [PROMPT]}], defaults={"height": None, "width": 32})
        project.pnp("run")
        result = survey_of(project.output / project.rows()[0]["file_name"])
        assert result.rotation == 90 and Fraction(*result.size) == Fraction(64, 96)

    @pytest.mark.slow
    @pytest.mark.parametrize("container", ["mov", "webm", "gif", "frames"])
    def test_other_containers_and_two_pictures_side_by_side(self, project: Project, container: str) -> None:
        film(project.folder / "a.mp4", seconds=0.2, sound=False)
        write(project, container=container, side_by_side=True)
        project.pnp("run")
        path = project.output / project.rows()[0]["file_name"]
        frames = (
            iio.imread(path, plugin="pyav")
            if path.is_file()
            else np.stack([iio.imread(p) for p in sorted(path.iterdir())])
        )
        wide = 96 if container in ("gif", "frames") else 64  # which know only square pixels
        assert frames.shape == (5, 32, wide, 3)


class TestFrames:
    def test_on_their_own_are_not_written_again_when_steadying_changes(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        film(project.folder / "a.mp4", seconds=0.2, sound=False)
        prompts = [{"prompt": PROMPT, "consistency": mode} for mode in ("none", "keyframes")]
        write(project, prompts=prompts)
        project.pnp("run")
        before = {row["key"]: row["consistency"] for row in project.rows()}
        monkeypatch.setattr("pnp_batch.stages.videos.MOTION_VERSION", 99)
        project.pnp("run")
        after = {row["key"]: row["consistency"] for row in project.rows()}
        assert [after[key] for key in after.keys() - before.keys()] == ["keyframes"]

    @pytest.mark.slow
    def test_on_their_own_are_what_pictures_become(self, project: Project) -> None:
        for n in range(5):
            project.picture(f"shots/{n}.png", seed=n, size=(32, 32))
        project.write(
            [
                {"video": "shots", "consistency": "none", "container": "frames", "fps": 10, "prompts": [PROMPT]},
                {"images": "shots", "prompts": [PROMPT]},
            ],
            defaults=SIZE,
        )
        assert "6 of 6 results are there" in project.pnp("run")
        rows = project.rows()
        (video,) = [row for row in rows if row["file_name"].startswith("videos/")]
        frames = sorted((project.output / video["file_name"]).iterdir())
        pictures = [project.output / f"{row['file_name']}" for row in rows if row is not video]
        for frame, picture in zip(frames, sorted(pictures), strict=True):
            assert np.array_equal(iio.imread(frame), iio.imread(picture))
            with Image.open(frame) as opened:
                settings = json.loads(opened.text["pnp-batch"])
            assert settings["container"] == "frames" and settings.items() <= video.items()
        assert video["frame_rate"] == 10

    def test_status_and_dry_run_count_videos_as_results_and_frames_as_trajectories(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.4)
        write(project, prompts=[PROMPT, "a pink toy"])
        assert "2 results of 1 guidance image; 0 are there already" in project.pnp("run", "--dry-run")
        project.pnp("run")
        status = json.loads(project.pnp("status", "--json"))
        names = ("sources", "trajectories", "inverted", "translations", "translated", "assembled")
        assert [status[name] for name in names] == [1, 10, 10, 2, 2, 2]
        assert "2 are there already" in project.pnp("run", "--dry-run")
        assert "0 places" in project.pnp("store gc", "--unused")


def with_unknown_sound(path: Path) -> Path:
    """A clip whose sound no decoder knows."""
    whole = film(path.with_suffix(".mkv"), "-pix_fmt", "yuv420p", "-c:a", "libopus", seconds=0.2)
    data = whole.read_bytes()
    assert data.count(b"A_OPUS") == 1
    path.write_bytes(data.replace(b"A_OPUS", b"A_XXXX"))
    return path


class TestDamage:
    def test_sound_that_nobody_knows_is_left_out_and_said(self, project: Project) -> None:
        with_unknown_sound(project.folder / "a.mp4")
        write(project)
        project.pnp("run")
        (row,) = project.rows()
        assert not row["sound"] and not survey_of(project.output / row["file_name"]).audio
        assert "a.mp4: its sound is of a kind that cannot be read" in (project.output / "run.log").read_text()

    def test_a_video_that_kills_whoever_plans_is_given_up(self, project: Project) -> None:
        for name in ("a.mp4", "b.mp4"):
            film(project.folder / name, seconds=0.2, sound=False)
        project.write([{"video": name, "prompts": [PROMPT]} for name in ("a.mp4", "b.mp4")], defaults=SIZE)
        unit, ledger = survey_unit(project.folder / "a.mp4"), project.output / "ledger"
        code = "import os, sys; from pathlib import Path; from pnp_batch.ledger import Ledger; "
        code += (
            "ledger = Ledger(Path(sys.argv[1]))\nwith ledger.crashes_noted(), ledger.attempt([sys.argv[2]]): os.abort()"
        )
        for _ in range(3):
            assert subprocess.run([sys.executable, "-c", code, ledger, unit], check=False).returncode == -signal.SIGABRT
        assert "1 of 2 results are there" in project.pnp("run", code=1)
        (failure,) = project.failures()
        assert failure["source"] == "a.mp4" and "the worker died 3 times" in failure["error"]
        assert "1 of 1 result is there" in project.pnp("run", "--retry-failed")

    def test_a_broken_video_fails_alone_and_says_what_to_do(self, project: Project) -> None:
        whole = film(project.folder / "b.mp4", "-movflags", "+faststart")
        (project.folder / "a.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
        (project.folder / "c.mp4").write_text("nonsense")
        both = [{"video": name, "prompts": [PROMPT], "max_frames": 14} for name in ("a.mp4", "c.mp4")]
        project.write([*both, {"video": "b.mp4", "stop": 3, "prompts": [PROMPT]}], defaults=SIZE)
        assert "1 of 3 results are there" in project.pnp("run", code=1)
        errors = {row["source"]: row["error"] for row in project.failures()}
        assert "truncated" in errors["a.mp4"] and "partial: true" in errors["a.mp4"]
        assert "not a readable video" in errors["c.mp4"]
        write(project, partial=True, start=2, max_frames=4)
        assert "1 of 1 result is there" in project.pnp("run")

    @pytest.mark.slow
    def test_failed_yaml_names_just_the_video(self, project: Project) -> None:
        (project.folder / "a.mp4").write_text("nonsense")
        write(project, start=2, stop=5)
        project.pnp("run", code=1)
        film(project.folder / "a.mp4", seconds=0.4)
        failed = project.output / "failed.yaml"
        (entry,) = yaml.safe_load(failed.read_text())["inputs"]
        assert (entry["start"], entry["stop"]) == (2, 5) and "fps" not in entry
        assert CliRunner().invoke(app, ["run", str(failed)]).exit_code == 0
        before = videos(project)
        project.pnp("run")
        assert project.progress()["rows"] == 0 and videos(project) == before

    def test_wrong_manifests_say_so_before_anything_is_started(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.2)
        project.picture("b.png")
        write(project, fps=12)
        assert "fps is for a folder of numbered pictures" in project.pnp("validate", code=2)
        project.write([{"video": "b.png", "prompts": [PROMPT]}])
        assert "write `image: b.png`" in project.pnp("validate", code=2)
        project.write([{"video": "c.mp4", "prompts": [PROMPT]}])
        assert "no such file" in project.pnp("validate", code=2)

    @pytest.mark.slow
    def test_a_range_without_frames(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=0.2)
        write(project, start=50)
        project.pnp("run", code=1)
        assert "there is no frame in this range; the clip has 5" in project.failures()[0]["error"]


def test_the_sample_clip_is_what_it_says() -> None:
    path = Path(__file__).parents[1] / "manifests/clips/red-cross-on-grass.mp4"
    footage = survey_of(path)
    frames = [VideoReader(path, footage).frame(n, (64, 64)) for n in range(16)]
    assert footage.timing.rate == 8 and np.abs(np.stack(frames).astype(int) - clip(3, 16).frames).mean() < 4


@pytest.mark.slow
class TestLongClips:
    def test_windows_share_frames_and_go_over_into_each_other(self, project: Project) -> None:
        film(project.folder / "a.mp4", seconds=2.2, size="96x96", sound=False)  # 55 frames, two windows
        write(project, container="frames")
        assert "55 inversions" in project.pnp("run")
        (row,) = project.rows()
        frames = sorted((project.output / row["file_name"]).iterdir())
        assert len(frames) == 55
        artifact = ArtifactStore(project.store).find("assemble", row["key"])
        assert artifact is not None
        made = [ArtifactStore(project.store).find("translate", key) for key in artifact.meta["frames"]]
        images = [each.load("result")["image"].astype(float) for each in made if each]
        assert len(images) == 40 + 23
        blends = images[:32]
        for n in range(8):  # frames 32 to 39 stand in both windows
            share = (n + 1) / 9
            blends.append((1 - share) * images[32 + n] + share * images[40 + n])
        footage = survey_of(project.folder / "a.mp4")
        reader = VideoReader(project.folder / "a.mp4", footage)
        sources = [reader.frame(n, (32, 32)) for n in range(55)]
        wanted = steadied((np.round(blend).astype(np.uint8) for blend in [*blends, *images[48:]]), sources)
        for frame, picture in zip(frames, wanted, strict=True):
            assert np.array_equal(iio.imread(frame), picture)

    def test_what_is_finished_is_looked_at_once(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        looks = []
        find = ArtifactStore.find

        def counted(store: ArtifactStore, stage: str, key: str) -> Artifact | None:
            looks.append(key)
            return find(store, stage, key)

        film(project.folder / "a.mp4", seconds=8, size="32x32", sound=False)  # 200 frames in six windows of 40
        project.write(
            [{"video": "a.mp4", "prompts": [PROMPT]}],
            defaults=SIZE | {"num_inference_steps": 1, "num_inversion_steps": 1, "guidance_scale": 1.0},
        )
        project.pnp("run")
        monkeypatch.setattr(ArtifactStore, "find", counted)
        project.pnp("run")
        assert project.progress()["rows"] == 0
        assert len(looks) <= 3 * 6 * 40

    def test_a_kill_costs_one_window_and_changes_no_byte(self, project: Project, tmp_path: Path) -> None:
        whole = Project(tmp_path / "whole")
        whole.folder.mkdir()
        for each in (project, whole):
            film(each.folder / "a.mp4", seconds=2.2)
            write(each)
        whole.pnp("run")
        process = start(project)
        deadline = time.monotonic() + 120
        while not list(project.store.glob("translate/??/*/meta.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert list(project.store.glob("translate/??/*/meta.json"))
        project.pnp("run")
        assert project.progress()["rows"] < whole.progress()["rows"]
        assert videos(project) == videos(whole)
