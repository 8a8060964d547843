"""From a manifest to work packages, content keys and a cost estimate. Pure, streaming, no torch.

A *job* is one guidance image with one set of inversion settings and all the prompts that share them. A *work package* is
a few dozen jobs of one geometry: what an engine hands to a worker. Packages and the batches in them are functions of the
plan alone, never of what happens to be missing, so that a resumed run repeats the very same batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from pnp_batch import clips
from pnp_batch.checkpoint import Checkpoint, Schedule
from pnp_batch.clips import SEGMENT, Window
from pnp_batch.errors import ItemError, ManifestError, ModelError, Problem
from pnp_batch.inputs import Expansion, Source, Translation
from pnp_batch.ledger import Ledger
from pnp_batch.manifest import METHODS_OF, Loc, Manifest, Row, Settings, VideoSpec, means_nothing
from pnp_batch.media.images import DECODE_VERSION, fitted_size, picture_size
from pnp_batch.media.video import VIDEO_VERSION
from pnp_batch.methods import METHODS
from pnp_batch.store.keys import canonical_json, key_of, sha256

PACKAGE_JOBS = 32

CONSISTENCY_VERSION = 1  # part of the key of every frame that is translated together with others

INVERT_VERSION = 1  # part of every trajectory key: raise it when the same settings give other latents

# Which settings decide a trajectory, said once: a batch of inversions shares the first three and the step count; prompts differ.
SHARED_INVERSION_SETTINGS = ("inversion_method", "num_inversion_steps", "inversion_tolerance")
INVERSION_SETTINGS = (*SHARED_INVERSION_SETTINGS, "inversion_prompt")
TRAJECTORY_SETTINGS = ("height", "width", "num_inference_steps", *INVERSION_SETTINGS)
GUIDANCE_SETTINGS = ("guidance_scale", "negative_prompt", "negative_alpha", "negative_schedule")

# UNet rows of a fixed-point inversion by sampling steps, measured on the built-in model (docs/performance.md, *Inversion*).
FIXED_POINT_ROWS = {2: 14, 3: 24, 4: 28, 6: 34, 10: 41, 20: 51, 50: 61, 100: 106}

Size = tuple[int, int]


@dataclass(frozen=True)
class Job:
    """One guidance image, one set of inversion settings, all prompts that share them.

    Attributes:
        source: The guidance image.
        size: Width and height to work at; None where the picture's header could not be read.
        settings: Those of its first prompt; the trajectory settings are the same for all.
        translations: The target prompts.
        window: The window it is a frame of, or None for a picture.
        place: Of the frame among the chosen ones of its clip.
    """

    source: Source
    size: Size | None
    settings: Settings
    translations: tuple[Translation, ...]
    window: Window | None = None
    place: int = 0

    @property
    def is_repeat(self) -> bool:
        """Whether the window before holds this frame, too."""
        return self.window is not None and self.place < self.window.first + self.window.shared

    @property
    def is_last(self) -> bool:
        """Whether it is the last frame of its clip."""
        return self.window is not None and self.place + 1 == len(self.window.clip.numbers)

    @property
    def is_joint(self) -> bool:
        """Whether the frames of its window are translated together."""
        return self.window is not None and _is_joint(self.settings)

    @property
    def prompt(self) -> str:
        """The source prompt: what it is inverted or generated with."""
        return self.source.generate.prompt if self.source.generate else self.settings.inversion_prompt

    @property
    def needs_trajectory(self) -> bool:
        """Whether it is to be inverted or generated; else its picture is only encoded."""
        return self.source.generate is not None or METHODS[self.settings.method].needs == "trajectory"

    @property
    def own_steps(self) -> int | None:
        """Steps of the grid its trajectory is made on; None where that is the sampling grid itself."""
        return self.source.generate.num_inference_steps if self.source.generate else self.settings.num_inversion_steps

    @property
    def generated(self) -> dict[str, Any] | None:
        """How its picture is sampled, the number of steps decided; None for a picture from a file."""
        if self.source.generate is None:
            return None
        steps = self.own_steps or self.settings.num_inference_steps
        return self.source.generate.model_dump() | {"num_inference_steps": steps}


@dataclass(frozen=True)
class Package:
    """Jobs of one geometry, in plan order; or the frames of one window of a video."""

    index: int
    jobs: tuple[Job, ...]

    @property
    def translations(self) -> int:
        """How many results it holds."""
        return sum(len(job.translations) for job in self.jobs)


@dataclass(frozen=True)
class _Sent:
    """A job as text holds it: of a window just where it is, since its clip holds the time of every frame."""

    source: Source
    size: Size | None
    settings: Settings
    translations: tuple[Translation, ...]
    window: tuple[int, int, bool] | None
    place: int


_SENT = TypeAdapter(tuple[_Sent, ...])


def package_to_json(package: Package) -> str:
    """A package as text, for a worker in another process."""
    sent = tuple(
        _Sent(job.source, job.size, job.settings, job.translations, job.window.cut if job.window else None, job.place)
        for job in package.jobs
    )
    return json.dumps({"index": package.index, "jobs": _SENT.dump_python(sent, mode="json")})


def package_from_json(text: str, store: Path, ledger: Ledger | None = None) -> Package:
    """The package that `package_to_json` was given; one job without a size for a video that cannot be read any more.

    Args:
        text: What it gave.
        store: Folder of the store, where it is noted what is known of clips.
        ledger: Where it is noted whom decoding one kills, should it have changed since.
    """
    content = json.loads(text)
    sent = _SENT.validate_python(content["jobs"])
    window, first = None, sent[0]
    if first.window is not None and first.source.video is not None and first.source.path is not None:
        try:
            window = Window(clips.opened(first.source.path, first.source.video, store, ledger), *first.window)
        except ItemError:
            return Package(content["index"], (Job(first.source, None, first.settings, first.translations),))
    jobs = (Job(each.source, each.size, each.settings, each.translations, window, each.place) for each in sent)
    return Package(content["index"], tuple(jobs))


@dataclass
class Estimate:
    """What a plan costs, counted before anything runs.

    Attributes:
        trajectories: To be made: one for each guidance image, or frame, and each set of settings that decides it.
        translations: Results.
        inversion_rows: UNet rows of trajectories.
        source_rows: UNet rows that read features of guidance images.
        target_rows: UNet rows of results.
        disk_bytes: At most.
        row_cells: UNet rows times the latent cells of each.
    """

    trajectories: int = 0
    translations: int = 0
    inversion_rows: int = 0
    source_rows: int = 0
    target_rows: int = 0
    disk_bytes: int = 0
    row_cells: float = 0.0

    @property
    def rows(self) -> int:
        """UNet rows in all."""
        return self.inversion_rows + self.source_rows + self.target_rows

    def add(self, job: Job, checkpoint: Checkpoint, *, has_trajectory: bool = False) -> None:
        """Counts one job."""
        width, height = job.size or (0, 0)
        cells = width * height // checkpoint.cell**2
        has_trajectory = has_trajectory or job.is_repeat
        inversion = 0 if has_trajectory else _trajectory_rows(job, checkpoint.schedule)
        source = _source_rows(job)
        target = sum(METHODS[t.settings.method].target_rows(t.settings) for t in job.translations)
        if job.is_joint:  # each segment's keyframe goes first, and every frame's features are read at every step
            source = round(job.settings.num_inference_steps * (1 + 1 / SEGMENT))
            target = round(target * (1 + 1 / SEGMENT))
        self.trajectories += not has_trajectory
        self.translations += len(job.translations) if job.place == 0 else 0  # a video is one result a prompt
        self.inversion_rows += inversion
        self.source_rows += source
        self.target_rows += target
        self.row_cells += (inversion + source + target) * cells
        picture = 3 * width * height
        kept = job.settings.num_inference_steps * 16 * cells if job.needs_trajectory else 0
        trajectory = 0 if has_trajectory else kept + 2 * picture
        # A result is kept as raw pixels and latent in the store and as a PNG, which hardly shrinks a photograph.
        self.disk_bytes += trajectory + len(job.translations) * (2 * picture + 16 * cells)


def _source_rows(job: Job) -> int:
    """Rows that the prompts of one method share, for every method of the job."""
    most: dict[str, int] = {}
    for translation in job.translations:
        name = translation.settings.method
        most[name] = max(most.get(name, 0), METHODS[name].source_rows(translation.settings))
    return sum(most.values())


def _trajectory_rows(job: Job, schedule: Schedule) -> int:
    """UNet rows of a trajectory: counted for `ddim` and generated pictures, expected for `fixed-point`."""
    steps = job.settings.num_inference_steps
    if not job.needs_trajectory:
        return 0
    if job.source.generate is not None:
        return (job.own_steps or steps) * (1 if job.source.generate.guidance_scale in (0, 1) else 2)
    if job.settings.inversion_method == "fixed-point":
        return _fixed_point_rows(steps)
    # The round trip that measures the reconstruction error is part of it.
    return schedule.steps_up_to(steps, job.own_steps or steps) + steps


@cache
def _fixed_point_rows(steps: int) -> int:
    """Between the step counts that were measured by a straight line, beyond them in proportion."""
    most = max(FIXED_POINT_ROWS)
    if steps > most:
        return round(steps * FIXED_POINT_ROWS[most] / most)
    return round(np.interp(steps, [*FIXED_POINT_ROWS], [*FIXED_POINT_ROWS.values()]))


@dataclass
class Plan:
    """The work of a manifest on a model. Iterating `packages()` again gives the same packages again."""

    manifest: Manifest
    checkpoint: Checkpoint
    limit: int | None = None
    only: frozenset[str] | None = None

    def jobs(self) -> Iterator[Job]:
        """All jobs in manifest order; stops after `limit` sources. The frames of a video are jobs, window by window.

        Raises:
            ManifestError: Something became wrong since the manifest was checked.
        """
        expansion = Expansion(self.manifest)
        taken = 0
        for source, translations in expansion:
            if self.only is not None:
                translations = tuple(t for t in translations if unit_id(source, t) in self.only)
            if not translations:
                continue
            if source.video is None:
                yield from jobs_of(source, translations, self.checkpoint)
            else:
                yield from _frames_of(source, source.video, translations, self.manifest, self.checkpoint)
            taken += 1
            if taken == self.limit:
                return
        if expansion.problems:
            raise ManifestError(expansion.problems)

    def strangers(self) -> int:
        """How many of the results it is limited to the manifest does not name."""
        strange = set(self.only or ())
        for source, translations in Expansion(self.manifest):
            strange.difference_update(unit_id(source, each) for each in translations)
        return len(strange)

    def retries(self, source: Source, translations: Iterable[Translation]) -> Iterator[Job]:
        """The jobs that the quality gate may make of some translations of a picture."""
        for retry in self.manifest.quality.retry if self.manifest.quality else ():
            others = [replace(each, settings=each.settings.retried(retry)) for each in translations]
            yield from jobs_of(source, others, self.checkpoint)

    def packages(self) -> Iterator[Package]:
        """The work, cut into packages."""
        return packages_of(self.jobs())

    def estimate(self) -> Estimate:
        """Counts trajectories, results, UNet rows and bytes."""
        estimate = Estimate()
        for job in self.jobs():
            estimate.add(job, self.checkpoint)
        return estimate


def packages_of(jobs: Iterable[Job]) -> Iterator[Package]:
    """Jobs collected by geometry, `PACKAGE_JOBS` at a time; at most one open package per geometry is held.

    The frames of a video's window, which come one behind the other, are a package of their own.
    """
    open_jobs: dict[Any, list[Job]] = {}
    numbers = count()
    for job in jobs:
        own = (job.own_steps, job.source.generate is None, job.needs_trajectory)
        kind = "window" if job.window else (job.size, *own, *_package_settings(job.settings))
        open_jobs.setdefault(kind, []).append(job)
        if len(open_jobs[kind]) == (job.window.count if job.window else PACKAGE_JOBS):
            yield Package(next(numbers), tuple(open_jobs.pop(kind)))
    for rest in open_jobs.values():
        yield Package(next(numbers), tuple(rest))


def jobs_of(source: Source, translations: Iterable[Translation], checkpoint: Checkpoint) -> Iterator[Job]:
    """The jobs of a guidance image: its translations by trajectory settings."""
    groups: dict[tuple[Any, ...], list[Translation]] = {}
    for translation in translations:
        groups.setdefault(_shared_settings(source, translation.settings), []).append(translation)
    for group in groups.values():
        settings = group[0].settings
        yield Job(source, _working_size(source, settings, checkpoint), settings, tuple(group))


def _shared_settings(source: Source, settings: Settings) -> tuple[Any, ...]:
    """What translations must agree in to share a job; how to invert is no question where nothing is inverted."""
    needed = source.generate is not None or METHODS[settings.method].needs == "trajectory"
    return (needed, *(_trajectory_settings if needed else _latent_settings)(settings))


_trajectory_settings = attrgetter(*TRAJECTORY_SETTINGS)
_latent_settings = attrgetter("height", "width", "num_inference_steps")
_package_settings = attrgetter("num_inference_steps", *SHARED_INVERSION_SETTINGS)


def _frames_of(
    source: Source, spec: VideoSpec, translations: Iterable[Translation], manifest: Manifest, checkpoint: Checkpoint
) -> Iterator[Job]:
    """The frames of a video, window by window; one job without a size for a video that cannot be read."""
    assert source.path is not None
    groups: dict[tuple[Any, ...], list[Translation]] = {}
    for each in translations:
        groups.setdefault((_is_joint(each.settings), *_shared_settings(source, each.settings)), []).append(each)
    for group in groups.values():
        settings = group[0].settings
        job = Job(source, None, settings, tuple(group))
        try:
            # Without a limit of time: it goes through the whole clip.
            ledger = Ledger(manifest.output / "ledger", manifest.run.max_attempts)
            clip = clips.opened(source.path, spec, manifest.store, ledger)
            size = fitted_size(
                clip.footage.size, settings.height, settings.width, checkpoint.sample_size, checkpoint.cell
            )
        except ItemError:
            yield job
            continue
        for window in clip.windows(overlapping=_is_joint(settings)):
            places = range(window.first, window.first + window.count)
            yield from (replace(job, size=size, window=window, place=place) for place in places)


def _is_joint(settings: Settings) -> bool:
    """Whether frames of a video are translated together; methods that cannot translate each on its own."""
    return settings.consistency == "keyframes" and bool(METHODS[settings.method].joint)


def _working_size(source: Source, settings: Settings, checkpoint: Checkpoint) -> Size | None:
    """None for a picture that cannot be read: the worker meets it again and reports it as a failed item."""
    is_fixed = source.path is None or (settings.height and settings.width)  # then its own size need not be read
    try:
        picture = (1, 1) if is_fixed or source.path is None else picture_size(source.path)
        return fitted_size(picture, settings.height, settings.width, checkpoint.sample_size, checkpoint.cell)
    except ItemError:
        return None


def unit_id(source: Source, translation: Translation) -> str:
    """What a result is called before its pixels are known: source, prompt and settings.

    A picture goes by its name, so that lists of failures hold when the manifest's folder is moved or reached another way.
    """
    return _result_digest(source.name, source, translation)


def _result_digest(place: str, source: Source, translation: Translation) -> str:
    if source.generate is not None:
        place = canonical_json(source.generate.model_dump())
    if source.video is not None:
        place += canonical_json(source.video.model_dump())
    return sha256(f"{place}\n{translation.id}".encode(errors="surrogateescape"))


def trajectory_key(job: Job, pixels: str | None, fingerprint: str, dtype: str) -> str:
    """Key of a trajectory: everything that decides its latents; of a picture that is only encoded, its pixels.

    Args:
        job: The job.
        pixels: Digest of the decoded, resized pixels; None for a generated image.
        fingerprint: Of the model.
        dtype: The UNet's.
    """
    settings = job.settings
    if not job.needs_trajectory:
        encoded = {"stage": "invert", "encoded": pixels, "version": INVERT_VERSION, "size": job.size}
        return key_of(encoded | {"model": fingerprint, "dtype": dtype})
    content: dict[str, Any] = {
        "stage": "invert",
        "version": INVERT_VERSION,
        "model": fingerprint,
        "dtype": dtype,
        "size": job.size,
        "num_inference_steps": settings.num_inference_steps,
    }
    if job.generated is not None:
        content |= {"generate": job.generated}
    else:
        content |= {"pixels": pixels, **{name: getattr(settings, name) for name in INVERSION_SETTINGS}}
        if settings.inversion_method == "ddim":
            del content["inversion_tolerance"]  # it means nothing there
    return key_of(content)


def translation_key(
    translation: Translation,
    trajectory: str,
    layers: tuple[Sequence[int], Sequence[int]],
    compression: str = "none",
    window: Mapping[str, Any] | None = None,
) -> str:
    """Key of a result: its trajectory's key, the prompt, and every setting of the method.

    A bank changes cost, not the result, and is not in it; but a compressed one rounds, so the compression is. For a frame that
    is translated together with others, `window` says which.
    """
    settings = translation.settings
    method = METHODS[settings.method]
    content: dict[str, Any] = {
        "stage": "translate",
        "method": settings.method,
        "version": method.version,
        "trajectory": trajectory,
        "prompt": translation.prompt,
    }
    if method.uses_layers:
        content |= {"pnp_f_layers": list(layers[0]), "pnp_attn_layers": list(layers[1])}
        if compression != "none":
            content["bank_compression"] = compression
    if window is not None:
        content |= {"consistency": settings.consistency, "consistency_version": CONSISTENCY_VERSION, "window": window}
    return key_of(content | {name: getattr(settings, name) for name in (*GUIDANCE_SETTINGS, *method.settings)})


def noted_digest(job: Job) -> tuple[Path, str] | None:
    """The file a job's pixels come from and what its digest is called there; None for a generated picture."""
    path, size, window = job.source.path, job.size or (0, 0), job.window
    if path is None or window is None:
        return None if path is None else (path, pixels_of(size))
    number = window.clip.numbers[job.place]
    if window.clip.footage.files:
        return path / window.clip.footage.files[number], pixels_of(size)
    return path, f"frame {number} {window.clip.spec.partial} {VIDEO_VERSION} {pixels_of(size)}"


