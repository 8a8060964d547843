"""Inversion that solves the sampler's own steps: the implicit equation of DDIM, by a warm start and Anderson mixing.

With y = x / sqrt(a), s = sqrt((1 - a) / a) and h_i = s_i - s_{i-1}, a DDIM step down is y_{i-1} = y_i - h_i e_i(y_i), where
e_i(z) is the noise predicted at sqrt(a_i) z and timestep t_i. Its exact inverse is the fixed point of

    f(z) = y_{i-1} + h_i e_i(z),        r = f(z) - z,

and r is the reconstruction error of the step (ReNoise, ECCV 2024; AIDI, ICCV 2023). A call contracts the error by
1 - s_{i-1} / s_i, which is slow in the first steps only; there the noise hardly changes along the trajectory, so that
extrapolating it starts almost at the solution. Anderson mixing over the last two residuals (Walker and Ni 2011) does the
rest. What is kept is f(z), not z: the error of the kept latent is one contraction smaller than the measured residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, State, plain_loop

HARD_CONTRACTION = (
    0.19  # a step of which a call leaves more than this of the error (t = 1 to 61 of 50) may take HARD_CALLS
)
HARD_CALLS, EASY_CALLS = 12, 4
MEMORY = 2
UNSOLVED = 10  # a residual above so many tolerances means that the iteration finds no solution


@dataclass(frozen=True)
class Inversion:
    """What an inversion gives, row by row.

    Attributes:
        kept: (rows, steps, 4, height, width), one latent per sampling timestep, from the largest down.
        calls: (rows,) UNet rows that each picture took.
        residual: (rows,) largest residual left in any step, rms in units of the clean latent.
        drift: (rows, 4, height, width) sum of all residuals: about what sampling back will be off by.
        solved: For each picture whether every step was solved.
    """

    kept: Tensor
    calls: Tensor
    residual: Tensor
    drift: Tensor
    solved: list[bool]


def fixed_point_invert(
    model: DiffusionModel,
    latents: Tensor,
    prompts: Sequence[str],
    timesteps: Sequence[int],
    tolerance: float,
    loop: Loop = plain_loop,
) -> Inversion:
    """Inverts the sampler's own grid; each picture stops by its own residual.

    Args:
        model: The model.
        latents: (rows, 4, height, width) float32, the pictures' latents.
        prompts: The inversion prompt of each.
        timesteps: Descending sampling timesteps.
        tolerance: A step is solved once the rms of its residual, in units of the clean latent, is below this.
        loop: Runs the steps (with checkpoints and progress).
    """
    inverter = _Inverter(model, prompts, timesteps[::-1], tolerance)
    end = loop("fixed-point", len(timesteps), inverter.start(latents), inverter.step)
    solved = [bool(residual <= UNSOLVED * tolerance) for residual in end["residual"]]  # NaN is not solved either
    return Inversion(end["kept"], end["calls"], end["residual"], end["drift"], solved)


@dataclass(frozen=True)
class _Inverter:
    """The steps of an inversion over an ascending grid."""

    model: DiffusionModel
    prompts: Sequence[str]
    grid: Sequence[int]
    tolerance: float

    @cached_property
    def levels(self) -> list[float]:
        """a_0, a_1, ...: `alphas_cumprod` of the clean latent and along the grid."""
        return [self.model.final_alpha, *(self.model.alphas[t] for t in self.grid)]

    @cached_property
    def s(self) -> list[float]:
        """s_0, s_1, ...: noise to signal."""
        return [((1 - a) / a) ** 0.5 for a in self.levels]

    def start(self, latents: Tensor) -> State:
        """The state before the first step. Slope is the noise of the last step, bend how it changed."""
        rows = len(latents)
        return {
            "y": latents / self.levels[0] ** 0.5,
            "slope": torch.zeros_like(latents),
            "bend": torch.zeros_like(latents),
            "kept": latents.new_empty(rows, len(self.grid), *latents.shape[1:]),
            "calls": torch.zeros(rows, dtype=torch.int64, device=latents.device),
            "residual": latents.new_zeros(rows),
            "drift": torch.zeros_like(latents),
        }

    def step(self, i: int, state: State) -> None:
        """Solves for the latents at `grid[i]`."""
        h, before = self.s[i + 1] - self.s[i], self.s[i] - self.s[i - 1] if i else 0.0
        if h:  # a grid that begins at timestep 0 has a first step that changes nothing
            warm = state["slope"] + (h / before) * state["bend"] if before else state["slope"]
            budget = HARD_CALLS if h > HARD_CONTRACTION * self.s[i + 1] else EASY_CALLS
            solver = _Step(self, i, state["y"], h, budget)
            y = solver.solve(state["y"] + h * warm)
            slope = (y - state["y"]) / h
            state |= {"y": y, "bend": slope - state["slope"] if before else state["bend"], "slope": slope}
            state["calls"] += solver.calls
            state["residual"] = torch.maximum(state["residual"], solver.best)
            state["drift"] += self.levels[0] ** 0.5 * solver.left
        state["kept"][:, len(self.grid) - 1 - i] = state["y"] * self.levels[i + 1] ** 0.5


class _Step:
    """The equation of one step for a batch of pictures, and its solution."""

    def __init__(self, inverter: _Inverter, i: int, y: Tensor, h: float, budget: int) -> None:
        self.model, self.texts, self.tolerance = inverter.model, inverter.prompts, inverter.tolerance
        self.timestep, self.a = inverter.grid[i], inverter.levels[i + 1]
        self.y, self.h, self.budget = y, h, budget
        self.unit = inverter.levels[i] ** 0.5
        self.calls = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        self.best = y.new_full((len(y),), torch.inf)
        self.left = torch.zeros_like(y)

    def solve(self, z: Tensor) -> Tensor:
        """Iterates from z until every picture's residual is small; gives f of each picture's best z."""
        solution = z.clone()
        active = torch.arange(len(z), device=z.device)
        past: list[tuple[Tensor, Tensor]] = []
        last = self.best.clone()
        for _ in range(self.budget):
            f = self._f(z, active)
            r = f - z
            size = self.unit * r.flatten(1).square().mean(1).sqrt()
            better = size < self.best[active]
            solution[active[better]] = f[better]
            self.left[active[better]] = r[better]
            self.best[active] = torch.minimum(size, self.best[active])
            self.calls[active] += 1
            going = ~(size < self.tolerance)
            grew = (size > last)[going]
            z = _mixed(f[going], r[going], [(pf[going], pr[going]) for pf, pr in past], grew)
            past = [(f[going], r[going]), *((pf[going], pr[going]) for pf, pr in past)][:MEMORY]
            active, last = active[going], size[going]
            if not len(active):
                break
        return solution

    def _f(self, z: Tensor, active: Tensor) -> Tensor:
        noise = self.model.noise(self.a**0.5 * z, self.timestep, [self.texts[i] for i in active.tolist()])
        return self.y[active] + self.h * noise


def _mixed(f: Tensor, r: Tensor, past: Sequence[tuple[Tensor, Tensor]], grew: Tensor) -> Tensor:
    """Anderson's next iterate: f minus the combination of past differences that cancels most of the residual.

    Args:
        f: (rows, ...) the function's values.
        r: Its residuals.
        past: Earlier values and residuals, newest first.
        grew: (rows,) whether the residual grew; such a row forgets its past and takes the plain step.
    """
    if not past or not len(f):
        return f
    rows = len(f)
    residual = r.reshape(rows, -1, 1).double()
    dr = torch.stack([(r - pr).reshape(rows, -1) for _, pr in past], 2).double()
    df = torch.stack([(f - pf).reshape(rows, -1) for pf, _ in past], 2).double()
    gram = dr.mT @ dr
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    weights = torch.linalg.solve(gram + ridge[:, None, None] * torch.eye(len(past), device=f.device), dr.mT @ residual)
    weights = torch.where(grew[:, None, None], 0.0, weights)
    return f - (df @ weights).reshape(f.shape).to(f.dtype)
