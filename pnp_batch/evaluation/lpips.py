"""LPIPS v0.1 (Zhang et al. 2018) on torch alone: AlexNet, VGG16 or SqueezeNet 1.1 features, learnt 1x1 weights.

The weights are one `.safetensors` file made from the authors' package (docs/evaluation.md shows the three lines), with the
names of its `state_dict`: `net.slice1.0.weight` ... and `lin0.model.1.weight` ... Which network it is, is told by its names
and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pnp_batch.evaluation.backbones import Backbone
from pnp_batch.evaluation.closed_forms import EMPTY, blackened
from pnp_batch.evaluation.columns import VERSIONS
from pnp_batch.evaluation.tensors import as_batch, by_shape
from pnp_batch.evaluation.values import Pair, Unavailable, Value, Values
from pnp_batch.media.images import Pixels

# The authors' scaling layer, for pictures in [-1, 1]; and the guard of the feature normalisation.
SHIFT, SCALE, EPSILON = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450), 1e-10

SMALLEST = 32  # pixels: AlexNet's and SqueezeNet's strides leave nothing of less
TOO_SMALL = f"the picture is smaller than {SMALLEST}x{SMALLEST}"


class Fire(nn.Module):
    """SqueezeNet's block: squeeze to few channels, expand by 1x1 and 3x3 side by side (Iandola et al. 2016)."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, inputs, height, width) to (rows, 2 * expanded, height, width)."""
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def _alex() -> list[list[nn.Module]]:
    return [
        [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU()],
        [nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()],
        [nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()],
    ]


def _vgg() -> list[list[nn.Module]]:
    slices: list[list[nn.Module]] = []
    inputs = 3
    for channels, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        slices.append([nn.MaxPool2d(2, 2)] if slices else [])
        for _ in range(convolutions):
            slices[-1] += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
            inputs = channels
    return slices


def _squeeze() -> list[list[nn.Module]]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    return [
        [nn.Conv2d(3, 64, 3, 2), nn.ReLU()],
        [pool(), Fire(64, 16, 64), Fire(128, 16, 64)],
        [pool(), Fire(128, 32, 128), Fire(256, 32, 128)],
        [pool(), Fire(256, 48, 192)],
        [Fire(384, 48, 192)],
        [Fire(384, 64, 256)],
        [Fire(512, 64, 256)],
    ]


NETWORKS: dict[str, tuple[Callable[[], list[list[nn.Module]]], tuple[int, ...]]] = {
    "alex": (_alex, (64, 192, 384, 256, 256)),
    "vgg": (_vgg, (64, 128, 256, 512, 512)),
    "squeeze": (_squeeze, (64, 128, 256, 384, 384, 512, 512)),
}


class LpipsModel(nn.Module):
    """One of `NETWORKS`, with the authors' parameter names.

    Args:
        network: Its name.
    """

    def __init__(self, network: str) -> None:
        super().__init__()
        build, channels = NETWORKS[network]
        self.net = nn.ModuleDict()
        index = 0  # torchvision numbers the layers through
        for number, layers in enumerate(build(), 1):
            self.net[f"slice{number}"] = nn.ModuleDict({str(index + i): layer for i, layer in enumerate(layers)})
            index += len(layers)
        for number, width in enumerate(channels):  # "1": the authors' "0" is a dropout
            lin = nn.ModuleDict({"model": nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})})
            self.add_module(f"lin{number}", lin)

    @torch.inference_mode()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of pictures, (rows, 3, height, width) in [0, 1], as (rows,)."""
        x = torch.cat([a, b]) * 2 - 1
        x = (x - x.new_tensor(SHIFT).view(3, 1, 1)) / x.new_tensor(SCALE).view(3, 1, 1)
        total = x.new_zeros(len(a))
        for number, features in enumerate(self.net.children()):
            for layer in features.children():
                x = layer(x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + EPSILON)
            weight = self.get_parameter(f"lin{number}.model.1.weight")
            total += nn.functional.conv2d((unit[: len(a)] - unit[len(a) :]).square(), weight).mean((1, 2, 3))
        return total


def load_lpips(backbone: Backbone, device: torch.device) -> LpipsModel:
    """Builds the network that a weights file (or the only one in a folder) fits, and loads it.

    Raises:
        Unavailable: It fits none of the three.
    """
    weights = _read(backbone)
    for network in NETWORKS:
        with torch.device("meta"):
            model = LpipsModel(network)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        found = {name: weights[name] for name in wanted if name in weights}
        if {name: tensor.shape for name, tensor in found.items()} == wanted:
            model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, assign=True)
            return model.to(device).eval()
    raise Unavailable(
        f"{backbone.path} holds no LPIPS v0.1 weights ({', '.join(NETWORKS)}); docs/evaluation.md says how to make the file"
    )


def _read(backbone: Backbone) -> dict[str, Tensor]:
    path = backbone.path
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise Unavailable(f"{path} holds {len(files)} .safetensors files; name the one with the LPIPS weights")
    try:
        weights = load_file(files[0])
    except (OSError, SafetensorError) as error:
        raise Unavailable(f"{files[0]} cannot be read: {error}") from error
    return {_authors_name(name): tensor for name, tensor in weights.items()}


def _authors_name(name: str) -> str:
    """torchmetrics calls SqueezeNet's `net.slice1` `net.slices.0`."""
    return re.sub(r"^net\.slices\.(\d+)", lambda match: f"net.slice{int(match[1]) + 1}", name)


