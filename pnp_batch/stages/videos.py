"""Stage `assemble` for videos: once the last window is there, its frames become one file and one row of `metadata.jsonl`.

Whoever finishes a window looks whether all others are there, so that no engine has to know about videos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pnp_batch.clips import Clip, Window
from pnp_batch.errors import ItemError
from pnp_batch.ledger import unit_name
from pnp_batch.media.encode import ENCODE_VERSION, FORMATS, Look, Sound, side_by_side, small_preview, write_video
from pnp_batch.media.images import Pixels
from pnp_batch.plan import Job, noted_digest
from pnp_batch.stages.work import Context, Item, Unit, items_of
from pnp_batch.store import Artifact
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.keys import key_of

STAGE = "assemble"

PREVIEW_SIDE = 320  # pixels; sharp at the report's 192 CSS pixels
PREVIEW_FRAMES = 240  # of a longer clip the beginning is shown
PREVIEW_CRF = 24


def run(context: Context, items: Sequence[Item]) -> None:
    """Writes every video all of whose frames are there."""
    for number, unit in enumerate(items[0].units):
        try:
            frames = _all_frames(context, items, number)
            if frames is not None:
                _assemble(context, _Video(context, frames))
        except (CorruptArtifact, ItemError) as error:
            unit.fail(STAGE, error)
        else:
            for each in (item.units[number] for item in items):
                each.is_assembled = frames is not None


def keys_of(context: Context, items: Sequence[Item]) -> Iterator[str]:
    """Keys of the videos that these frames are part of, as far as their frames are there."""
    if items[0].job.window is None:
        return
    for number in range(len(items[0].units)):
        if frames := _all_frames(context, items, number):
            yield _Video(context, frames).key


def name_of(context: Context, unit: Unit) -> str | None:
    """Where the video of a frame is or would be in the output folder; None while a frame is missing."""
    job = unit.item.job
    assert job.window is not None
    items = items_of(_jobs_of(job, job.window), context)
    frames = _all_frames(context, items, unit.item.units.index(unit))
    return _Video(context, frames).name if frames else None


def _jobs_of(job: Job, window: Window) -> Iterator[Job]:
    return (replace(job, window=window, place=window.first + n) for n in range(window.count))


def _all_frames(context: Context, items: Sequence[Item], number: int) -> list[Unit] | None:
    """All frames of the video for one prompt, window by window, shared ones twice; None while one is missing.

    It looks from the end: windows are made in order, so that a missing one is met at once.
    """
    job = items[0].job
    assert job.window is not None
    clip, own = job.window.clip, job.window.first
    found: list[list[Unit]] = []
    for window in reversed(list(clip.windows(overlapping=job.is_joint))):
        members = items if window.first == own else items_of(_jobs_of(job, window), context)
        if len(members) < window.count or not all(_knows_key(context, item) for item in members):
            return None
        units = [item.units[number] for item in members]
        if any(unit.error is not None or unit.find() is None for unit in units):
            return None
        found.insert(0, units)
    return [unit for units in found for unit in units]


def _knows_key(context: Context, item: Item) -> bool:
    """Whether its digest was noted: what nobody has decoded yet, nobody has translated."""
    noted = noted_digest(item.job)
    return noted is not None and context.digests.get(*noted) is not None


@dataclass(frozen=True)
class _Video:
    """One video to write: its frames' results in order, those that two windows share one behind the other."""

    context: Context
    units: Sequence[Unit]

    @property
    def clip(self) -> Clip:
        window = self.units[0].item.job.window
        assert window is not None
        return window.clip

    @property
    def name(self) -> str:
        """Of the file, relative to the output folder."""
        unit = self.units[0]
        suffix = FORMATS[self.clip.spec.container].suffix
        stem, prompt = unit.item.job.source.stem, unit.translation.prompt
        return self.context.outputs.name(stem, prompt, self.key, folder="videos", suffix=suffix)

    @cached_property
    def by_place(self) -> dict[int, list[Unit]]:
        """The results for each chosen frame: two where windows overlap."""
        places: dict[int, list[Unit]] = {}
        for unit in self.units:
            places.setdefault(unit.item.job.place, []).append(unit)
        return dict(sorted(places.items()))

    @cached_property
    def sound(self) -> Sound | None:
        clip = self.clip
        if not clip.footage.audio or not FORMATS[clip.spec.container].audio:
            return None
        whole = clip.numbers[0] == 0 and clip.spec.stop is None and clip.spec.max_frames is None
        return Sound(clip.path, clip.first_second, None if whole else clip.timing.seconds)

    @cached_property
    def key(self) -> str:
        """Everything that decides the bytes of the file: frames, times, container settings and the sound's file."""
        clip, timing = self.clip, self.clip.timing
        content = {
            "stage": STAGE,
            "version": ENCODE_VERSION,
            "frames": [_result_of(unit).key for unit in self.units],
            "times": [timing.times, timing.end, str(timing.tick)],
            "aspect": clip.footage.size,
            "rotation": clip.footage.rotation,
            "container": {name: getattr(clip.spec, name) for name in ("container", "crf", "side_by_side")},
            "sound": None,
        }
        if self.sound is not None:
            content["sound"] = [_file_digest(self.context, clip.path), self.sound.start, self.sound.seconds]
        return key_of(content)

    def results(self) -> Iterator[Pixels]:
        """The translated frames; where two windows give one, the picture goes over evenly from the earlier to the later."""
        for place, units in self.by_place.items():
            pictures = [self._image(unit) for unit in units]
            window = units[-1].item.job.window
            assert window is not None
            yield (
                pictures[0] if len(pictures) == 1 else _blended(pictures[0], pictures[1], window.share_of_later(place))
            )

    def _image(self, unit: Unit) -> Pixels:
        return self.context.store.load(_result_of(unit), "result")["image"]

    def written(self) -> Iterator[Pixels]:
        """The frames of the file."""
        if not self.clip.spec.side_by_side:
            return self.results()
        size = self.units[0].item.job.size
        assert size is not None
        sources = (self.context.clips.pixels(self.clip, place, size) for place in self.by_place)
        return side_by_side(sources, self.results())

    def look(self, wide: int = 1) -> Look:
        """How it is shown; `wide` pictures stand side by side."""
        width, height = self.clip.footage.size
        return Look(self.clip.timing, Fraction(width * wide, height), self.clip.footage.rotation, self.clip.spec.crf)


