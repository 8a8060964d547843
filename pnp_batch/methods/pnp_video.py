"""Plug-and-Play for the frames of a video together: PnP's injection with TokenFlow's consistency (`diffusion/tokenflow.py`).

At each step the keyframes of a window go first, all in one pass; then all frames, some at a time. Source features are read
once per frame and step for all prompts of the window. What a prompt gives never depends on the other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pnp_batch.clips import SEGMENT
from pnp_batch.diffusion import constants, ddim
from pnp_batch.diffusion.guidance import Row, guidance_rows
from pnp_batch.diffusion.injection import injected, read_features
from pnp_batch.diffusion.inversion import denoise, weighted_sum
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.sites import FeatureSite, Site
from pnp_batch.diffusion.steps import Loop, State, plain_loop
from pnp_batch.diffusion.tokenflow import (
    Features,
    Flow,
    LatentFlow,
    TokenSite,
    between,
    flow,
    joint_attention,
    keyframes,
    latent_flow,
    propagated,
    token_sites,
)
from pnp_batch.methods.pnp import Target, sites_of


@torch.inference_mode()
def translate(
    model: DiffusionModel,
    trajectory: Tensor,
    source_prompt: str,
    targets: Sequence[Target],
    first: int,
    chunk: int,
    loop: Loop = plain_loop,
) -> list[Tensor]:
    """Translates the frames of a window to target prompts.

    Args:
        model: The model.
        trajectory: (frames, steps, 4, height, width) float32: the kept latents of each frame, timesteps descending.
        source_prompt: The prompt the frames were inverted with.
        targets: One for each prompt; `source` means nothing here.
        first: Place of the window's first frame in the clip.
        chunk: Frames in one UNet pass.
        loop: Runs the steps.

    Returns:
        For each target its final latents, (frames, 4, height, width) float32.
    """
    return _Window(model, trajectory, source_prompt, targets, first, chunk).translated(loop)


class _Window:
    def __init__(
        self,
        model: DiffusionModel,
        trajectory: Tensor,
        source_prompt: str,
        targets: Sequence[Target],
        first: int,
        chunk: int,
    ) -> None:
        self.model, self.trajectory, self.source_prompt = model, trajectory, source_prompt
        self.targets, self.first = targets, first
        self.timesteps = model.checkpoint.schedule.timesteps(trajectory.shape[1])
        self.tokens = token_sites(model.unet)
        frames = range(len(trajectory))
        self.chunks = [frames[i : i + chunk] for i in range(0, len(frames), chunk)]

    def translated(self, loop: Loop) -> list[Tensor]:
        start = {str(n): self.trajectory[:, 0].clone().to(self.model.device) for n in range(len(self.targets))}
        end = loop("translate", len(self.timesteps), start, self._step)
        return [end[str(n)] for n in range(len(self.targets))]

    def _step(self, i: int, state: State) -> None:
        shared: dict[tuple[int, ...], Features] = {}  # prompts of one seed share their keyframes
        known = []
        keys = [tuple(self._keys(target, i)) for target in self.targets]
        for n, target in enumerate(self.targets):
            shared[keys[n]] = shared.get(keys[n]) or self._source(keys[n], i)
            known.append(self._keyframes(target, keys[n], state[str(n)], i, shared[keys[n]]))
        for frames in self.chunks:
            source = self._source(frames, i)
            flows = {each: self._flows(frames, each, source, tokens) for each, tokens in shared.items()}
            for n, target in enumerate(self.targets):
                latents = state[str(n)][frames.start : frames.stop]
                output = self._between(target, latents, i, source, known[n], *flows[keys[n]])
                state[str(n)][frames.start : frames.stop] = denoise(self.model, latents, output, self.timesteps, i)

    def _keys(self, target: Target, i: int) -> list[int]:
        return keyframes(target.settings.seed, i, self.first, len(self.trajectory), SEGMENT)

    def _flows(
        self, frames: Sequence[int], keys: Sequence[int], source: Features, key_source: Features
    ) -> tuple[Flow, LatentFlow]:
        places = between(frames, keys, self.model.device)
        clean = self.trajectory[:, -1].to(self.model.device)  # at the last timestep hardly any noise is left
        tokens = flow(self.tokens, source, key_source, places)
        return tokens, latent_flow(clean[list(frames)], clean[list(keys)], places)

    def _source(self, frames: Sequence[int], i: int) -> Features:
        """What the source has at a step: everything that any target injects, and the tokens of every self-attention."""
        wanted: dict[Site | TokenSite, None] = {s: None for t in self.targets for s in sites_of(self.model, t, i)}
        latents = self.trajectory[list(frames), i].to(self.model.device)
        texts = [self.source_prompt] * len(frames)
        return read_features([*wanted, *self.tokens], lambda: self.model.predict(latents, self.timesteps[i], texts))

    def _keyframes(
        self, target: Target, keys: Sequence[int], latents: Tensor, i: int, source: Features
    ) -> tuple[Features, Tensor]:
        """What the self-attentions of the keyframes get, attending to each other, and the clean latents they predict."""
        rows = guidance_rows(target.prompt, target.settings, i)
        sites = sites_of(self.model, target, i)
        own = latents[list(keys)]
        with joint_attention(self.tokens, len(keys)) as outputs:
            output = self._guided(rows, own, i, sites, source)
        return outputs, ddim.clean_from(output, own, self._alpha(i), self.model.prediction_type)

    def _between(
        self,
        target: Target,
        latents: Tensor,
        i: int,
        source: Features,
        known: tuple[Features, Tensor],
        tokens: Flow,
        cells: LatentFlow,
    ) -> Tensor:
        """The guided prediction for some frames, with self-attention and likeness taken from the keyframes."""
        rows = guidance_rows(target.prompt, target.settings, i)
        # Queries and keys are void: the self-attentions they would go into are not computed.
        sites = [site for site in sites_of(self.model, target, i) if isinstance(site, FeatureSite)]
        outputs, key_clean = known
        with propagated(self.tokens, outputs, tokens):
            output = self._guided(rows, latents, i, sites, source)
        alpha, kind = self._alpha(i), self.model.prediction_type
        clean = cells.followed(ddim.clean_from(output, latents, alpha, kind), key_clean)
        return ddim.output_for(clean, latents, alpha, kind)

    def _alpha(self, i: int) -> float:
        return self.model.alphas[self.timesteps[i]]

    def _guided(self, rows: Sequence[Row], latents: Tensor, i: int, sites: Sequence[Site], source: Features) -> Tensor:
        output = self._pass(rows, latents, i, sites, source)
        owner = torch.arange(len(latents), device=output.device).repeat(len(rows))
        weights = constants.numbers((row.weight for row in rows), output.device).repeat_interleave(len(latents))
        return weighted_sum(output, owner, weights, len(latents))

    def _pass(self, rows: Sequence[Row], latents: Tensor, i: int, sites: Sequence[Site], source: Features) -> Tensor:
        """One UNet pass: all frames under the first text, then under the next."""
        features = {name: torch.cat([source[name]] * len(rows)) for site in sites for name in site.leaves}
        texts = [row.text for row in rows for _ in range(len(latents))]
        with injected(sites, features):
            return self.model.predict(torch.cat([latents] * len(rows)), self.timesteps[i], texts)
