"""Stage `assemble` for videos: once the last window is there, its frames become one file and one row of `metadata.jsonl`.

Whoever finishes a window looks whether all others are there, so that no engine has to know about videos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pnp_batch.clips import Clip, ClipReader, Window
from pnp_batch.errors import ItemError
from pnp_batch.inputs import Translation
from pnp_batch.ledger import unit_name
from pnp_batch.media.encode import (
    ENCODE_VERSION,
    FORMATS,
    Look,
    Sound,
    shortcomings,
    side_by_side,
    small_preview,
    write_video,
)
from pnp_batch.media.images import Pixels
from pnp_batch.plan import Job, noted_digest
from pnp_batch.stages.remembered import Reel
from pnp_batch.stages.work import Context, Item, Unit, items_of
from pnp_batch.store import Artifact, canonical_json
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.keys import key_of

STAGE = "assemble"

MOTION_VERSION = 2  # part of the key of every video that is steadied: raise it when `media.motion` gives other frames
PREVIEW_SIDE = 320  # pixels; sharp at the report's 192 CSS pixels
PREVIEW_FRAMES = 240  # of a longer clip the beginning is shown
PREVIEW_CRF = 24


def run(context: Context, items: Sequence[Item]) -> None:
    """Writes every video all of whose frames are there."""
    for number, unit in enumerate(items[0].units):
        reel = _reel(context, unit)
        try:
            if not reel.is_written and (video := _whole(context, items, number)):
                reel.windows.clear()
                _assemble(context, video)
                reel.is_written = True
        except (CorruptArtifact, ItemError, OSError) as error:
            reel.windows.clear()
            reel.name = None
            unit.fail(STAGE, error)
        else:
            for each in (item.units[number] for item in items):
                each.is_assembled = reel.is_written


def keys_of(context: Context, items: Sequence[Item]) -> Iterator[str]:
    """Keys of the videos that end with these frames, as far as their frames are there."""
    if not items[-1].job.is_last:
        return
    for number in range(len(items[0].units)):
        if video := _whole(context, items, number):
            _reel(context, items[0].units[number]).windows.clear()
            yield video.key


def name_of(context: Context, unit: Unit) -> str | None:
    """Where the video of a frame is or would be in the output folder; None while a frame is missing."""
    job, reel = unit.item.job, _reel(context, unit)
    assert job.window is not None
    if reel.name is None:
        items = items_of(_jobs_of(job, job.window), context)
        if video := _whole(context, items, unit.item.units.index(unit)):
            reel.name = video.name
            reel.windows.clear()
    return reel.name


def _jobs_of(job: Job, window: Window) -> Iterator[Job]:
    return (replace(job, window=window, place=window.first + n) for n in range(window.count))


def _reel(context: Context, unit: Unit) -> Reel:
    return context.reels.setdefault((context.dtype, unit.id), Reel())


def _whole(context: Context, items: Sequence[Item], number: int) -> _Video | None:
    """The video for one prompt; None while a frame is missing.

    It looks from the end: windows are made in order, so that a missing one is met at once.
    """
    job = items[0].job
    assert job.window is not None
    known = _reel(context, items[0].units[number]).windows
    windows = list(job.window.clip.windows(overlapping=job.is_joint))
    for window in reversed(windows):
        if window.first not in known:
            members = items if window.first == job.window.first else items_of(_jobs_of(job, window), context)
            keys = _keys_of_window(context, members, number, window)
            if keys is None:
                return None
            known[window.first] = keys
    return _Video(context, job, items[0].units[number].translation, [(each, known[each.first]) for each in windows])


def _keys_of_window(context: Context, items: Sequence[Item], number: int, window: Window) -> tuple[str, ...] | None:
    """The keys of the results of a window's frames; None where one is missing."""
    if len(items) < window.count or not all(_knows_key(context, item) for item in items):
        return None
    keys = []
    for unit in (item.units[number] for item in items):
        artifact = unit.find()
        if unit.error is not None or artifact is None:
            return None
        keys.append(artifact.key)
    return tuple(keys)


def _knows_key(context: Context, item: Item) -> bool:
    """Whether its digest was noted: what nobody has decoded yet, nobody has translated."""
    noted = noted_digest(item.job)
    return noted is not None and context.digests.get(*noted) is not None


