"""Shift and scale that are known are found; pictures that share no edges are said to share none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pnp_batch.evaluation.alignment import UNRELATED, PixelAlignment, align
from pnp_batch.evaluation.values import Pair
from pnp_batch.media.images import Pixels
from pnp_batch.shapes.scenes import Scene, random_scene, render

ASTRONAUT = Path(__file__).parents[1] / "conformance/astro128.png"


def moved(pixels: Pixels, x: float, y: float, scale: float) -> Pixels:
    """A picture magnified about its centre, then shifted."""
    height, width = pixels.shape[:2]
    at = (1 / scale, 0, width / 2 - (width / 2 + x) / scale, 0, 1 / scale, height / 2 - (height / 2 + y) / scale)
    picture = Image.fromarray(pixels).transform((width, height), Image.Transform.AFFINE, at, Image.Resampling.BICUBIC)
    return np.asarray(picture)


@pytest.mark.parametrize(("x", "y", "scale"), [(0, 0, 1), (4.5, -3, 1), (-8, 6, 1), (0, 0, 1.12), (3, 5, 0.9)])
def test_finds_a_known_move(x: float, y: float, scale: float) -> None:
    source = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    found = align(source[16:-16, 16:-16], moved(source, x, y, scale)[16:-16, 16:-16])
    assert (found.shift_x, found.shift_y) == (pytest.approx(x, abs=0.5), pytest.approx(y, abs=0.5))
    assert found.scale == pytest.approx(scale, rel=0.015)


def test_colours_do_not_matter() -> None:
    scene = Scene("star", "red", "sky", radius=18)
    source, _ = render(scene, 192)
    result, _ = render(replace(scene, material="gold", background="night"), 192)
    found = align(source[24:-24, 24:-24], moved(result, 6, -9, 1)[24:-24, 24:-24])
    assert (found.shift_x, found.shift_y) == (pytest.approx(6, abs=1), pytest.approx(-9, abs=1))


def test_large_pictures_are_measured_in_their_own_pixels() -> None:
    source, _ = render(random_scene(3), 512)
    found = align(source, moved(source, 20, -12, 1))
    assert (found.shift_x, found.shift_y) == (pytest.approx(20, abs=1), pytest.approx(-12, abs=1))


def test_says_when_there_is_nothing_to_align() -> None:
    a, _ = render(random_scene(1))
    b, _ = render(random_scene(101))
    plain = np.full_like(a, 127)
    rows = PixelAlignment()([Pair(a, b, "", "a"), Pair(plain, plain, "", "b")])
    assert rows == [dict.fromkeys(PixelAlignment.columns, UNRELATED)] * 2
