"""Procedural scenes of which everything is known: one object, its exact alpha mask, a background, a style.

A `Scene` is a frozen value; `render` turns it into pixels and `caption` into words. Lengths are in units of 1/64 of the
picture's side (pixels at the default size), y points down and angles turn clockwise on the screen.

The object and the background draw their noise from separate streams of the scene's seed. So
`dataclasses.replace(scene, material="gold")` is the same picture with nothing but the material changed: the true answer
to the edit "a gold ...".

The pictures in `manifests/scenes/` are the scenes of `sample_scenes()`, each rendered at 64x64 and saved as RGB PNG.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

SIDE = 64.0  # scene units along one side of the picture
MIN_RADIUS, MAX_RADIUS = 12.0, 21.0
MAX_ANGLE = math.radians(26.0)
REACH = 1.11  # no shape's outline is further from its centre than this many radii
STYLE_SHARES = (0.70, 0.16, 0.14)
HELD_OUT = 1_000_000_000  # scenes from this seed on are never trained on, by the judge or by the model


@dataclass(frozen=True)
class Scene:
    """One object on one background.

    Attributes:
        shape: One of `SHAPES`.
        material: One of `MATERIALS`.
        background: One of `BACKGROUNDS`.
        style: One of `STYLES`.
        centre: The object's (x, y), in scene units from the top left corner.
        radius: The object's size, in scene units.
        angle: The object's rotation, in radians, clockwise on the screen.
        seed: Not negative; seeds the noise of background and material.
        zoom: Magnification of the object's own texture; a growing object in a clip carries its stripes along.
    """

    shape: str
    material: str
    background: str
    style: str = "photo"
    centre: tuple[float, float] = (32.0, 32.0)
    radius: float = 16.0
    angle: float = 0.0
    seed: int = 0
    zoom: float = 1.0

    def __post_init__(self) -> None:
        for field, known in VOCABULARY.items():
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"unknown {field} {value!r}: choose one of {', '.join(known)}")


def random_scene(seed: int) -> Scene:
    """The scene of a seed: every vocabulary entry equally likely, styles as `STYLE_SHARES`, object wholly inside."""
    rng = stream(seed, 0)
    shape, material, background = (_choice(rng, words) for words in (SHAPES, MATERIALS, BACKGROUNDS))
    style = STYLES[int(np.searchsorted(np.cumsum(STYLE_SHARES)[:-1], rng.random(), side="right"))]
    radius = float(rng.uniform(MIN_RADIUS, MAX_RADIUS))
    low, high = centre_range(radius)
    x, y = (float(rng.uniform(low, high)) for _ in range(2))
    angle = float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))
    return Scene(shape, material, background, style, (x, y), radius, angle, seed)


def centre_range(radius: float) -> tuple[float, float]:
    """The lowest and highest centre coordinate at which an object of this radius is wholly inside the picture."""
    return REACH * radius + 1, SIDE - REACH * radius - 1


def render(scene: Scene, size: int = 64) -> tuple[Pixels, Pixels]:
    """Draws a scene; the same scene gives the same bytes on every run, and the same picture at every size.

    Args:
        scene: What to draw.
        size: Side of the square picture, in pixels.

    Returns:
        The picture, uint8 (size, size, 3), and the object's mask, uint8 (size, size): the very alpha the picture was
        composed with, 255 where a pixel is all object. The mask is the geometry, whatever the style.
    """
    distance, u, v = _object_frame(scene, size)
    mask = _uint8(255 * _coverage(-distance, size))
    alpha = mask / 255
    ground = _BACKGROUNDS[scene.background](stream(scene.seed, 1), size)
    surface = _MATERIALS[scene.material](stream(scene.seed, 2), u / scene.zoom, v / scene.zoom, size / scene.zoom)
    if scene.style == "sketch":
        picture = _sketch(_over(surface, ground, alpha), distance, size)
    else:
        picture = _over(_lit(surface, distance, size), ground * _shade(alpha, size), alpha)
    if scene.style == "painting":
        picture = _painting(stream(scene.seed, 3), picture, size)
    return np.ascontiguousarray(_uint8(picture).transpose(1, 2, 0)), mask


def sample_scenes() -> dict[str, Scene]:
    """The project's sample scenes by file stem, for instance `red-star-on-grass`."""
    poses = {
        "red star on grass": ((33.0, 31.0), 20.0, 8.0, 1),
        "gold moon on night": ((33.0, 31.0), 20.0, -14.0, 8),
        "striped circle on sand": ((30.0, 34.0), 17.0, 18.0, 2),
        "blue heart on snow": ((32.0, 33.0), 19.0, -6.0, 3),
        "yellow ring on water": ((36.0, 32.0), 20.0, 10.0, 5),
        "green triangle on brick": ((30.0, 33.0), 20.0, 7.0, 6),
    }
    return {name.replace(" ", "-"): _sample(name, *pose) for name, pose in poses.items()}


