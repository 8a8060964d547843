"""What the scene generator and the clips promise."""

import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pnp_batch.shapes.clips import clip, clip_scenes, similarity
from pnp_batch.shapes.scenes import (
    BACKGROUNDS,
    MATERIALS,
    MAX_ANGLE,
    MAX_RADIUS,
    MIN_RADIUS,
    SHAPES,
    STYLES,
    VOCABULARY,
    Scene,
    caption,
    caption_variants,
    caption_words,
    random_caption,
    random_scene,
    render,
    sample_scenes,
)

SAMPLES = Path(__file__).parents[2] / "manifests" / "scenes"
SEEDS = st.integers(min_value=0, max_value=2**63)
PLAIN = Scene("circle", "red", "grey", seed=7)


def _pixels(scene: Scene, size: int = 64) -> npt.NDArray[np.int64]:
    return render(scene, size)[0].astype(np.int64)


def _mask(scene: Scene, size: int = 64) -> npt.NDArray[np.uint8]:
    return render(scene, size)[1]


def _area(scene: Scene) -> float:
    return float(_mask(scene).sum() / 255)


# --- scenes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_every_seed_is_a_scene_wholly_inside_the_picture(seed: int) -> None:
    scene = random_scene(seed)
    picture, mask = render(scene)
    assert picture.dtype == mask.dtype == np.uint8
    assert picture.shape == (64, 64, 3) and mask.shape == (64, 64)
    assert all(getattr(scene, field) in known for field, known in VOCABULARY.items())
    assert MIN_RADIUS <= scene.radius <= MAX_RADIUS and abs(scene.angle) <= MAX_ANGLE
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert mask.max() == 255 and border.max() == 0


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_a_seed_gives_the_same_scene_bytes_and_words_each_time(seed: int) -> None:
    first, again = random_scene(seed), random_scene(seed)
    assert first == again and random_caption(first, seed) == random_caption(again, seed)
    assert all(np.array_equal(a, b) for a, b in zip(render(first), render(again), strict=True))


def test_seeds_cover_the_vocabulary_in_the_stated_shares() -> None:
    scenes = [random_scene(seed) for seed in range(3000)]
    for field, known in VOCABULARY.items():
        assert {getattr(scene, field) for scene in scenes} == set(known)
    shares = [sum(scene.style == style for scene in scenes) / len(scenes) for style in STYLES]
    assert shares == pytest.approx([0.70, 0.16, 0.14], abs=0.03)


def test_an_unknown_word_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown material 'reed': choose one of red, blue"):
        replace(PLAIN, material="reed")


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [12.0, 16.5, 21.0])
@pytest.mark.parametrize(
    ("shape", "unit_area"),
    [
        ("circle", math.pi),
        ("square", 1.56**2),
        ("triangle", 0.91**2 * math.sqrt(3)),
        ("ring", math.pi * 0.75),
        ("cross", 4 * 0.64 - 0.64**2),
        ("star", 10 * 0.5 * 0.47 * math.sin(math.pi / 5)),
    ],
)
def test_the_mask_has_the_area_of_the_geometry(shape: str, unit_area: float, radius: float) -> None:
    scene = replace(PLAIN, shape=shape, radius=radius, angle=0.2, centre=(31.3, 32.8))
    assert _area(scene) == pytest.approx(unit_area * radius**2, rel=0.01)


def test_the_mask_is_the_very_alpha_of_the_picture() -> None:
    scene = replace(PLAIN, shape="heart", background="brick")
    mask = _mask(scene).astype(float)[..., None] / 255
    other = replace(scene, material="blue")
    inside = replace(scene, radius=40.0), replace(other, radius=40.0)  # all object in the middle: the bare materials
    bare = _pixels(inside[0])[32, 32] - _pixels(inside[1])[32, 32]
    # The light adds to both alike and scales both a little; the background is the same and falls out of the difference.
    difference = _pixels(scene) - _pixels(other)
    assert np.all(difference[mask[..., 0] == 0] == 0)
    assert np.abs(difference - mask * bare).max() <= 0.08 * np.abs(bare).max()