def pixels_of(size: Size) -> str:
    """What a pixel digest is a digest of: the decoder's version and the size, for the digest cache."""
    return f"pixels {size[0]}x{size[1]} decoder {DECODE_VERSION}"


@dataclass(frozen=True)
class Checked:
    """What a valid manifest names.

    Attributes:
        sources: Guidance images.
        translations: Results.
        warnings: Prompts that will be cut, sizes that will be rounded, pictures without prompts.
    """

    sources: int
    translations: int
    warnings: list[str]


def check(manifest: Manifest, checkpoint: Checkpoint) -> Checked:
    """Everything about a manifest that can be known before anything is started, without opening a picture.

    Raises:
        ManifestError: With every problem found: files, prompts, step grids, layers, collisions.
    """
    checker = _Checker(manifest, checkpoint)
    expansion = Expansion(manifest)
    checked: tuple[Translation, ...] = ()
    sources = 0
    for source, translations in expansion:
        if source.generate is not None or translations is not checked:
            for translation in translations:
                checker.check(source, translation)
            checked = translations
        checker.check_is_new(source, translations)
        sources += 1
    if problems := [*_wrong_anyway(manifest, expansion), *checker.problems, *checker.meaningless()]:
        raise ManifestError(problems)
    return Checked(sources, checker.results, [*expansion.warnings, *checker.warnings])