@dataclass(frozen=True)
class _Video:
    """One video to write.

    Attributes:
        context: Of the worker.
        job: Of one of its frames.
        translation: What it shows.
        windows: Its windows in order, each with the keys of its frames' results; metas of a long clip would fill memory.
    """

    context: Context
    job: Job
    translation: Translation
    windows: Sequence[tuple[Window, Sequence[str]]]

    @property
    def clip(self) -> Clip:
        return self.windows[0][0].clip

    @property
    def name(self) -> str:
        """Of the file, relative to the output folder."""
        suffix = FORMATS[self.clip.spec.container].suffix
        stem, prompt = self.job.source.stem, self.translation.prompt
        return self.context.outputs.name(stem, prompt, self.key, folder="videos", suffix=suffix)

    @cached_property
    def by_place(self) -> list[list[tuple[str, Window]]]:
        """For each chosen frame the keys of its results: two where windows overlap."""
        places: list[list[tuple[str, Window]]] = [[] for _ in self.clip.numbers]
        for window, keys in self.windows:
            for n, key in enumerate(keys):
                places[window.first + n].append((key, window))
        return places

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
            "frames": [key for _, keys in self.windows for key in keys],
            "times": [timing.times, timing.end, str(timing.tick)],
            "aspect": clip.footage.size,
            "rotation": clip.footage.rotation,
            "container": {name: getattr(clip.spec, name) for name in ("container", "crf", "side_by_side")},
            "sound": None,
        }
        if self.job.is_joint:
            content["steadied"] = MOTION_VERSION
        if self.sound is not None:
            content["sound"] = [_file_digest(self.context, clip.path), self.sound.start, self.sound.seconds]
        return key_of(content)

    def artifact(self, key: str) -> Artifact:
        """A frame's result."""
        artifact = self.context.store.find("translate", key)
        if artifact is None:
            raise CorruptArtifact(f"result {key[:12]} of {self.job.source.name} is gone")
        return artifact

    def sources(self) -> Iterator[Pixels]:
        """The chosen frames, at the size that they were translated at; read apart from all else, since readers go forward."""
        size = self.job.size
        assert size is not None
        with closing(ClipReader()) as reader:
            for place in range(len(self.clip.numbers)):
                yield reader.pixels(self.clip, place, size)

    def results(self) -> Iterator[Pixels]:
        """The frames that it shows: those that were translated together are drawn together along the motion of the source."""
        if not self.job.is_joint:
            return self._translated()
        from pnp_batch.media.motion import steadied  # with torch, only when there is something to write

        return steadied(self._translated(), self.sources())

    def _translated(self) -> Iterator[Pixels]:
        """The translated frames; where two windows give one, the picture goes over evenly from the earlier to the later."""
        for place, made in enumerate(self.by_place):
            pictures = [self.context.store.load(self.artifact(key), "result")["image"] for key, _ in made]
            share = made[-1][1].share_of_later(place)
            yield pictures[0] if len(pictures) == 1 else blended(pictures[0], pictures[1], share)

    def look(self, wide: int = 1) -> Look:
        """How it is shown; `wide` pictures stand side by side."""
        width, height = self.clip.footage.size
        return Look(self.clip.timing, Fraction(width * wide, height), self.clip.footage.rotation, self.clip.spec.crf)


def blended(earlier: Pixels, later: Pixels, share: float) -> Pixels:
    """A picture between two, of which the later one has a share."""
    mixed = (1 - share) * earlier.astype(np.float32) + share * later.astype(np.float32)
    return np.round(mixed).astype(np.uint8)


def _assemble(context: Context, video: _Video) -> None:
    name, spec = video.name, video.clip.spec
    beginning: list[Pixels] = []
    if not context.outputs.has(name):
        look = video.look(2 if spec.side_by_side else 1)
        for note in (*video.clip.footage.notes, *shortcomings(look, spec.container)):
            context.events.note(f"{video.job.source.name}: {note}")
        frames = _noted(video.results(), beginning)
        frames = side_by_side(video.sources(), frames) if spec.side_by_side else frames
        marked = unit_name(STAGE, video.key)
        context.ledger.refuse(marked)
        with context.ledger.attempt([marked]):
            text = {"pnp-batch": canonical_json(_settings(video))}
            context.outputs.write_with(
                name, lambda path: write_video(path, frames, look, spec.container, video.sound, text)
            )
    artifact = context.store.find(STAGE, video.key)
    if artifact is None:
        beginning = beginning or list(_small(islice(video.results(), PREVIEW_FRAMES)))
        artifact = context.store.publish(STAGE, video.key, {"preview": _previews(video, beginning)}, _about(video))
        context.events.made("translate", 1)
    context.outputs.add_row({"file_name": name, "source": video.job.source.name, **artifact.meta["row"]})
    context.events.made(STAGE, 1)


