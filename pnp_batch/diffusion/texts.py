"""Texts as a UNet sees them: encoded once, their keys and values projected once, and kept while there is room for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pnp_batch.checkpoint import Checkpoint
from pnp_batch.diffusion.injection import Given

CACHED_BATCHES = 4


class Conditioning(NamedTuple):
    """What the rows of a pass see.

    Attributes:
        hidden: (rows, tokens, channels): text features, for cross-attention.
        pooled: (rows, channels): SDXL's summary of each text, None elsewhere.
        projections: Keys and values of every cross-attention, which no step changes, as replacements for what computes them.
    """

    hidden: Tensor
    pooled: Tensor | None
    projections: list[tuple[Any, str, Given]]


class _Text(NamedTuple):
    """One text's features, its summary, and its keys and values in every cross-attention."""

    hidden: Tensor
    pooled: Tensor | None
    projected: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.hidden, *self.projected))


@dataclass
class Texts:
    """The texts of one model.

    Attributes:
        checkpoint: Has the tokenizers.
        encoders: One text encoder, or the two of SDXL.
        cross_attentions: Those of the UNet, in order.
        dtype: Of the UNet.
        device: Where all of them are.
        budget: Bytes that the kept texts may take.
    """

    checkpoint: Checkpoint
    encoders: Sequence[Any]
    cross_attentions: Sequence[Any]
    dtype: torch.dtype
    device: torch.device
    budget: float
    _known: dict[str, _Text] = field(default_factory=dict)
    _batches: dict[tuple[str, ...], Conditioning] = field(default_factory=dict)

    def hidden(self, texts: Sequence[str]) -> Tensor:
        """Text features, (rows, tokens, channels)."""
        return torch.cat([self._text(text).hidden for text in texts])

    def conditioning(self, texts: tuple[str, ...]) -> Conditioning:
        """What rows see that are given these texts."""
        if texts not in self._batches:
            while len(self._batches) >= CACHED_BATCHES:
                _drop_oldest(self._batches)
            known = [self._text(text) for text in texts]
            pooled = [text.pooled for text in known if text.pooled is not None]
            outputs = (torch.cat(rows) for rows in zip(*(text.projected for text in known), strict=True))
            leaves = ((attention, name) for attention in self.cross_attentions for name in ("to_k", "to_v"))
            self._batches[texts] = Conditioning(
                torch.cat([text.hidden for text in known]),
                torch.cat(pooled) if pooled else None,
                [(owner, name, Given(output)) for (owner, name), output in zip(leaves, outputs, strict=True)],
            )
        return self._batches[texts]

    @torch.inference_mode()
    def _text(self, text: str) -> _Text:
        """Each text is encoded and projected once, alone, so that no batch changes it."""
        known = self._known.pop(text, None) or self._projected(text)
        self._known[text] = known  # now the newest
        while len(self._known) > 1 and len(self._known) * known.bytes > self.budget:
            _drop_oldest(self._known)
        return known

    def _projected(self, text: str) -> _Text:
        hidden, pooled = self._encoded(text)
        if not text and self.checkpoint.zeros_for_empty_prompt:
            hidden, pooled = torch.zeros_like(hidden), None if pooled is None else torch.zeros_like(pooled)
        return _Text(
            hidden, pooled, [leaf(hidden) for each in self.cross_attentions for leaf in (each.to_k, each.to_v)]
        )

    def _encoded(self, text: str) -> tuple[Tensor, Tensor | None]:
        if len(self.encoders) == 1:
            return self._run(0, text)[0].to(self.dtype), None
        # SDXL (Podell et al. 2023, section 2.1): both encoders' last layer but one side by side, and the second one's summary.
        outputs = [self._run(place, text, output_hidden_states=True) for place in range(len(self.encoders))]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return hidden.to(self.dtype), outputs[-1].text_embeds.to(self.dtype)

    def _run(self, place: int, text: str, **wanted: bool) -> Any:
        encoder = self.encoders[place]
        tokens = self.checkpoint.tokenizers[place](
            text, padding="max_length", max_length=self.checkpoint.max_tokens, truncation=True, return_tensors="pt"
        ).to(self.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return encoder(tokens.input_ids, attention_mask=mask, **wanted)


def _drop_oldest(cache: dict[Any, Any]) -> None:
    cache.pop(next(iter(cache)))
