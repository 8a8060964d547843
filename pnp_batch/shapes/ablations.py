"""The paper's ablations, remade on scenes whose truth is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.evaluation.summary import summarised
from pnp_batch.monitor import View
from pnp_batch.shapes.benchmark import EDITS, Bench, Case, Setting, cases, photos, run, with_new_looks
from pnp_batch.shapes.judge import Examined
from pnp_batch.shapes.models import scene_model

THRESHOLDS = (0.0, 0.2, 0.5, 0.8, 1.0)
INVERSION_STEPS = (100, 200, 250, 500, 999)  # besides the sampling steps themselves
PLAIN_MATERIALS = ("red", "blue", "green", "yellow", "purple", "white", "black")
PLAIN_BACKGROUNDS = ("grey", "snow", "sand")


@dataclass(frozen=True)
class InversionPoint:
    """One way to invert.

    Attributes:
        rows: UNet rows a picture.
        psnr: Mean reconstruction PSNR in dB, against the picture.
        ci95: Half of its 95% interval; None for one picture.
    """

    rows: float
    psnr: float
    ci95: float | None


@dataclass(frozen=True)
class Ablations:
    """All of them.

    Attributes:
        thresholds: Every pair of `THRESHOLDS`, f before A.
        sites: f and A at one layer alone.
        inversions: Plain DDIM after each way to invert.
        negatives: Negative prompting on plain scenes.
    """

    thresholds: Bench
    sites: Bench
    inversions: Bench
    negatives: Bench

    @property
    def inversion_points(self) -> list[InversionPoint]:
        """What each way to invert costs and what comes back, in the order of its settings."""
        points = []
        for setting in self.inversions.settings:
            errors = [outcome.errors for outcome in self.inversions.of(setting)]
            psnr = summarised([float(each["reconstruction_psnr"]) for each in errors])
            rows = sum(each["inversion_rows"] for each in errors) / len(errors)
            points.append(InversionPoint(rows, psnr.mean, psnr.half if psnr.n > 1 else None))
        return points

    @property
    def vae_psnr(self) -> float:
        """What the VAE alone reaches, in dB."""
        errors = [float(outcome.errors["vae_psnr"]) for outcome in self.inversions.outcomes]
        return sum(errors) / len(errors)

    def rows(self) -> list[dict[str, Any]]:
        """One row per point, as in the JSON file."""
        benches = {"thresholds": self.thresholds, "sites": self.sites, "negative prompting": self.negatives}
        rows = [{"ablation": name, **row} for name, bench in benches.items() for row in bench.rows()]
        inversions = [
            {"ablation": "inversion", **row, "unet_rows": point.rows, "psnr": point.psnr, "psnr_ci95": point.ci95}
            for row, point in zip(self.inversions.rows(), self.inversion_points, strict=True)
        ]
        return [*rows, *inversions]


def run_ablations(
    folder: Path, scenes: int, view: View, judge: Examined, model: str = "builtin:shapes", steps: int = 50
) -> Ablations:
    """Runs all ablations. Repeated, it computes only what is missing.

    Args:
        folder: Where everything goes.
        scenes: Held-out scenes for each.
        view: Shows the progress.
        judge: Who judges.
        model: As in a manifest.
        steps: Sampling steps.
    """
    how: dict[str, Any] = {"model": model, "steps": steps}
    checkpoint = scene_model(model, folder)
    found = [case for case in cases(scenes) if case.edit == EDITS[0]]
    layers = _layers(checkpoint)
    return Ablations(
        inversions=run(folder / "inversion", found, inversion_settings(checkpoint, steps), view, judge, **how),
        thresholds=run(folder / "thresholds", found, threshold_settings(), view, judge, **how),
        sites=run(folder / "sites", found, site_settings(*layers), view, judge, **how),
        negatives=run(folder / "negatives", plain_cases(scenes), negative_settings(), view, judge, **how),
    )


def threshold_settings() -> list[Setting]:
    """Every pair of thresholds for f and A."""
    pairs = [(f, a) for f in THRESHOLDS for a in THRESHOLDS]
    return [Setting("pnp", f"{f:g} / {a:g}", {"pnp_f_t": f, "pnp_attn_t": a}) for f, a in pairs]


def site_settings(f_layers: Iterable[int], attn_layers: Iterable[int]) -> list[Setting]:
    """f at one decoder layer alone, and A at one alone, each at the first 0.8 of the steps."""
    only_f = [Setting("pnp", f"f {k}", {"pnp_f_t": 0.8, "pnp_attn_t": 0.0, "pnp_f_layers": [k]}) for k in f_layers]
    only_a = [
        Setting("pnp", f"A {k}", {"pnp_f_t": 0.0, "pnp_attn_t": 0.8, "pnp_attn_layers": [k]}) for k in attn_layers
    ]
    return [*only_f, *only_a]


def _layers(checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """All decoder layers, and those with self-attention."""
    blocks = checkpoint.unet["up_block_types"]
    per_block = checkpoint.unet["layers_per_block"] + 1
    layers = list(range(len(blocks) * per_block))
    return layers, [layer for layer in layers if blocks[layer // per_block] == "CrossAttnUpBlock2D"]


def plain_cases(scenes: int) -> list[Case]:
    """Plain objects on plain grounds, the minimal guidance images for which the paper uses negative prompts."""
    sources = photos(scenes, lambda s: s.material in PLAIN_MATERIALS and s.background in PLAIN_BACKGROUNDS)
    return [Case(n, EDITS[0], source, with_new_looks(source)) for n, source in enumerate(sources)]


def negative_settings() -> list[Setting]:
    """PnP with and without the source's caption as the negative prompt, at two strengths of guidance.

    alpha mixes the empty prompt into the negative one; 0 is the negative prompt alone.
    """
    return [
        Setting("pnp", f"guidance {scale:g}, {name}", {"guidance_scale": scale, "negative_alpha": alpha}, negative)
        for scale in (3.0, 7.5)
        for name, alpha, negative in (("off", 0.0, False), ("alpha 0.5", 0.5, True), ("alpha 0", 0.0, True))
    ]


def inversion_settings(checkpoint: Checkpoint, sampled: int) -> list[Setting]:
    """Ways to invert whose timesteps hold the sampling ones."""
    steps = [n for n in (sampled, *INVERSION_STEPS) if checkpoint.schedule.contains(n, sampled)]
    ways: list[dict[str, Any]] = [{"inversion_method": "ddim", "num_inversion_steps": n} for n in dict.fromkeys(steps)]
    explicit = [Setting("ddim", f"ddim {way['num_inversion_steps']}", way) for way in ways]
    return [*explicit, Setting("ddim", "fixed-point", {"inversion_method": "fixed-point"})]