def _noted(frames: Iterable[Pixels], beginning: list[Pixels]) -> Iterator[Pixels]:
    """Passes frames on and keeps the first ones, small: steadying them twice would cost more than their memory."""
    for number, frame in enumerate(frames):
        if number < PREVIEW_FRAMES:
            beginning.extend(_small([frame]))
        yield frame


def _small(frames: Iterable[Pixels]) -> Iterator[Pixels]:
    return small_preview(frames, PREVIEW_SIDE)


def _previews(video: _Video, beginning: Sequence[Pixels]) -> dict[str, np.ndarray[Any, Any]]:
    """The bytes of small clips for the report: the result and, where the trajectories are kept, what it was made from."""
    store = video.context.store
    made = (video.artifact(frame[0][0]).meta["trajectory"] for frame in video.by_place[: len(beginning)])
    trajectories = [artifact for key in made if (artifact := store.find("invert", key))]
    wanted: dict[str, Iterable[Pixels]] = {"result": beginning}
    if len(trajectories) == len(beginning):
        wanted["source"] = _small(store.load(artifact, "preview")["source"] for artifact in trajectories)
        if all("reconstruction_psnr" in artifact.meta["errors"] for artifact in trajectories):
            wanted["reconstruction"] = _small(store.load(each, "preview")["reconstruction"] for each in trajectories)
    look = replace(video.look(), timing=video.clip.timing.beginning(len(beginning)), rotation=0, crf=PREVIEW_CRF)
    return {name: np.frombuffer(_mp4(video.context, frames, look), np.uint8) for name, frames in wanted.items()}


def _mp4(context: Context, frames: Iterable[Pixels], look: Look) -> bytes:
    with context.outputs.scratch() as folder:
        write_video(folder / "preview.mp4", frames, look)
        return (folder / "preview.mp4").read_bytes()


def _about(video: _Video) -> dict[str, Any]:
    """What the artifact says: its row of `metadata.jsonl`, and what it was made from."""
    errors, seconds = [], 0.0
    for frame in video.by_place:
        made = [video.artifact(key).meta for key, _ in frame]
        errors.append(made[0]["errors"])
        seconds += sum(each["seconds"] for each in made)
    row = {**_settings(video), **_figures(errors), "seconds": round(seconds, 3)}
    return {"row": row, "frames": [key for _, keys in video.windows for key in keys]}


def _settings(video: _Video) -> dict[str, Any]:
    """What it was made with: the same for the row of `metadata.jsonl` and, where frames are pictures, for their text chunks."""
    clip, timing = video.clip, video.clip.timing
    meta = video.artifact(video.by_place[0][0][0]).meta
    return {
        "prompt": meta["prompt"],
        **meta["settings"],
        "key": video.key,
        **{name: meta[name] for name in ("model", "fingerprint", "dtype", "versions")},
        "frames": len(clip.numbers),
        "frame_rate": float(timing.rate),
        "duration": timing.seconds,
        # `fps` is told by `frame_rate`
        **{name: getattr(clip.spec, name) for name in type(clip.spec).model_fields if name != "fps"},
        "sound": video.sound is not None,
    }


def _figures(errors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inversion's figures: means over the frames that have them, and the reconstruction error of every frame."""
    given = {name: [error[name] for error in errors if error[name] is not None] for name in errors[0]}
    figures = {name: _over_frames(name, values) if values else None for name, values in given.items()}
    return figures | {"frame_reconstruction_psnr": [error["reconstruction_psnr"] for error in errors]}


def _over_frames(name: str, values: Sequence[Any]) -> Any:
    """What holds of a video: what is worse for a frame is so for all of it."""
    if name == "inverted_by":
        return ", ".join(sorted(set(values)))
    if name == "inversion_converged":
        return all(values)
    if name == "reconstruction_is_estimated":
        return any(values)
    return round(fmean(values), 4)


def _file_digest(context: Context, path: Path) -> str:
    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return context.digests.of(path, "bytes", digest)
