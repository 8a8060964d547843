"""The benchmark whose truth is known: held-out scenes, new captions, every method through the ordinary pipeline.

Structure is the IoU of the object that the judge segments in a result with the known mask of the source. Text is whether the
judge reads every word that the caption made new. The judge has never seen a picture of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pnp_batch.checkpoint import resolve
from pnp_batch.engines import ENGINES, Run
from pnp_batch.errors import PnpError
from pnp_batch.evaluation.summary import summarised
from pnp_batch.manifest import Manifest, load_manifest
from pnp_batch.media.images import encode_png
from pnp_batch.monitor import View
from pnp_batch.plan import Plan, check
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.judge import HELD_OUT, PLAIN_PARTS, Judge, Reading, accuracy, iou, load_judge, read
from pnp_batch.shapes.scenes import VOCABULARY, Scene, caption, random_scene, render, stream
from pnp_batch.stages.work import Item, Unit
from pnp_batch.store import ArtifactStore
from pnp_batch.store.files import write_atomic

FIRST = HELD_OUT + 100_000  # beyond the scenes that the judge's own accuracy is measured on
EDITS = ("material and background", "style", "shape")
STRUCTURAL = EDITS[:2]  # a new shape is not meant to fill the old one's mask
BOOTSTRAPS = 1_000


@dataclass(frozen=True)
class Setting:
    """A method with its settings: one point of the plot.

    Attributes:
        method: As in a manifest.
        name: What it is called in tables.
        values: Its settings, as in a manifest.
        negative: Whether the source's caption is the negative prompt.
    """

    method: str
    name: str
    values: dict[str, Any] = field(default_factory=dict, hash=False)
    negative: bool = False

    def prompt(self, case: Case) -> dict[str, Any]:
        """The entry of a case in the manifest's `prompts`."""
        negative = {"negative_prompt": caption(case.source)} if self.negative else {}
        return {"prompt": caption(case.target), "method": self.method, **self.values, **negative}


METHODS = (
    Setting("pnp", "0.8 / 0.5"),
    Setting("pnp", "1.0 / 1.0", {"pnp_f_t": 1.0, "pnp_attn_t": 1.0}),
    Setting("pnp", "f only, 0.8 / 0", {"pnp_attn_t": 0.0}),
    Setting("pnp", "A only, 0 / 0.5", {"pnp_f_t": 0.0}),
    Setting("pnp", "0.8 / 0.5, guidance 7.5", {"guidance_scale": 7.5}),
    Setting("p2p", "word swap"),
    Setting("p2p", "refinement", {"p2p_edit": "refine"}),
    Setting("p2p", "word swap, cross only", {"p2p_self_replace": 0.0}),
    Setting("p2p", "word swap, 1.0 / 1.0", {"p2p_cross_replace": 1.0, "p2p_self_replace": 1.0}),
    Setting("ddim", "guidance 3"),
    Setting("ddim", "guidance 1", {"guidance_scale": 1.0}),
    Setting("sdedit", "strength 0.3", {"sdedit_strength": 0.3}),
    Setting("sdedit", "strength 0.5", {"sdedit_strength": 0.5}),
    Setting("sdedit", "strength 0.7", {"sdedit_strength": 0.7}),
    Setting("text-to-image", "prompt alone"),
)


@dataclass(frozen=True)
class Case:
    """A source scene and the scene that its caption should turn it into.

    Attributes:
        number: Of the source, from 0.
        edit: One of `EDITS`.
        source: The guidance image.
        target: The same with new words.
    """

    number: int
    edit: str
    source: Scene
    target: Scene

    @property
    def new_words(self) -> dict[str, str]:
        """The words to be recognised; a sketch shows neither material nor background."""
        words = {part: getattr(self.target, part) for part in VOCABULARY}
        new = {part: word for part, word in words.items() if word != getattr(self.source, part)}
        hidden = PLAIN_PARTS if self.target.style == "sketch" else ()
        return {part: word for part, word in new.items() if part not in hidden}


