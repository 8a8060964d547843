"""The benchmark whose truth is known: held-out scenes, new captions, every method through the ordinary pipeline.

Structure is the IoU of the object that the judge segments in a result with the known mask of the source. Text is whether the
judge reads every word that the caption made new. The judge has never seen a picture of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pnp_batch.engines import ENGINES, Run
from pnp_batch.errors import PnpError
from pnp_batch.evaluation.summary import summarised
from pnp_batch.manifest import Manifest, load_manifest
from pnp_batch.media.images import encode_png
from pnp_batch.monitor import View
from pnp_batch.names import counted
from pnp_batch.plan import Plan, check
from pnp_batch.runner import Silent, Worker
from pnp_batch.shapes.judge import PLAIN_PARTS, Examined, Judge, Reading, iou, read
from pnp_batch.shapes.models import scene_model
from pnp_batch.shapes.scenes import HELD_OUT, VOCABULARY, Scene, caption, random_scene, render, stream
from pnp_batch.stages.work import Item, Unit
from pnp_batch.store import ArtifactStore
from pnp_batch.store.files import write_atomic

FIRST = HELD_OUT + 100_000  # beyond the scenes that the judge's own accuracy is measured on
EDITS = ("material and background", "style", "shape")
STRUCTURAL = EDITS[:2]  # a new shape is not meant to fill the old one's mask
BOOTSTRAPS = 1_000
Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution


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


def pnp(f: float, attn: float, more: str = "", **values: Any) -> Setting:
    """PnP at two thresholds."""
    return Setting("pnp", f"{f:.1f} / {attn:.1f}{more}", {"pnp_f_t": f, "pnp_attn_t": attn, **values})


def p2p(cross: float, attn: float, more: str = "", **values: Any) -> Setting:
    """Prompt-to-Prompt with two shares of the steps."""
    shares = {"p2p_cross_replace": cross, "p2p_self_replace": attn}
    return Setting("p2p", f"{cross:.1f} / {attn:.1f}{more}", {**shares, **values})


# Both methods that have a threshold for layout and one for self-attention are swept alike. Prompt-to-Prompt's limit of 16x16
# cells is a quarter of the resolution on Stable Diffusion (the authors' later code has half), and all of it on this model:
# 4x4 and 8x8 cells are the same in proportion.
METHODS = (
    pnp(0.5, 0.5),
    pnp(0.8, 0.5),
    pnp(0.8, 0.8),
    pnp(1.0, 0.5),
    pnp(1.0, 1.0),
    pnp(0.8, 0.0, ", f only"),
    pnp(0.0, 0.5, ", A only"),
    pnp(0.8, 0.5, ", guidance 7.5", guidance_scale=7.5),
    p2p(0.8, 0.4),
    p2p(0.8, 0.6),
    p2p(0.8, 0.8),
    p2p(0.8, 1.0),
    p2p(1.0, 1.0),
    p2p(0.8, 0.0, ", cross only"),
    p2p(0.8, 0.4, ", refinement", p2p_edit="refine"),
    p2p(0.8, 0.8, ", refinement", p2p_edit="refine"),
    p2p(0.8, 0.4, ", 4x4 cells", p2p_self_cells=4**2),
    p2p(0.8, 0.8, ", 4x4 cells", p2p_self_cells=4**2),
    p2p(1.0, 1.0, ", 4x4 cells", p2p_self_cells=4**2),
    p2p(0.8, 0.8, ", 8x8 cells", p2p_self_cells=8**2),
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
        model: What was measured.
        steps: Sampling steps.
    """

    settings: Sequence[Setting]
    outcomes: Sequence[Outcome]
    sources: dict[str, float]
    judge: dict[str, float]
    model: str = "builtin:shapes"
    steps: int = 50

    @property
    def scenes(self) -> int:
        """How many scenes there are."""
        return len({outcome.case.number for outcome in self.outcomes})

    def of(self, setting: Setting, edits: Sequence[str] = STRUCTURAL) -> list[Outcome]:
        """The outcomes of a setting."""
        return [o for o in self.outcomes if o.setting == setting and o.case.edit in edits]

    def rows(self) -> list[dict[str, Any]]:
        """One row per setting, as in the JSON file."""
        return [self._row(setting) for setting in self.settings]

    def _row(self, setting: Setting) -> dict[str, Any]:
        edits = {edit: _figures(self.of(setting, (edit,))) for edit in EDITS}
        return {
            "method": setting.method,
            "setting": setting.name,
            "values": setting.values,
            **_figures(self.of(setting)),
            "edits": {name: figures for name, figures in edits.items() if figures["n"]},
            "model": self.model,
            "steps": self.steps,
            "scenes": self.scenes,
            "judge": self.judge,
            "sources": self.sources,
        }


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Means with intervals over scenes, since the edits of one scene are not independent; none for a single scene."""
    scenes = len({outcome.case.number for outcome in outcomes})
    return {
        "n": len(outcomes),
        **_structure([(o.case.number, o.structure) for o in outcomes]),
        **_share("text_accuracy", "text", [o.text for o in outcomes], scenes),
        **_share("shape_kept", "shape", [o.shape_kept for o in outcomes], scenes),
    }


def _structure(values: Sequence[tuple[int, float]]) -> dict[str, float | None]:
    """The mean of values of scenes, and half of its interval."""
    per_scene: dict[int, list[float]] = {}
    for number, value in values:
        per_scene.setdefault(number, []).append(value)
    summary = summarised([sum(each) / len(each) for each in per_scene.values()])
    mean = sum(value for _, value in values) / len(values) if values else None
    return {"structure_iou": mean, "ci95": summary.half if summary.n > 1 else None}


def _share(name: str, short: str, hits: Sequence[bool], scenes: int) -> dict[str, float | None]:
    """The share of hits, and its interval as if every scene were one result: on the safe side."""
    share = sum(hits) / len(hits) if hits else None
    low, high = (None, None) if share is None or scenes < 2 else wilson95(share, scenes)
    return {name: share, f"{short}_low": low, f"{short}_high": high}


def wilson95(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n (Wilson 1927): never beyond 0 and 1, and not of no width where all are right."""
    centre = share + Z95**2 / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    scale = 1 + Z95**2 / n
    # It holds the share; where that is 0 or 1, rounding says otherwise for some n.
    return min(max((centre - spread) / scale, 0.0), share), max(min((centre + spread) / scale, 1.0), share)


