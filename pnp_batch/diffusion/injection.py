"""Reading source features and injecting them, by replacing leaf modules for one forward pass.

A leaf whose output is known (`conv2`, `to_q`, `to_k` at an injected site) is replaced by a module that returns it, and the
leaves that only feed it are replaced by modules that compute nothing. So injection costs less than no injection, no
`forward` is rewritten, and any attention processor works. Everything is put back in `finally`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

from torch import Tensor, nn

from pnp_batch.diffusion.sites import FeatureSite, Site

Features = Mapping[str, Tensor]


class _AllRead(Exception):
    """Stops a forward pass once every wanted feature is there: the rest of the decoder would be void work."""


class Readable(Protocol):
    """Something whose leaves can be read."""

    @property
    def leaves(self) -> dict[str, nn.Module]:
        """The modules whose outputs are wanted, by feature name."""


def read_features(sites: Sequence[Readable], forward: Callable[[], object]) -> dict[str, Tensor]:
    """Runs a forward pass just as deep as the last site and returns what the sites' leaves gave.

    Args:
        sites: The sites to read.
        forward: Runs the UNet.

    Returns:
        Features by name: `f4` (rows, channels, height, width); `a4.0.q`, `a4.0.k` (rows, tokens, channels).
    """
    leaves = {name: leaf for site in sites for name, leaf in site.leaves.items()}
    features: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def read(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            features[name] = output
            if len(features) == len(leaves):
                raise _AllRead

        return read

    handles = [leaf.register_forward_hook(reader(name)) for name, leaf in leaves.items()]
    try:
        forward()
    except _AllRead:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return features


@contextmanager
def injected(sites: Sequence[Site], features: Features) -> Iterator[None]:
    """Within the block, the sites give these features instead of computing their own.

    Args:
        sites: The sites to inject at.
        features: For each leaf of a site its output, with as many rows as the forward pass will have.
    """
    with replaced(
        (site.resnet if isinstance(site, FeatureSite) else site.attention, name, module)
        for site in sites
        for name, module in _replacements(site, features).items()
    ):
        yield


@contextmanager
def replaced(modules: Iterable[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Within the block, each named child of an owner is another module; afterwards all are what they were."""
    with ExitStack() as stack:
        for owner, name, module in modules:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, module)
        yield


def _replacements(site: Site, features: Features) -> dict[str, nn.Module]:
    if isinstance(site, FeatureSite):
        return {"norm1": _Nothing(), "conv1": _Nothing(), "norm2": nn.Identity(), "conv2": Given(features[site.name])}
    return {"to_q": Given(features[f"{site.name}.q"]), "to_k": Given(features[f"{site.name}.k"])}


class Given(nn.Module):
    """Returns a known output, whatever it is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_inputs: Tensor) -> Tensor:
        """The known output."""
        return self.output


class _Nothing(nn.Module):
    """Stands for a computation nobody reads: one zero that broadcasts."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.new_zeros(1, 1, 1, 1)