def cases(scenes: int) -> list[Case]:
    """Of every held-out scene one case with new material and background, and in turn one with a new style or a new shape."""
    found = []
    for number, source in enumerate(photos(scenes)):
        second = ("style", "shape")[number % 2]
        painted = replace(source, style=("painting", "sketch")[number // 2 % 2])
        changed = painted if second == "style" else replace(source, shape=_others(source)["shape"])
        found.append(Case(number, EDITS[0], source, with_new_looks(source)))
        found.append(Case(number, second, source, changed))
    return found


def with_new_looks(scene: Scene) -> Scene:
    """The scene with another material on another background."""
    other = _others(scene)
    return replace(scene, material=other["material"], background=other["background"])


def photos(count: int, wanted: Callable[[Scene], bool] = lambda scene: True) -> list[Scene]:
    """The first held-out photos of a kind."""
    found: list[Scene] = []
    seed = FIRST
    while len(found) < count:
        scene = random_scene(seed)
        if scene.style == "photo" and wanted(scene):
            found.append(scene)
        seed += 1
    return found


def _others(scene: Scene) -> dict[str, str]:
    """For every part a word that is not the scene's, from its seed."""
    rng = stream(scene.seed, 6)
    return {
        part: str(rng.choice([word for word in words if word != getattr(scene, part)]))
        for part, words in VOCABULARY.items()
    }


@dataclass(frozen=True)
class Outcome:
    """What became of one case with one setting.

    Attributes:
        case: The case.
        setting: The setting.
        structure: IoU of the judged object with the known mask.
        text: Whether every new word was recognised.
        shape_kept: Whether the target's shape was recognised.
        picture: The result, (64, 64, 3) uint8.
        errors: What its row says of the inversion.
    """

    case: Case
    setting: Setting
    structure: float
    text: bool
    shape_kept: bool
    picture: npt.NDArray[np.uint8]
    errors: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """A benchmark that was run.

    Attributes:
        settings: Its points, in order.
        outcomes: Every case with every setting.
        sources: The judged structure of the sources themselves, and of what the VAE makes of them: what is out of reach.
        judge: How often the judge is right on held-out scenes.
    """

    settings: Sequence[Setting]
    outcomes: Sequence[Outcome]
    sources: dict[str, float]
    judge: dict[str, float]

    def of(self, setting: Setting, edits: Sequence[str] = STRUCTURAL) -> list[Outcome]:
        """The outcomes of a setting."""
        return [o for o in self.outcomes if o.setting == setting and o.case.edit in edits]

    def rows(self) -> list[dict[str, Any]]:
        """One row per setting, as in the JSON file."""
        return [self._row(setting) for setting in self.settings]

    def _row(self, setting: Setting) -> dict[str, Any]:
        edits = {edit: self._figures(self.of(setting, (edit,))) for edit in EDITS}
        about = {"method": setting.method, "setting": setting.name, "values": setting.values}
        told = {name: figures for name, figures in edits.items() if figures["n"]}
        return {**about, **self._figures(self.of(setting)), "edits": told, "judge": self.judge, "sources": self.sources}

    @staticmethod
    def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Means; intervals over scenes, since the edits of one scene are not independent."""
        figures: dict[str, Any] = {"n": len(outcomes)}
        for name, key in (("structure_iou", "structure"), ("text_accuracy", "text"), ("shape_kept", "shape_kept")):
            per_scene: dict[int, list[float]] = {}
            for outcome in outcomes:
                per_scene.setdefault(outcome.case.number, []).append(float(getattr(outcome, key)))
            summary = summarised([sum(each) / len(each) for each in per_scene.values()])
            figures[name] = sum(map(sum, per_scene.values())) / len(outcomes) if outcomes else None
            figures[{"structure_iou": "ci95", "text_accuracy": "text_ci95", "shape_kept": "shape_ci95"}[name]] = (
                summary.half if summary.n > 1 else None
            )
        return figures


def run(
    folder: Path,
    found: Sequence[Case],
    settings: Sequence[Setting],
    view: View,
    *,
    model: str = "builtin:shapes",
    engine: str = "local",
    **defaults: Any,
) -> Bench:
    """Makes and judges every case with every setting. Repeated, it computes only what is missing.

    Args:
        folder: Where scenes, manifest, store and results go.
        found: The cases.
        settings: The points.
        view: Shows the progress of the run.
        model: As in a manifest; one that paints scenes.
        engine: As in a manifest.
        **defaults: Settings that hold for all.

    Raises:
        PnpError: Some results could not be made.
    """
    manifest = _written(folder, found, settings, model, engine, defaults)
    plan = _plan(manifest)
    summary = ENGINES[manifest.run.engine](Run(plan, view))
    if summary.failed:
        raise PnpError(f"{summary.failed} results of the benchmark failed; see {manifest.output / 'failures.jsonl'}")
    judge = load_judge()
    return Bench(settings, _outcomes(plan, found, settings, judge), _reach(plan, found, judge), accuracy(judge))


def _written(
    folder: Path,
    found: Sequence[Case],
    settings: Sequence[Setting],
    model: str,
    engine: str,
    defaults: dict[str, Any],
) -> Manifest:
    """The manifest of the benchmark, with the scenes beside it."""
    inputs = []
    for source in dict.fromkeys(case.source for case in found):
        name = f"scenes/{source.seed}.png"
        write_atomic(folder / name, encode_png(render(source)[0]))
        prompts = [setting.prompt(case) for case, setting in _entries(found, settings, source)]
        inputs.append({"image": name, "inversion_prompt": caption(source), "prompts": prompts})
    content = {
        "version": 1,
        "model": model,
        "output_dir": "results",
        "defaults": {"num_inference_steps": 50, "guidance_scale": 3.0, **defaults},
        "inputs": inputs,
        "run": {"engine": engine},
    }
    path = folder / "manifest.yaml"
    write_atomic(path, yaml.safe_dump(content, sort_keys=False, width=120))
    return load_manifest(path)


def _plan(manifest: Manifest) -> Plan:
    checkpoint = resolve(manifest.model, manifest.base)
    check(manifest, checkpoint)
    return Plan(manifest, checkpoint)


def _entries(found: Sequence[Case], settings: Sequence[Setting], source: Scene) -> list[tuple[Case, Setting]]:
    """What the prompts of a source stand for, in the manifest's order."""
    return [(case, setting) for case in found if case.source == source for setting in settings]


def _outcomes(plan: Plan, found: Sequence[Case], settings: Sequence[Setting], judge: Judge) -> list[Outcome]:
    worker = Worker(plan.manifest, plan.checkpoint, Silent())
    sources = list(dict.fromkeys(case.source for case in found))
    entries = [_entries(found, settings, source) for source in sources]
    made: dict[tuple[int, int], Unit] = {}
    for job in plan.jobs():
        for unit in Item(job, worker.context).units:
            loc = unit.translation.loc
            assert isinstance(loc, tuple)
            made[int(loc[1]), int(loc[3])] = unit
    places = [(i, j) for i, own in enumerate(entries) for j in range(len(own))]
    pictures = [_picture(worker.store, made[place]) for place in places]
    return [
        _judged(*entries[i][j], reading, picture, made[i, j])
        for (i, j), reading, picture in zip(places, read(judge, pictures), pictures, strict=True)
    ]


def _picture(store: ArtifactStore, unit: Unit) -> npt.NDArray[np.uint8]:
    artifact = unit.find()
    assert artifact is not None, "the run said that every result is there"
    picture: npt.NDArray[np.uint8] = store.load(artifact, "result")["image"]
    return picture


def _judged(case: Case, setting: Setting, reading: Reading, picture: npt.NDArray[np.uint8], unit: Unit) -> Outcome:
    artifact = unit.find()
    assert artifact is not None
    return Outcome(
        case=case,
        setting=setting,
        structure=iou(reading.mask, render(case.source)[1] > 127),
        text=all(reading.words[part] == word for part, word in case.new_words.items()),
        shape_kept=reading.words["shape"] == case.target.shape,
        picture=picture,
        errors=artifact.meta["errors"],
    )


def _reach(plan: Plan, found: Sequence[Case], judge: Judge) -> dict[str, float]:
    """Mean IoU of the judge's mask with the known one: in the sources, and in what comes back from their inversion."""
    worker = Worker(plan.manifest, plan.checkpoint, Silent())
    sources = {str(case.source.seed): case.source for case in found}
    previews: dict[str, list[tuple[Scene, Any]]] = {"picture": [], "reconstruction": []}
    for job in plan.jobs():
        artifact = Item(job, worker.context).find()
        if job.needs_trajectory and artifact is not None:
            preview = worker.store.load(artifact, "preview")
            previews["picture"].append((sources[job.source.stem.name], preview["source"]))
            previews["reconstruction"].append((sources[job.source.stem.name], preview["reconstruction"]))
    return {
        name: sum(
            iou(reading.mask, render(scene)[1] > 127)
            for (scene, _), reading in zip(pairs, read(judge, [picture for _, picture in pairs]), strict=True)
        )
        / len(pairs)
        for name, pairs in previews.items()
    }


# --- the claim: PnP lies above the baselines' trade-off ---------------------------------------------------------------


@dataclass(frozen=True)
class Margin:
    """How far a setting lies above the baselines' trade-off curve.

    Attributes:
        setting: The setting.
        structure: Its structure minus the curve's at its text accuracy.
        low: Lower end of the 95% interval over scenes.
        high: Upper end.
    """

    setting: Setting
    structure: float
    low: float
    high: float


def margins(bench: Bench, method: str = "pnp") -> list[Margin]:
    """The margin of each setting of a method, with percentile bootstrap intervals over scenes.

    The curve is the upper hull of the baselines' points: what any of them reaches at a text accuracy, or a mixture of two of
    them would. Beyond the most accurate baseline it stays at that one's structure.
    """
    baselines = [s for s in bench.settings if s.method != method]
    own = [s for s in bench.settings if s.method == method]
    if not baselines or not own:
        return []
    numbers = sorted({o.case.number for o in bench.outcomes if o.case.edit in STRUCTURAL})
    sums = {setting: _sums(bench, setting, numbers) for setting in (*own, *baselines)}
    rng = np.random.default_rng(0)
    draws = [np.arange(len(numbers)), *rng.integers(len(numbers), size=(BOOTSTRAPS, len(numbers)))]
    found: dict[Setting, list[float]] = {setting: [] for setting in own}
    for draw in draws:
        means = {setting: table[draw].sum(0)[:2] / table[draw].sum(0)[2] for setting, table in sums.items()}
        curve = np.array(_hull([(float(means[s][1]), float(means[s][0])) for s in baselines]))
        for setting in own:
            structure, text = means[setting]
            found[setting].append(float(structure - np.interp(text, curve[:, 0], curve[:, 1])))
    return [Margin(s, each[0], *map(float, np.percentile(each[1:], (2.5, 97.5)))) for s, each in found.items()]


def _sums(bench: Bench, setting: Setting, numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """(scenes, 3): sums of structure and text over a scene's edits, and their count."""
    table = np.zeros((len(numbers), 3))
    for outcome in bench.of(setting):
        table[numbers.index(outcome.case.number)] += (outcome.structure, outcome.text, 1)
    return table


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper hull of (text, structure) points from left to right, falling: points that another one beats are no part."""
    best = [p for p in sorted(points) if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
    hull: list[tuple[float, float]] = []
    for point in dict.fromkeys(best):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]) -> bool:
    """Whether the middle point lies on or below the line between its neighbours."""
    return (second[1] - first[1]) * (third[0] - first[0]) <= (third[1] - first[1]) * (second[0] - first[0])