def test_only_the_object_changes_with_the_material_and_only_the_ground_with_the_background() -> None:
    scene = random_scene(5)
    mask = _mask(scene)
    repainted, moved = replace(scene, material="gold", style="photo"), replace(scene, background="snow", style="photo")
    photo = _pixels(replace(scene, style="photo"))
    assert np.array_equal(_pixels(repainted)[mask == 0], photo[mask == 0])
    assert np.array_equal(_pixels(moved)[mask == 255], photo[mask == 255])


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("material", MATERIALS)
def test_every_object_stands_out_from_every_ground(material: str, background: str) -> None:
    scene = replace(PLAIN, material=material, background=background, centre=(26.0, 32.0))
    elsewhere = replace(scene, centre=(64.0 + 40, 32.0))
    inside = _mask(scene) == 255
    assert np.abs(_pixels(scene) - _pixels(elsewhere))[inside].mean() > 12


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", [1, 4])
def test_a_scene_is_the_same_picture_at_every_size(seed: int, style: str) -> None:
    scene = replace(random_scene(seed), style=style)
    small, large = render(scene), render(scene, 128)
    halved = [image.reshape(64, 2, 64, 2, -1).mean((1, 3)).squeeze() for image in large]
    assert np.abs(halved[0] - small[0]).mean() < 8
    assert np.abs(halved[1] - small[1]).mean() < 1


# --- looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(combinations(SHAPES, 2)))
def test_shapes_differ(first: str, second: str) -> None:
    a, b = (_mask(replace(PLAIN, shape=shape)) > 127 for shape in (first, second))
    assert (a & b).sum() / (a | b).sum() < 0.85


@pytest.mark.parametrize(("first", "second"), list(combinations(MATERIALS, 2)))
def test_materials_differ_inside_the_mask(first: str, second: str) -> None:
    a, b = (_pixels(replace(PLAIN, material=material)) for material in (first, second))
    assert np.abs(a - b)[_mask(PLAIN) == 255].mean() > 20


@pytest.mark.parametrize(("first", "second"), list(combinations(BACKGROUNDS, 2)))
def test_backgrounds_differ_outside_the_mask(first: str, second: str) -> None:
    a, b = (_pixels(replace(PLAIN, background=background)) for background in (first, second))
    assert np.abs(a - b)[_mask(PLAIN) == 0].mean() > 15


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_styles_differ_and_share_the_mask(background: str) -> None:
    scenes = [replace(PLAIN, background=background, style=style) for style in STYLES]
    for first, second in combinations(scenes, 2):
        assert np.abs(_pixels(first) - _pixels(second)).mean() > 3
        assert np.array_equal(_mask(first), _mask(second))


def test_a_sketch_carries_no_colour() -> None:
    for seed in range(20):
        picture = _pixels(replace(random_scene(seed), style="sketch"))
        assert np.ptp(picture, axis=2).max() <= 7  # the tint of the paper
        assert picture.mean() > 180


def test_light_comes_from_the_upper_left_and_the_shadow_falls_to_the_lower_right() -> None:
    picture, bare = _pixels(PLAIN), _pixels(replace(PLAIN, centre=(120.0, 32.0)))
    darker = (bare - picture).mean(2)
    assert picture[23, 23].sum() > picture[41, 41].sum() + 30
    assert darker[45, 45] > 15 and abs(darker[18, 18]) < 3


# --- words -----------------------------------------------------------------------------------------------------------


def test_the_caption_is_canonical() -> None:
    scene = Scene("star", "red", "grass")
    assert caption(scene) == "a red star on grass"
    assert caption(replace(scene, style="sketch")) == "a sketch of a red star on grass"


@pytest.mark.parametrize("style", STYLES)
def test_the_variants_are_eight_wordings_of_everything(style: str) -> None:
    scene = Scene("star", "red", "grass", style)
    variants = caption_variants(scene)
    assert len(set(variants)) == 8 and variants[0] == caption(scene)
    said = {"star", "red", "grass"} | ({style} if style != "photo" else set())
    assert all(said <= set(_words(text)) for text in variants)


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, wording=SEEDS)
def test_random_captions_use_known_words_and_good_articles(seed: int, wording: int) -> None:
    text = random_caption(random_scene(seed), wording)
    assert text and set(_words(text)) <= set(caption_words())
    assert not re.search(r"\ba [aeiou]", text.lower()) and "{" not in text


