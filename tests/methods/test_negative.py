"""Negative prompts do on plain pictures what the paper says: they bring texture back (docs/evaluation.md has the figures)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import pnp_batch
from pnp_batch.shapes.scenes import caption

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from negative import cases, regions, roughness


@pytest.mark.slow
def test_results_of_silhouettes_are_rougher_with_a_negative_prompt_than_without() -> None:
    gained = []
    for case in cases(4):
        settings = {"guidance_scale": 2, "pnp_f_t": 1.0, "pnp_attn_t": 1.0, "negative_prompt": caption(case.plain)}
        rough = {}
        for schedule in ("constant", "linear"):  # alpha 1, constant: no negative prompt
            found = pnp_batch.translate(
                case.silhouette(), caption(case.target), negative_alpha=1.0, negative_schedule=schedule, **settings
            )
            pixels = np.asarray(found.image, float)
            rough[schedule] = [roughness(pixels, region) for region in regions(case.target)]
        gained.append(np.divide(rough["linear"], rough["constant"]))
    assert np.mean(gained, axis=0).min() > 1.02