def run(
    folder: Path,
    found: Sequence[Case],
    settings: Sequence[Setting],
    view: View,
    judge: Examined,
    *,
    model: str = "builtin:shapes",
    steps: int = 50,
) -> Bench:
    """Makes and judges every case with every setting. Repeated, it computes only what is missing.

    Args:
        folder: Where scenes, manifest, store and results go.
        found: The cases.
        settings: The points.
        view: Shows the progress of the run.
        judge: Who judges.
        model: As in a manifest; one that paints scenes.
        steps: Sampling steps.

    Raises:
        ModelError: The model does not paint pictures of the scenes' size.
        PnpError: Some results could not be made.
    """
    manifest = _written(folder, found, settings, model, steps)
    plan = _plan(manifest)
    summary = ENGINES[manifest.run.engine](Run(plan, view))
    if summary.failed:
        raise PnpError(
            f"{counted(summary.failed, 'result')} of the benchmark failed; see {manifest.output / 'failures.jsonl'}"
        )
    return Bench(
        settings,
        _outcomes(plan, found, settings, judge.judge),
        _reach(plan, found, judge.judge),
        judge.accuracy,
        model,
        steps,
    )


def _written(folder: Path, found: Sequence[Case], settings: Sequence[Setting], model: str, steps: int) -> Manifest:
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
        "defaults": {"num_inference_steps": steps, "guidance_scale": 3.0},
        "inputs": inputs,
        "run": {"engine": "local"},
    }
    path = folder / "manifest.yaml"
    write_atomic(path, yaml.safe_dump(content, sort_keys=False, width=120))
    return load_manifest(path)


