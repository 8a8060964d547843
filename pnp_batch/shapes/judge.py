"""The judge: a small U-Net that segments the object of a scene and names its shape, material, background and style.

It is trained on rendered scenes (`pnp-batch shapes judge`), of which all of that is known, and never sees a picture of the
model that it judges. How often it is right on held-out scenes is printed with every table that rests on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from pnp_batch.errors import ModelError
from pnp_batch.shapes.learning import SILENT, Recipe, Watch, is_half_faster, learn
from pnp_batch.shapes.scenes import HELD_OUT, VOCABULARY, Scene, random_scene, render

WEIGHTS = Path(__file__).parent / "judge.safetensors"
WIDTHS = (32, 64, 96, 128)
CPU = torch.device("cpu")
BATCH = 64
RECIPE = Recipe(steps=2_000, learning_rate=3e-3, average=0.995)
PLAIN_PARTS = ("material", "background")  # a sketch is ink on paper and shows neither


class Verdict(NamedTuple):
    """What the network says of a batch.

    Attributes:
        mask: (rows, 64, 64) logits of being object.
        parts: For each of shape, material, background and style (rows, words) logits.
    """

    mask: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Reading:
    """What the judge sees in one picture.

    Attributes:
        mask: (64, 64) bool, where the object is.
        words: The word it reads for shape, material, background and style.
    """

    mask: npt.NDArray[np.bool_]
    words: dict[str, str]


class Judge(nn.Module):
    """Works at half resolution inside: pixels are folded into channels at the bottom and unfolded for the mask."""

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        inputs = (12, *widths[:-1])
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(_block(b + a, a) for a, b in itertools.pairwise(widths))
        self.mask = nn.Conv2d(widths[0], 4, 3, padding=1)
        pooled = 3 * widths[0] + 3 * widths[1] + 2 * widths[2] + 2 * widths[3]
        self.trunk = nn.Sequential(nn.Linear(pooled, 192), nn.ReLU())
        self.heads = nn.ModuleDict({part: nn.Linear(192, len(words)) for part, words in VOCABULARY.items()})

    def forward(self, pictures: Tensor) -> Verdict:
        """Judges pictures, (rows, 3, 64, 64) in [0, 1]."""
        x = F.pixel_unshuffle(2 * pictures - 1, 2)
        levels: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        deep, wide = levels[3], levels[2]
        maps = []
        for block, skip in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1))
            maps.append(x)
        mask = self.mask(x)
        inside = mask.detach().sigmoid().mean(1, keepdim=True)
        pooled = [*_pooled(maps[2], inside), *_pooled(maps[1], F.avg_pool2d(inside, 2))]
        pooled += [reduce(level) for level in (wide, deep) for reduce in (_mean, _max)]
        features = self.trunk(torch.cat(pooled, 1))
        return Verdict(F.pixel_shuffle(mask, 2)[:, 0], {part: head(features) for part, head in self.heads.items()})


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _pooled(features: Tensor, inside: Tensor) -> Iterator[Tensor]:
    """Features over the whole picture (largest), over the object and over the background (mean)."""
    yield _max(features)
    for weight in (inside, 1 - inside):
        yield (features * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1.0)


def _mean(features: Tensor) -> Tensor:
    return features.mean((2, 3))


def _max(features: Tensor) -> Tensor:
    return features.amax((2, 3))


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The trained judge of the repository, or one from another file.

    Raises:
        ModelError: The file is missing, or no judge.
    """
    judge = Judge()
    try:
        judge.load_state_dict({name: tensor.float() for name, tensor in safetensors.torch.load_file(path).items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path} is no judge that `pnp-batch shapes judge` wrote: {error}") from error
    return judge.eval()


@torch.inference_mode()
def read(judge: Judge, pictures: Sequence[npt.NDArray[np.uint8]]) -> list[Reading]:
    """What the judge sees in pictures, (64, 64, 3) uint8 each."""
    readings = []
    for begin in range(0, len(pictures), BATCH):
        verdict = judge(_tensor(np.stack(pictures[begin : begin + BATCH])))
        chosen = {part: logits.argmax(1).tolist() for part, logits in verdict.parts.items()}
        for row, mask in enumerate(verdict.mask.numpy() > 0):
            words = {part: VOCABULARY[part][indices[row]] for part, indices in chosen.items()}
            readings.append(Reading(mask, words))
    return readings


def iou(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def accuracy(judge: Judge, count: int = 512) -> dict[str, float]:
    """How good the judge is on held-out scenes: its share of right words by part, and its mask's mean IoU."""
    scenes = [random_scene(HELD_OUT + i) for i in range(count)]
    drawn = [render(scene) for scene in scenes]
    readings = read(judge, [picture for picture, _ in drawn])
    figures = {}
    for part in VOCABULARY:
        pairs = [
            (s, r) for s, r in zip(scenes, readings, strict=True) if part not in PLAIN_PARTS or s.style != "sketch"
        ]
        figures[part] = sum(getattr(scene, part) == reading.words[part] for scene, reading in pairs) / len(pairs)
    ious = [iou(mask > 127, reading.mask) for (_, mask), reading in zip(drawn, readings, strict=True)]
    return figures | {"mask_iou": sum(ious) / count}


@dataclass(frozen=True)
class Examined:
    """A judge, and how often it is right: no figure of the one goes without those of the other."""

    judge: Judge
    accuracy: dict[str, float]


def examined(judge: Judge) -> Examined:
    """A judge with its accuracy on held-out scenes."""
    return Examined(judge, accuracy(judge))


def train_judge(
    folder: Path,
    recipe: Recipe = RECIPE,
    watch: Watch = SILENT,
    half: bool | None = None,
    device: torch.device = CPU,
) -> Judge:
    """Trains a judge on fresh scenes.

    Args:
        folder: Where its checkpoint is kept.
        recipe: How.
        watch: Who looks on.
        half: Whether to compute in bfloat16; None measures which is faster.
        device: Where.
    """
    torch.manual_seed(0)
    judge = Judge().to(device).eval()

    def loss(step: int) -> Tensor:
        return _loss(judge, step, device)

    if half is None:
        half = is_half_faster("judge", loss, device, folder, watch.say)
    learn("judge", judge, loss, recipe, folder, watch, half)
    return judge.cpu()


def save_judge(judge: Judge, path: Path) -> None:
    """Writes a judge's weights in half precision."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in judge.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(half, path)


def _loss(judge: Judge, step: int, device: torch.device) -> Tensor:
    """Of a step's own scenes: cross-entropy of every word the picture shows, and of the mask with its overlap (Dice)."""
    scenes = [random_scene(step * BATCH + row) for row in range(BATCH)]
    drawn = [render(scene) for scene in scenes]
    pictures = _disturbed(_tensor(np.stack([picture for picture, _ in drawn])), step)
    truth = torch.from_numpy(np.stack([mask for _, mask in drawn])).float() / 255
    verdict, truth = judge(pictures.to(device)), truth.to(device)
    inside = verdict.mask.sigmoid()
    overlap = (2 * (inside * truth).sum((1, 2)) + 1) / (inside.sum((1, 2)) + truth.sum((1, 2)) + 1)
    total: Tensor = 2 * F.binary_cross_entropy_with_logits(verdict.mask, truth) + (1 - overlap).mean()
    for part, logits in verdict.parts.items():
        total = total + F.cross_entropy(logits, _targets(scenes, part).to(device), ignore_index=-1)
    return total


def _targets(scenes: Sequence[Scene], part: str) -> Tensor:
    """Numbers of the words, -1 where the picture does not show it."""
    hidden = [part in PLAIN_PARTS and scene.style == "sketch" for scene in scenes]
    words = VOCABULARY[part]
    numbers = (words.index(getattr(scene, part)) for scene in scenes)
    return torch.tensor([-1 if hide else number for hide, number in zip(hidden, numbers, strict=True)])


def _tensor(pictures: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def _disturbed(pictures: Tensor, step: int) -> Tensor:
    """Noise, contrast, brightness and blur, so that it judges what is shown and not how cleanly: edits are never clean."""
    generator = torch.Generator().manual_seed(step)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(*shape, 1, 1, 1, generator=generator)

    rows = len(pictures)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures.lerp(soft, drawn(rows) * (drawn(rows) < 0.5))
    mean = pictures.mean((1, 2, 3), keepdim=True)
    tint = 0.06 * (torch.rand(rows, 3, 1, 1, generator=generator) - 0.5)
    pictures = mean + (0.8 + 0.4 * drawn(rows)) * (pictures - mean) + 0.12 * (drawn(rows) - 0.5) + tint
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + 0.08 * drawn(rows) * (drawn(rows) < 0.6) * noise).clamp(0, 1)