def _sample(name: str, centre: tuple[float, float], radius: float, degrees: float, seed: int) -> Scene:
    material, shape, _, background = name.split()
    return Scene(shape, material, background, "photo", centre, radius, math.radians(degrees), seed)


# --- words ------------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """The canonical caption: `a red star on grass`, or `a sketch of a red star on grass` where it is no photo."""
    plain = f"a {scene.material} {scene.shape} on {scene.background}"
    return plain if scene.style == "photo" else f"a {scene.style} of {plain}"


def caption_variants(scene: Scene) -> tuple[str, ...]:
    """Eight fixed wordings of the whole caption, to measure how far a model depends on the words around the words."""
    material, shape, background = scene.material, scene.shape, scene.background
    lead = "" if scene.style == "photo" else f"a {scene.style} of "
    canonical = caption(scene)
    return (
        canonical,
        f"a photo of {canonical}" if scene.style == "photo" else f"a {material} {shape} on {background}, {scene.style}",
        f"{lead.removeprefix('a ')}{material} {shape} on {background}",
        f"{lead}a {material} {shape} in {background}",
        f"{lead}a {material} {shape}, {background}",
        f"{lead}the {material} {shape} on the {background}",
        f"{lead}{background} with a {material} {shape}",
        f"{canonical.capitalize()}.",
    )


def random_caption(scene: Scene, seed: int) -> str:
    """A random wording to train on: synonyms, articles, prepositions, word order, and one part in six left out.

    Args:
        scene: What to describe.
        seed: Not negative; independent of the scene's own seed.
    """
    rng = stream(seed, 4)
    words = {part: _synonym(rng, getattr(scene, part)) for part in VOCABULARY}
    templates = PARTIAL_TEMPLATES if rng.random() < 1 / 6 else TEMPLATES
    text = _choice(rng, templates).format(prep=_choice(rng, PREPOSITIONS), **words)
    if scene.style != "photo" or rng.random() < 0.25:
        text = _choice(rng, STYLE_TEMPLATES).format(text=text, **words)
    return _finish(rng, text)


def caption_words() -> tuple[str, ...]:
    """Every word a caption can contain, sorted: what a tokenizer has to know."""
    templates = (*PREPOSITIONS, *TEMPLATES, *PARTIAL_TEMPLATES, *STYLE_TEMPLATES)
    grammar = re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", " ".join(templates)))
    taught = [word for words in (*VOCABULARY.values(), *SYNONYMS.values()) for word in words]
    return tuple(sorted({"a", "an", "the", *grammar, *taught}))


def _synonym(rng: np.random.Generator, word: str) -> str:
    known = SYNONYMS.get(word, ())
    return _choice(rng, known) if known and rng.random() < 0.25 else word


def _finish(rng: np.random.Generator, text: str) -> str:
    if rng.random() < 0.2:
        text = re.sub(r"\ba ", "", text)
    elif rng.random() < 0.15:
        text = re.sub(r"\ba ", "the ", text)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    if rng.random() < 0.1:
        text = f"{text.capitalize()}."
    return text


SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "ball"),
    "square": ("box", "block"),
    "triangle": ("pyramid",),
    "ring": ("hoop", "donut"),
    "cross": ("plus",),
    "moon": ("crescent",),
    "red": ("scarlet", "crimson"),
    "blue": ("azure", "cobalt"),
    "green": ("emerald",),
    "yellow": ("lemon",),
    "purple": ("violet",),
    "white": ("ivory",),
    "black": ("ebony",),
    "gold": ("golden",),
    "striped": ("stripy", "stripey"),
    "checkered": ("checked", "chequered"),
    "dotted": ("spotted", "spotty"),
    "sky": ("clouds",),
    "grass": ("lawn", "meadow"),
    "sand": ("beach", "desert"),
    "night": ("midnight",),
    "grey": ("gray",),
    "water": ("sea", "waves"),
    "brick": ("bricks", "wall"),
    "snow": ("ice",),
    "photo": ("photograph", "picture", "image"),
    "painting": ("artwork",),
    "sketch": ("drawing",),
}
# A repeated entry is a likelier one.
PREPOSITIONS = ("on", "on", "on", "on", "in", "over", "against", "on the", "in front of")
TEMPLATES = (
    "a {material} {shape} {prep} {background}",
    "a {material} {shape} {prep} {background}",
    "a {material} {shape} {prep} {background}",
    "a {material} {shape}, {background}",
    "a {shape}, {material}, {prep} {background}",
    "{background} with a {material} {shape}",
    "{prep} {background}, a {material} {shape}",
)
PARTIAL_TEMPLATES = (
    "a {material} {shape}",
    "a {shape} {prep} {background}",
    "a {shape}",
    "{background}",
    "something {material} {prep} {background}",
)
STYLE_TEMPLATES = ("a {style} of {text}", "a {style} of {text}", "{text}, {style}", "{style}: {text}")


# --- shapes: signed distances in radii, negative inside; u right, v down (Inigo Quilez, "2D distance functions") ------


def _circle(u: Array, v: Array) -> Array:
    return _length(u, v) - 1


def _square(u: Array, v: Array) -> Array:
    return _box(u, v, 0.78, 0.78)


def _triangle(u: Array, v: Array) -> Array:
    half, slope = 0.91, math.sqrt(3)
    x, y = np.abs(u) - half, half / slope - v
    beyond = x + slope * y > 0
    x, y = np.where(beyond, (x - slope * y) / 2, x), np.where(beyond, (-slope * x - y) / 2, y)
    return -_length(x - np.clip(x, -2 * half, 0), y) * np.sign(y)


def _star(u: Array, v: Array) -> Array:
    x, y = np.abs(u), -v
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    for side in (cos, -cos):
        fold = 2 * np.maximum(side * x - sin * y, 0)
        x, y = x - fold * side, y + fold * sin
    x, y = np.abs(x), y - 1
    edge_x, edge_y = 0.47 * sin, 0.47 * cos - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    return _length(x - edge_x * along, y - edge_y * along) * np.sign(y * edge_x - x * edge_y)