def _plan(manifest: Manifest) -> Plan:
    checkpoint = scene_model(manifest.model, manifest.base)
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


def is_small_in_proportion(setting: Setting) -> bool:
    """Whether no self-attention map is taken over that Prompt-to-Prompt would leave alone on Stable Diffusion."""
    return not setting.values.get("p2p_self_replace", 1) or "p2p_self_cells" in setting.values


# Which settings of the baselines make up a curve.
CURVES: Mapping[str, Callable[[Setting], bool]] = {
    "all baselines": lambda setting: True,
    "P2P with its limit in proportion": lambda setting: setting.method != "p2p" or is_small_in_proportion(setting),
    "without P2P": lambda setting: setting.method != "p2p",
}


@dataclass(frozen=True)
class Margin:
    """How far a setting lies above a trade-off curve of baselines.

    Attributes:
        setting: The setting.
        curve: One of `CURVES`.
        structure: Its structure minus the curve's at its text accuracy.
        low: Lower end of the 95% interval over scenes; None for a single scene.
        high: Upper end.
    """

    setting: Setting
    curve: str
    structure: float
    low: float | None
    high: float | None


def margins(bench: Bench, method: str = "pnp") -> list[Margin]:
    """The margin of each setting of a method above each curve, with percentile bootstrap intervals over scenes.

    A curve is the upper hull of the baselines' points: what any of them reaches at a text accuracy, or a mixture of two of
    them would. Beyond the most accurate baseline it stays at that one's structure.
    """
    own = [s for s in bench.settings if s.method == method]
    others = [s for s in bench.settings if s.method != method]
    curves = {name: [s for s in others if belongs(s)] for name, belongs in CURVES.items()}
    numbers = sorted({o.case.number for o in bench.outcomes if o.case.edit in STRUCTURAL})
    sums = {setting: _sums(bench, setting, numbers) for setting in bench.settings}
    rng = np.random.default_rng(0)
    draws = [np.arange(len(numbers)), *rng.integers(len(numbers), size=(BOOTSTRAPS, len(numbers)))]
    found: dict[tuple[Setting, str], list[float]] = {}
    for draw in draws:
        means = {setting: table[draw].sum(0)[:2] / table[draw].sum(0)[2] for setting, table in sums.items()}
        for name, baselines in curves.items():
            curve = np.array(hull([(float(means[s][1]), float(means[s][0])) for s in baselines]))
            for setting in own if baselines else ():
                structure, text = means[setting]
                above = float(structure - np.interp(text, curve[:, 0], curve[:, 1]))
                found.setdefault((setting, name), []).append(above)
    return [
        Margin(setting, name, each[0], *_interval(each[1:], len(numbers))) for (setting, name), each in found.items()
    ]


def _interval(draws: Sequence[float], scenes: int) -> tuple[float | None, float | None]:
    """The 95% percentile interval of bootstrap draws."""
    if scenes < 2:
        return None, None
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def _sums(bench: Bench, setting: Setting, numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """(scenes, 3): sums of structure and text over a scene's edits, and their count."""
    table = np.zeros((len(numbers), 3))
    for outcome in bench.of(setting):
        table[numbers.index(outcome.case.number)] += (outcome.structure, outcome.text, 1)
    return table


def hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The upper hull of (text, structure) points from left to right, falling: points that another one beats are no part."""
    best = [p for p in sorted(points) if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)]
    falling: list[tuple[float, float]] = []
    for point in dict.fromkeys(best):
        while len(falling) > 1 and _turns_up(falling[-2], falling[-1], point):
            falling.pop()
        falling.append(point)
    return falling


def _turns_up(first: tuple[float, float], second: tuple[float, float], third: tuple[float, float]) -> bool:
    """Whether the middle point lies on or below the line between its neighbours."""
    return (second[1] - first[1]) * (third[0] - first[0]) <= (third[1] - first[1]) * (second[0] - first[0])
