"""Prompt-to-Prompt (Hertz et al., ICLR 2023, arXiv 2208.01626): the source's attention maps in the place of the target's.

Cross-attention maps of words that both prompts have (or that swap places) are taken over for the first
`p2p_cross_replace` of the steps, self-attention maps of at most `p2p_self_cells` cells for the first `p2p_self_replace`.
As in the authors' code only the conditional row is edited. The paper edits generated pictures; for a real one the maps are
read at the kept latents of its inversion, so that the source is what it is and not what guidance would make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.diffusion import constants
from pnp_batch.diffusion.guidance import guidance_rows, replaced_steps
from pnp_batch.diffusion.inversion import denoise, weighted_sum
from pnp_batch.diffusion.model import DiffusionModel
from pnp_batch.diffusion.steps import Loop, State, plain_loop
from pnp_batch.methods.pnp import Batch
from pnp_batch.methods.sampling import Watch, guided_step


@torch.inference_mode()
def translate(
    model: DiffusionModel,
    trajectory: Tensor,
    source_prompts: Sequence[str],
    batches: Sequence[Batch],
    loop: Loop = plain_loop,
    watch: Watch | None = None,
) -> list[Tensor]:
    """Translates guidance images to target prompts.

    Args:
        model: The model.
        trajectory: (sources, steps, 4, height, width) float32: the kept latents, one per sampling timestep, descending.
        source_prompts: The prompt each source was inverted (or generated) with; its words are compared with the target's.
        batches: The targets; all have `num_inference_steps` equal to the trajectory's steps.
        loop: Runs the steps (with checkpoints and progress).
        watch: Called after each step of each batch with the batch's number, the timestep and its latents.

    Returns:
        For each batch its final latents, (targets, 4, height, width) float32.
    """
    timesteps = model.checkpoint.schedule.timesteps(trajectory.shape[1])
    edits = [
        [edit_of(model.checkpoint, source_prompts[t.source], t.prompt, t.settings.p2p_edit) for t in b] for b in batches
    ]
    start = {str(n): trajectory[[t.source for t in batch], 0].to(model.device) for n, batch in enumerate(batches)}

    def step(i: int, state: State) -> None:
        for n, batch in enumerate(batches):
            if i < max(max(replaced_steps(target.settings)) for target in batch):
                pair = _Pair(model, batch, edits[n], source_prompts, trajectory[:, i])
                state[str(n)] = denoise(model, state[str(n)], pair.output(state[str(n)], timesteps[i], i), timesteps, i)
            else:
                state[str(n)] = guided_step(model, batch, state[str(n)], timesteps, i)
            if watch:
                watch(n, timesteps[i], state[str(n)])

    end = loop("translate", len(timesteps), start, step)
    return [end[str(n)] for n in range(len(batches))]


@dataclass(frozen=True)
class Edit:
    """How the cross-attention of a target prompt is made from that of its source prompt.

    Attributes:
        mapping: (source tokens, target tokens): which source maps make up the map of a target token.
        kept: (target tokens,) 1 where the source's map is taken, 0 where the target's own stays.
    """

    mapping: Tensor
    kept: Tensor


def edit_of(checkpoint: Checkpoint, source: str, target: str, kind: str) -> Edit:
    """The edit between two prompts; `auto` takes words for swapped where there are as many of them, else for refined."""
    first, second = _tokens(checkpoint, source), _tokens(checkpoint, target)
    if kind == "replace" or (kind == "auto" and len(source.split()) == len(target.split())):
        return _replacement(first, second, checkpoint.max_tokens)
    return _refinement(first, second, checkpoint.max_tokens)


@dataclass(frozen=True)
class _Tokens:
    """A prompt's tokens, without padding.

    Attributes:
        ids: Start token first, end token last.
        words: The number of the word each token belongs to, -1 for start and end.
    """

    ids: list[int]
    words: list[int]


def _tokens(checkpoint: Checkpoint, prompt: str) -> _Tokens:
    encoded = checkpoint.tokenizer(
        prompt, max_length=checkpoint.max_tokens, truncation=True, return_offsets_mapping=True
    )
    begins = [
        len(prompt[:begin].split()) - (begin > 0 and not prompt[begin - 1].isspace())
        for begin, _ in encoded.offset_mapping
    ]
    words = [
        -1 if begin == end else number for number, (begin, end) in zip(begins, encoded.offset_mapping, strict=True)
    ]
    return _Tokens(list(encoded.input_ids), words)


def _replacement(source: _Tokens, target: _Tokens, length: int) -> Edit:
    """Word swap: the word at the same place has the same map, shared out where it has another number of tokens."""
    mapping = torch.zeros(length, length)
    for word in sorted({*source.words} & {*target.words} - {-1}):
        rows = [i for i, other in enumerate(source.words) if other == word]
        columns = [i for i, other in enumerate(target.words) if other == word]
        if len(rows) == len(columns):
            mapping[rows, columns] = 1.0
        else:
            mapping[torch.tensor(rows)[:, None], torch.tensor(columns)] = 1.0 / len(columns)
    _map_ends(mapping, source, target)
    return Edit(mapping, torch.ones(length))


def _refinement(source: _Tokens, target: _Tokens, length: int) -> Edit:
    """Tokens that both prompts have in the same order keep their maps; what is new in the target has its own."""
    mapping, kept = torch.zeros(length, length), torch.zeros(length)
    for row, column in _common(source.ids, target.ids):
        mapping[row, column] = kept[column] = 1.0
    _map_ends(mapping, source, target)
    kept[len(target.ids) :] = 1.0
    return Edit(mapping, kept)


def _map_ends(mapping: Tensor, source: _Tokens, target: _Tokens) -> None:
    """Start to start, end to end, and the padding behind it in order."""
    length = len(mapping)
    mapping[0, 0] = 1.0
    for column in range(len(target.ids) - 1, length):
        mapping[min(len(source.ids) - len(target.ids) + column, length - 1), column] = 1.0


def _common(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[int, int]]:
    """A longest common subsequence, as pairs of places (what the authors' alignment with free gaps amounts to)."""
    best = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in reversed(range(len(first))):
        for j in reversed(range(len(second))):
            same = first[i] == second[j]
            best[i][j] = best[i + 1][j + 1] + 1 if same else max(best[i + 1][j], best[i][j + 1])
    i = j = 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            yield i, j
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1


class _Pair:
    """The rows of one pass: the batch's guidance images, then the guidance rows of its targets."""

    def __init__(
        self, model: DiffusionModel, batch: Batch, edits: Sequence[Edit], source_prompts: Sequence[str], latents: Tensor
    ) -> None:
        self.model, self.batch, self.edits = model, batch, edits
        self.sources = list(dict.fromkeys(target.source for target in batch))
        self.prompts = [source_prompts[source] for source in self.sources]
        self.latents = latents[self.sources].to(model.device)

    def output(self, latents: Tensor, timestep: int, step: int) -> Tensor:
        """The guided prediction for the targets' latents, (targets, 4, height, width)."""
        rows = [(n, row) for n, t in enumerate(self.batch) for row in guidance_rows(t.prompt, t.settings, step)]
        owner = constants.indices((n for n, _ in rows), self.model.device)
        weights = constants.numbers((row.weight for _, row in rows), self.model.device)
        # The prompt's row is the last of a target's rows, and there wherever guidance is not 0.
        last = {
            n: len(self.sources) + place for place, (n, _) in enumerate(rows) if self.batch[n].settings.guidance_scale
        }
        crossed = [n for n in last if step < replaced_steps(self.batch[n].settings)[0]]
        copied = [n for n in last if step < replaced_steps(self.batch[n].settings)[1]]
        with ExitStack() as stack:
            if crossed:
                stack.enter_context(self._cross_replaced(crossed, [last[n] for n in crossed]))
            if copied:
                stack.enter_context(self._self_replaced(copied, [last[n] for n in copied]))
            output = self.model.predict(
                torch.cat([self.latents, latents[owner]]), timestep, [*self.prompts, *(row.text for _, row in rows)]
            )
        return weighted_sum(output[len(self.sources) :], owner, weights, len(self.batch))

    def _row_of(self, target: int) -> int:
        return self.sources.index(self.batch[target].source)

    @contextmanager
    def _cross_replaced(self, targets: Sequence[int], rows: Sequence[int]) -> Iterator[None]:
        """Within the block, cross-attention maps of some rows are made from their sources'."""
        dtype, device = self.model.dtype, self.model.device
        edited, sources = (constants.indices(places, device) for places in (rows, map(self._row_of, targets)))
        mapping = torch.stack([self.edits[n].mapping for n in targets]).to(device, dtype)[:, None]
        kept = torch.stack([self.edits[n].kept for n in targets]).to(device, dtype)[:, None, None]

        def edit(maps: Tensor) -> Tensor:
            maps[edited] = kept * (maps[sources] @ mapping) + (1 - kept) * maps[edited]
            return maps

        with ExitStack() as stack:
            for attention in _attentions(self.model.unet, ".attn2"):
                stack.callback(attention.set_processor, attention.processor)
                attention.set_processor(_EditedCrossAttention(edit))
            yield

    @contextmanager
    def _self_replaced(self, targets: Sequence[int], rows: Sequence[int]) -> Iterator[None]:
        """Within the block, small self-attentions of some rows have their sources' queries and keys, so their maps."""
        copies = [
            (self.batch[n].settings.p2p_self_cells, self._row_of(n), row) for n, row in zip(targets, rows, strict=True)
        ]

        def copy(_module: object, _inputs: object, output: Tensor) -> Tensor | None:
            small = [(source, row) for limit, source, row in copies if output.shape[1] <= limit]
            if not small:
                return None
            copied = output.clone()
            for source, row in small:
                copied[row] = output[source]
            return copied

        with ExitStack() as stack:
            for attention in _attentions(self.model.unet, ".attn1"):
                for leaf in (attention.to_q, attention.to_k):
                    stack.callback(leaf.register_forward_hook(copy).remove)
            yield


def _attentions(unet: Any, suffix: str) -> list[Any]:
    return [module for name, module in unet.named_modules() if name.endswith(suffix)]


class _EditedCrossAttention:
    """diffusers' plain attention processor for the cross-attention of transformer blocks, with its maps edited."""

    def __init__(self, edit: Callable[[Tensor], Tensor]) -> None:
        self.edit = edit

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Attention of (rows, tokens, channels) to a text; maps are edited as (rows, heads, tokens, text tokens)."""
        query, key, value = (
            attn.head_to_batch_dim(states)
            for states in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        maps = attn.get_attention_scores(query, key, attention_mask)
        maps = self.edit(maps.unflatten(0, (-1, attn.heads))).flatten(0, 1)
        output = attn.batch_to_head_dim(maps @ value)
        return attn.to_out[1](attn.to_out[0](output))  # type: ignore[no-any-return]
