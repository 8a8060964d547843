"""The stages of a run, in order. A stage takes the items of a work package and makes what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pnp_batch.stages import assemble, bank, invert, translate
from pnp_batch.stages.work import Context, Item

STAGES: dict[str, Callable[[Context, Sequence[Item]], None]] = {
    "invert": invert.run,
    "bank": bank.run,
    "translate": translate.run,
    "assemble": assemble.run,
}