def test_random_captions_say_most_parts_and_vary() -> None:
    scene = Scene("star", "red", "grass")
    texts = [random_caption(scene, seed) for seed in range(500)]
    assert len(set(texts)) > 100
    assert sum("star" in text for text in texts) > 400


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


# --- the samples of the quickstart -----------------------------------------------------------------------------------


def test_the_shipped_samples_are_what_the_generator_draws() -> None:
    scenes = sample_scenes()
    assert {path.stem for path in SAMPLES.glob("*.png")} == set(scenes)
    for name, scene in scenes.items():
        with Image.open(SAMPLES / f"{name}.png") as image:
            assert image.mode == "RGB" and np.array_equal(np.asarray(image), render(scene)[0]), name
        assert caption(scene) == f"a {name.replace('-', ' ')}"


# --- clips -----------------------------------------------------------------------------------------------------------


def test_a_clip_is_deterministic_and_its_frames_are_scenes() -> None:
    first, again = clip(3, 5), clip(3, 5)
    assert first.frames.shape == (5, 64, 64, 3) and first.masks.shape == (5, 64, 64) and first.motion.shape == (5, 2, 3)
    assert np.array_equal(first.frames, again.frames) and np.array_equal(first.masks, again.masks)
    assert np.array_equal(first.frames[4], render(clip_scenes(3, 5)[4])[0])


def test_a_clip_keeps_its_words_and_its_background() -> None:
    frames, masks, _ = clip(8, 6)
    far = np.array([_far_from(mask) for mask in masks]).all(0)
    assert len({caption(scene) for scene in clip_scenes(8, 6)}) == 1
    assert far.sum() > 500 and np.all(frames[:, far] == frames[0, far])


@pytest.mark.parametrize("seed", range(4))
def test_the_motion_carries_the_first_mask_onto_every_other(seed: int) -> None:
    _, masks, motion = clip(seed, 4, size=192)
    assert np.allclose(motion[0], [[1, 0, 0], [0, 1, 0]])
    for mask, moved in zip(masks, motion, strict=True):
        carried, truth = _carry(masks[0], moved) > 127, mask > 127
        assert (carried & truth).sum() / (carried | truth).sum() > 0.97


def test_the_objects_texture_moves_along() -> None:
    scenes = [replace(scene, material="checkered", shape="circle") for scene in clip_scenes(2, 3)]
    (first, _), (last, mask) = render(scenes[0], 192), render(scenes[2], 192)
    carried = _carry(first[..., 1], similarity(scenes[0], scenes[2], 192))
    core = _carry(render(scenes[0], 192)[1], similarity(scenes[0], scenes[2], 192)) & mask == 255
    agree = (carried[core] > 127) == (last[..., 1][core] > 127)
    assert agree.mean() > 0.95


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_every_clip_moves_turns_and_grows_inside_the_picture(seed: int) -> None:
    start, *_, end = scenes = clip_scenes(seed, 4)
    assert math.dist(start.centre, end.centre) > 4
    assert abs(start.angle - end.angle) > 0.2 and abs(start.radius - end.radius) > 2
    assert max(_mask(scene)[[0, -1]].max() for scene in scenes) == 0


def _far_from(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Pixels more than eight from the mask's bounding box, where no shadow reaches."""
    rows, columns = np.nonzero(mask)
    far = np.ones(mask.shape, bool)
    far[max(rows.min() - 8, 0) : rows.max() + 9, max(columns.min() - 8, 0) : columns.max() + 9] = False
    return far


def _carry(image: npt.NDArray[np.uint8], motion: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """The image moved by a similarity (2, 3), nearest pixel."""
    size = len(image)
    y, x = np.mgrid[:size, :size] + 0.5
    back = np.linalg.inv(np.vstack([motion, (0, 0, 1)]))
    source_x, source_y = (back[i, 0] * x + back[i, 1] * y + back[i, 2] for i in (0, 1))
    inside = (source_x >= 0) & (source_x < size) & (source_y >= 0) & (source_y < size)
    rows, columns = (np.clip(axis, 0, size - 1).astype(int) for axis in (source_y, source_x))
    return np.where(inside, image[rows, columns], 0).astype(np.uint8)