def _result_of(unit: Unit) -> Artifact:
    artifact = unit.find()
    if artifact is None:
        raise CorruptArtifact(f"frame {unit.item.job.place} is gone")
    return artifact


def _blended(earlier: Pixels, later: Pixels, share: float) -> Pixels:
    mixed = (1 - share) * earlier.astype(np.float32) + share * later.astype(np.float32)
    return np.round(mixed).astype(np.uint8)


def _assemble(context: Context, video: _Video) -> None:
    unit = video.units[0]
    source, spec, name = unit.item.job.source, video.clip.spec, video.name
    if not context.outputs.has(name):
        look = video.look(2 if spec.side_by_side else 1)
        marked = unit_name(STAGE, video.key)
        context.ledger.refuse(marked)
        with context.ledger.attempt([marked]):
            context.outputs.write_with(
                name, lambda path: write_video(path, video.written(), look, spec.container, video.sound)
            )
    artifact = context.store.find(STAGE, video.key)
    if artifact is None:
        artifact = context.store.publish(STAGE, video.key, {"preview": _previews(video)}, _about(video))
        context.events.made("translate", 1)
    context.outputs.add_row({"file_name": name, "source": source.name, **artifact.meta["row"]})
    context.events.made(STAGE, 1)


def _previews(video: _Video) -> dict[str, np.ndarray[Any, Any]]:
    """The bytes of small clips for the report: the result and, where the trajectories are kept, what it was made from."""
    kept = [units[0].item.find() for units in islice(video.by_place.values(), PREVIEW_FRAMES)]
    trajectories = [artifact for artifact in kept if artifact is not None]
    wanted: dict[str, Iterable[Pixels]] = {"result": islice(video.results(), PREVIEW_FRAMES)}
    if len(trajectories) == len(kept):
        load = video.context.store.load
        wanted["source"] = (load(artifact, "preview")["source"] for artifact in trajectories)
        if all("reconstruction_psnr" in artifact.meta["errors"] for artifact in trajectories):
            wanted["reconstruction"] = (load(artifact, "preview")["reconstruction"] for artifact in trajectories)
    look = replace(video.look(), timing=video.clip.timing.beginning(len(kept)), rotation=0, crf=PREVIEW_CRF)
    return {name: np.frombuffer(_small(video.context, frames, look), np.uint8) for name, frames in wanted.items()}


def _small(context: Context, frames: Iterable[Pixels], look: Look) -> bytes:
    with context.outputs.scratch() as folder:
        write_video(folder / "preview.mp4", small_preview(frames, PREVIEW_SIDE), look)
        return (folder / "preview.mp4").read_bytes()


def _about(video: _Video) -> dict[str, Any]:
    """What the artifact says: its row of `metadata.jsonl`, and what it was made from."""
    clip, timing = video.clip, video.clip.timing
    firsts = [units[0] for units in video.by_place.values()]
    artifacts = [_result_of(unit) for unit in video.units]
    meta = artifacts[0].meta
    row = {
        "prompt": meta["prompt"],
        **meta["settings"],
        "key": video.key,
        **{name: meta[name] for name in ("model", "fingerprint", "dtype", "versions")},
        "frames": len(firsts),
        "frame_rate": float(timing.rate),
        "duration": timing.seconds,
        **{name: getattr(clip.spec, name) for name in type(clip.spec).model_fields},
        "sound": video.sound is not None,
        **_figures([_result_of(unit) for unit in firsts]),
        "seconds": round(sum(artifact.meta["seconds"] for artifact in artifacts), 3),
    }
    return {"row": row, "frames": [artifact.key for artifact in artifacts]}


def _figures(artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """The inversion's figures: means over the frames, and the reconstruction error of each."""
    errors = [artifact.meta["errors"] for artifact in artifacts]
    means = {}
    for name, value in errors[0].items():
        values = [error[name] for error in errors if error[name] is not None]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        means[name] = round(fmean(values), 4) if is_number and values else value
    return means | {"frame_reconstruction_psnr": [error["reconstruction_psnr"] for error in errors]}


def _file_digest(context: Context, path: Path) -> str:
    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return context.digests.of(path, "bytes", digest)