class Lpips:
    """LPIPS of result and source; with a mask also of both with the edited part black, as PIE-Bench's code has it."""

    name = "lpips"
    version = VERSIONS["lpips"]
    columns: tuple[str, ...] = ("lpips",)
    uses_mask = True

    def __init__(self, backbone: Backbone, model: Callable[[], LpipsModel], device: torch.device) -> None:
        self.identity: Mapping[str, Any] = {"backbone": backbone.fingerprint}
        self._model, self._device = model, device

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        return by_shape(pairs, self._distances)

    def _distances(self, pairs: Sequence[Pair]) -> list[Values]:
        if min(pairs[0].source.shape[:2]) < SMALLEST:
            return [{"lpips": TOO_SMALL} for _ in pairs]
        rows: list[dict[str, Value]] = [
            {"lpips": value} for value in self._of([(pair.source, pair.result) for pair in pairs])
        ]
        outside = {i: ~pair.mask for i, pair in enumerate(pairs) if pair.mask is not None}
        for i in outside:
            rows[i]["lpips_pie"] = EMPTY
        some = {i: region for i, region in outside.items() if region.any()}
        if some:
            black = [(blackened(pairs[i].source, r), blackened(pairs[i].result, r)) for i, r in some.items()]
            for i, value in zip(some, self._of(black), strict=True):
                rows[i]["lpips_pie"] = value
        return list(rows)

    def _of(self, pictures: Sequence[tuple[Pixels, Pixels]]) -> list[float]:
        return _between(self._model(), pictures, self._device)


class ReconstructionLpips:
    """LPIPS of the guidance image and what sampling its inversion back gives: once for all prompts of a picture."""

    name = "reconstruction-lpips"
    version = VERSIONS["reconstruction_lpips"]
    columns: tuple[str, ...] = ("reconstruction_lpips",)
    uses_mask = False

    def __init__(self, backbone: Backbone, model: Callable[[], LpipsModel], device: torch.device) -> None:
        self.identity: Mapping[str, Any] = {"backbone": backbone.fingerprint}
        self._model, self._device = model, device

    def __call__(self, pairs: Sequence[Pair]) -> list[Values]:
        """See `Metric`."""
        return by_shape(pairs, self._distances)

    def _distances(self, pairs: Sequence[Pair]) -> list[Values]:
        if min(pairs[0].source.shape[:2]) < SMALLEST:
            return [{"reconstruction_lpips": TOO_SMALL} for _ in pairs]
        values: dict[str, Value] = {}
        known: dict[str, tuple[Pixels, Pixels]] = {}
        for pair in pairs:
            if isinstance(pair.reconstruction, str):
                values[pair.source_key] = pair.reconstruction
            else:
                known[pair.source_key] = pair.source, pair.reconstruction
        if known:
            values |= zip(known, _between(self._model(), list(known.values()), self._device), strict=True)
        return [{"reconstruction_lpips": values[pair.source_key]} for pair in pairs]


def _between(model: LpipsModel, pictures: Sequence[tuple[Pixels, Pixels]], device: torch.device) -> list[float]:
    """Distances of pairs of pictures of one shape."""
    ours, theirs = (as_batch(side).to(device) for side in zip(*pictures, strict=True))
    values: list[float] = model(ours, theirs).tolist()
    return values
