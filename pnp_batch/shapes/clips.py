"""Short procedural clips: one object moves, turns and grows over a still background, by a known motion.

`manifests/clips/red-cross-on-grass.mp4` is `clip(3, 16)` at eight frames a second.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pnp_batch.shapes.scenes import (
    MAX_ANGLE,
    MAX_RADIUS,
    MIN_RADIUS,
    SIDE,
    Scene,
    centre_range,
    random_scene,
    render,
    stream,
)


class Clip(NamedTuple):
    """A rendered clip.

    Attributes:
        frames: The pictures, uint8 (F, size, size, 3).
        masks: The object's alpha in every frame, uint8 (F, size, size); see `render`.
        motion: Float64 (F, 2, 3). `motion[f] @ (x, y, 1)` is where the object's point (x, y) of frame 0 is in frame f,
            in pixels from the top left corner of the picture (the first pixel's centre is at 0.5, 0.5). The object's
            texture moves along; the light stays at the upper left.
    """

    frames: npt.NDArray[np.uint8]
    masks: npt.NDArray[np.uint8]
    motion: npt.NDArray[np.float64]


def clip(seed: int, frames: int = 16, size: int = 64) -> Clip:
    """Renders the clip of a seed; its caption is that of any of its `clip_scenes`.

    Args:
        seed: Not negative.
        frames: How many frames, at least 1.
        size: Side of the square frames, in pixels.
    """
    scenes = clip_scenes(seed, frames)
    pictures, masks = zip(*(render(scene, size) for scene in scenes), strict=True)
    motion = np.stack([similarity(scenes[0], scene, size) for scene in scenes])
    return Clip(np.stack(pictures), np.stack(masks), motion)


def clip_scenes(seed: int, frames: int) -> list[Scene]:
    """The frames of a clip as scenes: the photo of `random_scene(seed)`, its pose changing evenly, always inside."""
    rng = stream(seed, 5)
    radius = _far_apart(rng, MIN_RADIUS, MAX_RADIUS)
    angle = _far_apart(rng, -MAX_ANGLE, MAX_ANGLE)
    low, high = centre_range(max(radius))
    along, across = _far_apart(rng, low, high), rng.uniform(low, high, 2)
    x, y = (along, across) if rng.random() < 0.5 else (across, along)
    poses = np.linspace((x[0], y[0], radius[0], angle[0]), (x[1], y[1], radius[1], angle[1]), frames)
    scene = replace(random_scene(seed), style="photo")
    return [
        replace(scene, centre=(float(cx), float(cy)), radius=float(r), angle=float(a), zoom=float(r / radius[0]))
        for cx, cy, r, a in poses
    ]


def similarity(first: Scene, second: Scene, size: int = 64) -> npt.NDArray[np.float64]:
    """The similarity (2, 3) that takes an object's points from their pixel in one scene to their pixel in another."""
    scale, turn = second.radius / first.radius, second.angle - first.angle
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    offset = np.array(second.centre) - linear @ np.array(first.centre)
    return np.column_stack([linear, offset * (size / SIDE)])


def _far_apart(rng: np.random.Generator, low: float, high: float) -> tuple[float, float]:
    """One value from the lowest third of a range and one from the highest, in random order."""
    third = (high - low) / 3
    ends = (float(rng.uniform(low, low + third)), float(rng.uniform(high - third, high)))
    return ends if rng.random() < 0.5 else ends[::-1]