def _heart(u: Array, v: Array) -> Array:
    scale = 1.5
    x, y = np.abs(u) / scale, 0.56 - v / scale
    lobe = _length(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    nearest = np.maximum(x + y, 0) / 2
    point = np.minimum(x**2 + (y - 1) ** 2, (x - nearest) ** 2 + (y - nearest) ** 2)
    return scale * np.where(x + y > 1, lobe, np.sqrt(point) * np.sign(x - y))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(_length(u, v) - 0.75) - 0.25


def _cross(u: Array, v: Array) -> Array:
    return np.minimum(_box(u, v, 1.0, 0.32), _box(u, v, 0.32, 1.0))


def _moon(u: Array, v: Array) -> Array:
    return np.maximum(_length(u, v) - 1, 0.82 - _length(u - 0.55, v))


def _box(u: Array, v: Array, half_u: float, half_v: float) -> Array:
    x, y = np.abs(u) - half_u, np.abs(v) - half_v
    return _length(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)


def _length(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


# --- materials: colours (3, H, W) in grey levels from the object's own u, v in scene units ----------------------------


def _plain(red: float, green: float, blue: float) -> Callable[..., Array]:
    colour = _rgb(red, green, blue)
    return lambda rng, u, v, size: colour


def _gold(rng: np.random.Generator, u: Array, v: Array, size: float) -> Array:
    # Polished metal mirrors a horizon: dark above, a bright band below, whatever the shape.
    across = (u + v) / 11 + rng.uniform(-0.3, 0.3)
    bright = 0.5 + 0.5 * np.tanh(2 * across - 0.4)
    return _mix(_mix(_rgb(146, 96, 22), _rgb(205, 155, 58), np.clip(across + 1, 0, 1)), _rgb(247, 230, 178), bright)


def _striped(rng: np.random.Generator, u: Array, v: Array, size: float) -> Array:
    return _mix(_rgb(246, 122, 28), _rgb(253, 249, 244), _stripes(u, 9.2, rng, size))


def _checkered(rng: np.random.Generator, u: Array, v: Array, size: float) -> Array:
    columns, rows = (2 * _stripes(axis, 13.6, rng, size) - 1 for axis in (u, v))
    return _mix(_rgb(24, 24, 26), _rgb(250, 250, 252), 0.5 + 0.5 * columns * rows)


def _dotted(rng: np.random.Generator, u: Array, v: Array, size: float) -> Array:
    period = 9.1
    x, y = ((axis / period + rng.random()) % 1 - 0.5 for axis in (u, v))
    return _mix(_rgb(228, 34, 146), _rgb(254, 250, 253), _coverage(2.4 - period * _length(x, y), size))


def _stripes(axis: Array, period: float, rng: np.random.Generator, size: float) -> Array:
    wave = np.sin(2 * np.pi * (axis / period + rng.random()))
    return _coverage(wave * period / (2 * np.pi), size)


# --- backgrounds: colours (3, H, W) in grey levels --------------------------------------------------------------------


def _sky(rng: np.random.Generator, size: int) -> Array:
    air = _mix(_rgb(84, 144, 219), _rgb(166, 206, 242), _rows(size) / SIDE)
    cloud = _noise(rng, size, 15, 10) + 0.45 * _noise(rng, size, 5, 4) - rng.uniform(0.0, 0.6)
    return _mix(air, _rgb(246, 249, 253), np.clip(0.9 * cloud, 0, 0.95))


def _grass(rng: np.random.Generator, size: int) -> Array:
    blades = 1.25 * _noise(rng, size, 2.0, 7) + 0.4 * _noise(rng, size, 12, 9)
    lean = np.rint(2 * _noise(rng, size, 18, 10) * (size / SIDE)).astype(int)
    columns = np.clip(np.arange(size) + lean, 0, size - 1)
    return _jitter(rng, 4) + _mix(_rgb(70, 125, 49), _rgb(92, 148, 66), np.take_along_axis(blades, columns, 1))


def _sand(rng: np.random.Generator, size: int) -> Array:
    ripples = 8 * _noise(rng, size, 14, 3) + 5 * _noise(rng, size, 3, 2.2)
    return _jitter(rng, 4) + _rgb(213, 183, 130) + ripples


def _night(rng: np.random.Generator, size: int) -> Array:
    dark = _mix(_rgb(15, 17, 50), _rgb(40, 44, 86), _rows(size) / SIDE) + 1.5 * _noise(rng, size, 14, 14)
    count = int(rng.integers(10, 24))
    glow = rng.uniform(0.25, 1.0, count)
    x, y = rng.uniform(0, SIDE, (2, count))
    across, down = (np.exp(-(((_axis(size)[:, None] - centre) / 0.75) ** 2)) for centre in (x, y))
    return _mix(dark, _rgb(240, 242, 250), np.minimum((down * glow) @ across.T, 1))


def _grey(rng: np.random.Generator, size: int) -> Array:
    return _jitter(rng, 3) + _rgb(126, 128, 130) + 1.2 * _noise(rng, size, 2, 2)


def _water(rng: np.random.Generator, size: int) -> Array:
    phase = _rows(size) / rng.uniform(8.0, 10.5) + 0.2 * _noise(rng, size, 16, 9)
    swell = np.sin(2 * np.pi * phase) + 0.4 * _noise(rng, size, 12, 5)
    return _jitter(rng, 3) + _mix(_rgb(37, 110, 159), _rgb(58, 138, 190), swell)


def _brick(rng: np.random.Generator, size: int) -> Array:
    height, width, mortar = 12.0, 24.0, 1.5
    y = _axis(size) / height + rng.random()
    row = y.astype(int)
    x = _axis(size) / width + (row % 2)[:, None] / 2 + rng.random()
    from_edge = np.minimum(width * np.minimum(x % 1, 1 - x % 1), (height * np.minimum(y % 1, 1 - y % 1))[:, None])
    tone = rng.uniform(-1, 1, (8, 6))[row[:, None], x.astype(int)] + 0.35 * _noise(rng, size, 1.6, 1.6)
    clay = _mix(_rgb(158, 80, 60), _rgb(174, 94, 73), tone)
    return _mix(clay, _rgb(212, 206, 192), _coverage(mortar / 2 - from_edge, size))


def _snow(rng: np.random.Generator, size: int) -> Array:
    drift = _noise(rng, size, 18, 14) + 0.2 * _noise(rng, size, 3, 3)
    return _jitter(rng, 2) + _mix(_rgb(225, 232, 241), _rgb(231, 237, 244), drift)


# --- light, shadow and style ------------------------------------------------------------------------------------------


def _object_frame(scene: Scene, size: int) -> tuple[Array, Array, Array]:
    """Signed distance to the outline and the object's own u, v; all (size, size), in scene units."""
    x, y = _axis(size) - scene.centre[0], (_axis(size) - scene.centre[1])[:, None]
    cos, sin = math.cos(scene.angle), math.sin(scene.angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    distance = scene.radius * _SHAPES[scene.shape](u / scene.radius, v / scene.radius)
    return distance, u, v


def _lit(surface: Array, distance: Array, size: int) -> Array:
    """Rounds the surface off towards its outline and lights it from the upper left."""
    slope = np.empty_like(distance)
    slope[1:, 1:] = (distance[:-1, :-1] - distance[1:, 1:]) * (size / SIDE / math.sqrt(2))
    slope[0], slope[:, 0] = slope[1], slope[:, 1]
    soft = _blur(size, 0.8)
    facing = (soft @ slope @ soft.T) * np.exp(np.minimum(distance, 0) / 5.0)
    return (1 + 0.07 * facing) * surface + 16 * facing


def _shade(alpha: Array, size: int) -> Array:
    """The contact shadow, as a factor on the background."""
    return 1 - 0.42 * (_blur(size, 1.2, 1.8) @ alpha @ _blur(size, 1.2, 1.6).T)


def _painting(rng: np.random.Generator, picture: Array, size: int) -> Array:
    soft = _blur(size, 1.1)
    smooth = soft @ picture @ soft.T
    smooth += 0.25 * (smooth - smooth.mean(0)) + 6 * _noise(rng, size, 10, 3)
    levels = np.rint(smooth * (4 / 255)) * (255 / 4)
    x, y = np.pi * _axis(size) / 1.5, (np.pi * _axis(size) / 1.5)[:, None]
    return _mix(smooth, levels, 0.6) * (0.96 + 0.04 * np.sin(x) * np.sin(y))


def _sketch(picture: Array, distance: Array, size: int) -> Array:
    light = 0.3 * picture[0] + 0.59 * picture[1] + 0.11 * picture[2]
    soft = _blur(size, 0.7)
    down, across = np.gradient(soft @ light @ soft.T, SIDE / size)
    texture = np.minimum((down**2 + across**2) / 1800, 0.5)
    outline = 0.92 * _coverage(1.0 - np.abs(distance), size)
    ink: Array = np.maximum(texture, outline)
    return _rgb(249, 247, 242) * (1 - ink)


# --- arithmetic -------------------------------------------------------------------------------------------------------


def stream(seed: int, number: int) -> np.random.Generator:
    """An independent source of noise: 0 is a scene's layout, 1-3 its looks, 4 its wording, 5 a clip's path."""
    return np.random.Generator(np.random.PCG64([seed, number]))


def _choice(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _rgb(red: float, green: float, blue: float) -> Array:
    return np.array((red, green, blue), np.float64).reshape(3, 1, 1)


def _mix(first: Array, second: Array, amount: Array | float) -> Array:
    return first + amount * (second - first)


def _over(front: Array, back: Array, alpha: Array) -> Array:
    return _mix(back, front, alpha)


def _jitter(rng: np.random.Generator, levels: float) -> Array:
    """A change of exposure and a touch of tint."""
    return levels * (rng.uniform(-1, 1) + rng.uniform(-0.3, 0.3, (3, 1, 1)))


def _coverage(inside: Array, size: float) -> Array:
    """How much of a pixel lies inside an edge, from the signed distance to it in scene units."""
    return np.clip(0.5 + inside * (size / SIDE), 0, 1)


def _uint8(levels: Array) -> Pixels:
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


@lru_cache
def _axis(size: int) -> Array:
    """Pixel centres in scene units, (size,)."""
    return (np.arange(size, dtype=np.float64) + 0.5) * (SIDE / size)


def _rows(size: int) -> Array:
    return _axis(size)[:, None]


def _noise(rng: np.random.Generator, size: int, cell_x: float, cell_y: float) -> Array:
    """Smooth noise (size, size), about zero mean and unit variance, on a lattice of cells in scene units."""
    down, across = _spline(size, cell_y), _spline(size, cell_x)
    return 3.6 * down @ (rng.random((down.shape[1], across.shape[1])) - 0.5) @ across.T


@lru_cache(maxsize=256)
def _spline(size: int, cell: float) -> Array:
    """Cubic B-spline weights from a lattice to the pixels, (size, lattice)."""
    knots = np.arange(-1, SIDE / cell + 2)
    t = np.abs(_axis(size)[:, None] / cell - knots)
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.maximum(2 - t, 0) ** 3 / 6)


@lru_cache(maxsize=64)
def _blur(size: int, sigma: float, shift: float = 0.0) -> Array:
    """A Gaussian as a matrix (size, size) over one axis, sigma and shift in scene units; each row adds up to 1."""
    axis = _axis(size)
    weights: Array = np.exp(-0.5 * ((axis[:, None] - shift - axis) / sigma) ** 2)
    weights /= weights.sum(1, keepdims=True)
    return weights


_SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "moon": _moon,
}
_MATERIALS: dict[str, Callable[[np.random.Generator, Array, Array, float], Array]] = {
    "red": _plain(224, 35, 31),
    "blue": _plain(42, 72, 226),
    "green": _plain(21, 175, 60),
    "yellow": _plain(253, 225, 29),
    "purple": _plain(144, 41, 173),
    "white": _plain(250, 250, 252),
    "black": _plain(28, 29, 27),
    "gold": _gold,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
}
_BACKGROUNDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "night": _night,
    "grey": _grey,
    "water": _water,
    "brick": _brick,
    "snow": _snow,
}
SHAPES = tuple(_SHAPES)
MATERIALS = tuple(_MATERIALS)
BACKGROUNDS = tuple(_BACKGROUNDS)
STYLES = ("photo", "painting", "sketch")
VOCABULARY = {"shape": SHAPES, "material": MATERIALS, "background": BACKGROUNDS, "style": STYLES}
