"""The loop over timesteps. Every long loop runs through one, so all of them can be checkpointed and watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pnp_batch.store.checkpoints import LoopCheckpoint

if TYPE_CHECKING:
    from pnp_batch.diffusion.model import DiffusionModel

State = dict[str, Tensor]


class Loop(Protocol):
    """Runs `step(i, state)` for i up to `count - 1`, from 0 or from where an earlier run stopped; gives the state."""

    def __call__(self, name: str, count: int, state: State, step: Callable[[int, State], None]) -> State:
        """Runs the loop that is called `name`."""
        ...


@torch.inference_mode()
def plain_loop(name: str, count: int, state: State, step: Callable[[int, State], None]) -> State:
    """Saves nothing."""
    for i in range(count):
        step(i, state)
    return state


class CheckpointedLoop:
    """Saves the state of one batch's loops from time to time and continues from what was saved.

    Args:
        checkpoints: Gives the saved state of a loop by its name.
        model: Where the state lives and whose rows are counted.
        watch: Told the UNet rows computed by each step.
    """

    def __init__(
        self, checkpoints: Callable[[str], LoopCheckpoint], model: DiffusionModel, watch: Callable[[int], None]
    ) -> None:
        self._checkpoints, self._model, self._watch = checkpoints, model, watch
        self._used: list[LoopCheckpoint] = []

    @torch.inference_mode()
    def __call__(self, name: str, count: int, state: State, step: Callable[[int, State], None]) -> State:
        """Runs one loop; see `Loop`."""
        saved = self._checkpoints(name)
        assert saved.path not in {used.path for used in self._used}, f"two loops of one batch are called {name}"
        self._used.append(saved)
        begin = 0
        if found := saved.load():
            begin, arrays = found
            state = {key: torch.from_numpy(array).to(self._model.device) for key, array in arrays.items()}
        for i in range(begin, count):
            before = self._model.rows
            step(i, state)
            self._watch(self._model.rows - before)
            if saved.due() and i + 1 < count:
                saved.save(i + 1, {key: tensor.cpu().numpy() for key, tensor in state.items()})
        return state

    def clear(self) -> None:
        """Removes what was saved: the batch is published."""
        for saved in self._used:
            saved.clear()