def problems_without_model(manifest: Manifest) -> list[Problem]:
    """What is wrong with a manifest whose model cannot be had, as far as that can be told."""
    expansion = Expansion(manifest)
    for _ in expansion:
        pass
    return _wrong_anyway(manifest, expansion)


def _wrong_anyway(manifest: Manifest, expansion: Expansion) -> list[Problem]:
    """Problems that are none of the model's, once the sources were gone through."""
    return [*_misplaced(manifest), *_blind(manifest), *expansion.problems]


def _misplaced(manifest: Manifest) -> Iterator[Problem]:
    """Output and store must be folders, or places where folders can be made."""
    for loc, place in ((("output_dir",), manifest.output), (("run", "store"), manifest.store)):
        there = next(path for path in (place, *place.parents) if os.path.lexists(path))
        if not there.is_dir():
            yield manifest.problem(loc, f"{there} is not a folder")
        elif (loc == ("output_dir",) or manifest.run.store is not None) and _is_too_long(place, there):
            yield manifest.problem(loc, "the file system does not allow names as long as this")


def _is_too_long(place: Path, there: Path) -> bool:
    """Whether a path cannot be made below a folder for the length of its names; -1 means that there is no limit."""
    name, path = (os.pathconf(there, limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
    longest = max(len(os.fsencode(part)) for part in place.parts)
    return 0 <= name < longest or 0 <= path <= len(os.fsencode(place))


def _blind(manifest: Manifest) -> Iterator[Problem]:
    """Thresholds of the quality gate whose figure there is no way to get."""
    for name, column in manifest.quality.columns.items() if manifest.quality else ():
        loc = ("quality", name)
        if column.endswith("lpips") and manifest.evaluation.lpips is None:
            yield manifest.problem(loc, "LPIPS needs weights: write `evaluation: {lpips: FILE}` (docs/evaluation.md)")
        if column.startswith("reconstruction_") and manifest.run.reconstruction == "skipped":
            yield manifest.problem(loc, "the reconstruction is not measured with `run: {reconstruction: skipped}`")


class _Checker:
    """Checks translations one by one, each distinct question once."""

    def __init__(self, manifest: Manifest, checkpoint: Checkpoint) -> None:
        self.manifest, self.checkpoint = manifest, checkpoint
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self._asked: set[Any] = set()
        self._units: set[int] = set()
        # Settings of some methods only that stand above a prompt: whether any prompt below uses them, and one that does not.
        self._shared: dict[tuple[Loc, str], tuple[bool, Translation]] = {}
        self.results = 0

    def check(self, source: Source, translation: Translation) -> None:
        """Adds to `problems` and `warnings`."""
        self._check_meaning(translation)
        for each in (translation, *self._attempts(translation)):
            method = METHODS[each.settings.method]
            self._check_source_prompt(source, each)
            self._check_words(source, each)
            if source.generate is not None or method.needs == "trajectory":
                self._check_grid(source, each)
            if method.uses_layers:
                self._check_layers(each)
            self._check_size(each)
            for key, text in self._texts(source, each).items():
                self._check_length(key, text)

    def _attempts(self, translation: Translation) -> Iterator[Translation]:
        """What the quality gate may make of a translation."""
        for number, retry in enumerate(self.manifest.quality.retry if self.manifest.quality else ()):
            loc = ("quality", "retry", number)
            yield replace(translation, settings=translation.settings.retried(retry), loc=loc)

    def check_is_new(self, source: Source, translations: Iterable[Translation]) -> None:
        """Adds a problem for every result that an earlier input names already."""
        for translation in translations:
            unit = int(_result_digest(str(source.path), source, translation)[:16], 16)  # one file may have two names
            if unit in self._units:
                what = f"{source.name} is already translated to '{translation.prompt}' with these very settings"
                self._add(translation, "prompt", what)
            self._units.add(unit)
            self.results += 1

    def meaningless(self) -> Iterator[Problem]:
        """Problems with settings of an input or of `defaults` that no prompt below them can use."""
        for (place, name), (used, translation) in self._shared.items():
            if not used:
                yield self.manifest.problem((*place, name), means_nothing(name, translation.settings.method))

    def _check_meaning(self, translation: Translation) -> None:
        """A setting that its method does not know is refused on the prompt itself; above it, if no other prompt knows it."""
        loc, method = translation.loc, translation.settings.method
        own, place = (loc.given, loc.loc) if isinstance(loc, Row) else (self._given(loc), loc[:2])
        for name in own & METHODS_OF.keys():
            if method not in METHODS_OF[name]:
                self._add(translation, name, means_nothing(name, method))
        for above in (place, ("defaults",)):
            for name in self._given(above) & METHODS_OF.keys():
                used, _ = self._shared.get((above, name), (False, translation))
                self._shared[above, name] = used or method in METHODS_OF[name], translation

    def _given(self, place: Loc) -> set[str]:
        """The names of what is written at a prompt, an input or `defaults`."""
        spec: Any = self.manifest.defaults
        if place[0] == "inputs":
            spec = self.manifest.inputs[int(place[1])]
        if len(place) > 3 and spec.prompts is not None:
            spec = spec.prompts[int(place[3])]
        return set(spec.given())

    def _check_source_prompt(self, source: Source, translation: Translation) -> None:
        settings = translation.settings
        wanting = METHODS[settings.method].needs_source_prompt and not settings.inversion_prompt.strip()
        if wanting and source.generate is None and self._first_time("source prompt", translation.loc):
            what = (
                f"`method: {settings.method}` compares the prompt with the words of the source: write inversion_prompt"
            )
            self._add(translation, "inversion_prompt", what)

    def _check_words(self, source: Source, translation: Translation) -> None:
        if translation.settings.method != "p2p" or translation.settings.p2p_edit != "replace":
            return
        before = source.generate.prompt if source.generate else translation.settings.inversion_prompt
        counts = [len(text.split()) for text in (before, translation.prompt)]
        if counts[0] != counts[1]:
            what = f"swaps words one for one, but the source's prompt has {counts[0]} and this one {counts[1]}; write refine"
            self._add(translation, "p2p_edit", what)

    def _texts(self, source: Source, translation: Translation) -> dict[str, str]:
        texts = {"prompt": translation.prompt, "negative_prompt": translation.settings.negative_prompt}
        if source.generate is None:
            return texts | {"inversion_prompt": translation.settings.inversion_prompt}
        return texts | {
            "generate.prompt": source.generate.prompt,
            "generate.negative_prompt": source.generate.negative_prompt,
        }

    def _check_grid(self, source: Source, translation: Translation) -> None:
        settings, own = translation.settings, source.generate
        key = "generate.num_inference_steps" if own else "num_inversion_steps"
        within = own.num_inference_steps if own else settings.num_inversion_steps
        steps = settings.num_inference_steps
        if self._first_time("grid", steps, within, settings.inversion_method, own is None):
            self._refuse(translation, key, lambda: self.checkpoint.schedule.sampling_grid(steps, within or steps))
            if own is None and settings.inversion_method == "fixed-point" and within is not None:
                self._add(
                    translation, key, "fixed-point inverts the sampling steps themselves; leave num_inversion_steps out"
                )

    def _check_layers(self, translation: Translation) -> None:
        settings = translation.settings
        if self._first_time("layers", settings.pnp_f_layers, settings.pnp_attn_layers):
            key = "pnp_f_layers" if settings.pnp_f_layers is not None else "pnp_attn_layers"
            default = ((), ()) if None not in (settings.pnp_f_layers, settings.pnp_attn_layers) else None
            self._refuse(
                translation,
                key,
                lambda: self.checkpoint.check_layers(*settings.layers(default or self.checkpoint.layers)),
            )

    def _refuse(self, translation: Translation, key: str, question: Any) -> None:
        try:
            question()
        except ModelError as error:
            self._add(translation, key, str(error))

    def _check_size(self, translation: Translation) -> None:
        cell = self.checkpoint.cell
        for key in ("height", "width"):
            value = getattr(translation.settings, key)
            if value and value % cell and self._first_time("size", key, value):
                self.warnings.append(
                    f"{key} {value} is rounded to {round(value / cell) * cell}: this model needs multiples of {cell}"
                )

    def _check_length(self, key: str, text: str) -> None:
        if text and self._first_time("text", text) and (cut := self.checkpoint.cut_words(text)):
            limit = self.checkpoint.max_tokens - 2
            self.warnings.append(f'{key} "{text[:40]}..." is longer than {limit} tokens; these words are cut: "{cut}"')

    def _first_time(self, *question: Any) -> bool:
        new = question not in self._asked
        self._asked.add(question)
        return new

    def _add(self, translation: Translation, key: str, message: str) -> None:
        self.problems.append(self.manifest.setting_problem(translation.loc, key, message))
