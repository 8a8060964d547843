"""The one training loop: AdamW with warm-up and cosine decay, gradient clipping, an average of the weights, resumable.

What step `i` sees is a function of `i` alone, so a run that was killed and repeated learns from the very same pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pnp_batch.errors import PnpError
from pnp_batch.store.checkpoints import LoopCheckpoint
from pnp_batch.store.files import write_atomic

SECONDS_BETWEEN_NEWS = 30.0


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to learn.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At its highest.
        warm_up: Steps over which the learning rate rises to that.
        final: The learning rate's end, as a fraction of its height.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: Largest norm of the gradient.
        average: Decay of the running average of the weights, which is what is kept; 0 keeps the weights themselves.
    """

    steps: int
    learning_rate: float
    warm_up: int = 100
    final: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    average: float = 0.999

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warm_up:
            return self.learning_rate * (step + 1) / self.warm_up
        done = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return self.learning_rate * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Watch:
    """Who looks on.

    Attributes:
        say: Told about twice a minute how far it is.
        show: Draws what the averaged weights can do so far, given the number of steps done.
        every: Steps between two drawings.
    """

    say: Callable[[str], None] = print
    show: Callable[[int], object] = lambda step: None
    every: int = 250


SILENT = Watch(say=lambda line: None)


def learn(
    name: str,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    folder: Path,
    watch: Watch = SILENT,
    half: bool = False,
    about: str = "",
    seconds: float = 60.0,
) -> None:
    """Trains a network in place, from where an earlier run in the same folder stopped.

    Args:
        name: Of what is learnt, for its checkpoint.
        network: Its parameters become the averaged ones.
        loss: The loss of a step, a scalar; draws its data from the step's number.
        recipe: How.
        folder: Where the checkpoint is kept.
        watch: Who looks on.
        half: Whether to compute the loss in bfloat16 where torch's autocast thinks it safe; weights stay float32.
        about: Whatever else decides what is learnt: another value begins anew.
        seconds: Least time between two checkpoints.

    Raises:
        PnpError: The loss is not finite.
    """
    saved = LoopCheckpoint(folder, f"learn-{name}", [repr(recipe), about], seconds)
    learner = _Learner(network, recipe)
    begin = 0
    if found := saved.load():
        begin, arrays = found
        learner.restore({key: torch.from_numpy(array) for key, array in arrays.items()})
    news = _News(name, recipe.steps, watch.say)
    for step in range(begin, recipe.steps):
        network.train()
        with torch.autocast(learner.device.type, torch.bfloat16, enabled=half):
            scalar = loss(step)
        value = learner.step(step, scalar)
        if not math.isfinite(value):
            raise PnpError(f"the loss of {name} is not finite at step {step}; lower the learning rate")
        news.add(step, value)
        if saved.due() or step + 1 == recipe.steps:
            saved.save(step + 1, {key: tensor.cpu().numpy() for key, tensor in learner.state()})
        if (step + 1) % watch.every == 0 and step + 1 < recipe.steps:
            with learner.averaged():
                watch.show(step + 1)
    learner.swap()
    network.eval()


def is_half_faster(
    name: str, loss: Callable[[int], Tensor], device: torch.device, folder: Path, say: Callable[[str], None]
) -> bool:
    """Whether bfloat16 makes a step faster on this machine; without units for it, it is several times slower.

    The answer is kept beside the checkpoint: a training that went on in another dtype would not end with the same bits.

    Args:
        name: Of what is learnt.
        loss: The loss of a step, as for `learn`; of a network in evaluation mode, so that timing it changes nothing.
        device: Where it is computed.
        folder: Where the checkpoint is kept.
        say: Told what was found.
    """
    kept = folder / f"{name}.dtype"
    if kept.exists():
        return kept.read_text() == "bfloat16"
    seconds = {half: _seconds_of_a_step(loss, device, half) for half in (False, True)}
    say(f"{name}: {seconds[False]:.2f} s a step in float32, {seconds[True]:.2f} s in bfloat16; the faster is used")
    faster = seconds[True] < seconds[False]
    write_atomic(kept, "bfloat16" if faster else "float32")
    return faster


def _seconds_of_a_step(loss: Callable[[int], Tensor], device: torch.device, half: bool) -> float:
    for _ in range(3):  # the first pays for allocation and kernel choice
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            scalar = loss(0)
        scalar.backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - begin


class _News:
    """Lines that say how far a training is."""

    def __init__(self, name: str, steps: int, say: Callable[[str], None]) -> None:
        self.name, self.steps, self.say = name, steps, say
        self.losses: list[float] = []
        self.begin = self.last = time.monotonic()
        self.done = 0

    def add(self, step: int, loss: float) -> None:
        """Counts a step, and says something if it is time."""
        self.losses.append(loss)
        self.done += 1
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN_NEWS and step + 1 < self.steps:
            return
        pace = (now - self.begin) / self.done
        left = (self.steps - step - 1) * pace / 60
        mean = sum(self.losses) / len(self.losses)
        self.say(f"{self.name} {step + 1}/{self.steps}: loss {mean:.4f}, {pace:.2f} s a step, {left:.0f} min left")
        self.losses, self.last = [], now


class _Learner:
    """A network with its optimizer and the average of its weights."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.network, self.recipe = network, recipe
        self.names, self.parameters = zip(*network.named_parameters(), strict=True)
        self.device = self.parameters[0].device
        decayed = [p for p in self.parameters if p.ndim > 1]  # norms and biases are not pulled to zero
        plain = [p for p in self.parameters if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        for parameter, (first, second) in zip(self.parameters, self.moments, strict=True):
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": first, "exp_avg_sq": second}
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, step: int, loss: Tensor) -> float:
        """One optimizer step; gives the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        # An average over few steps is mostly the random start: shorter memory at the beginning.
        decay = min(self.recipe.average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return float(loss.detach())

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that a resumed run needs, by name."""
        yield from ((f"network.{name}", tensor) for name, tensor in self.network.state_dict().items())
        for name, average, (first, second) in zip(self.names, self.average, self.moments, strict=True):
            yield from ((f"average.{name}", average), (f"first.{name}", first), (f"second.{name}", second))
        yield "optimizer_steps", self.optimizer.state[self.parameters[0]]["step"]

    def restore(self, saved: dict[str, Tensor]) -> None:
        """Takes up the state of an earlier run."""
        with torch.no_grad():
            for name, tensor in self.state():
                if name != "optimizer_steps":
                    tensor.copy_(saved[name])
            for parameter in self.parameters:
                self.optimizer.state[parameter]["step"].copy_(saved["optimizer_steps"])

    def swap(self) -> None:
        """Exchanges the weights and their average."""
        if self.recipe.average:
            with torch.no_grad():
                for parameter, average in zip(self.parameters, self.average, strict=True):
                    kept = parameter.clone()
                    parameter.copy_(average)
                    average.copy_(kept)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the network has the averaged weights."""
        self.swap()
        self.network.eval()
        try:
            yield
        finally:
            self.swap()
