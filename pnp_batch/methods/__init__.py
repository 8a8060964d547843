"""Translation methods. One file and one line here per method; what a method needs is declared without importing torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pnp_batch.diffusion.guidance import guidance_rows, injected_steps, is_constant
from pnp_batch.manifest import Settings


@dataclass(frozen=True)
class Method:
    """A translation method.

    Attributes:
        function: Where it is, as `module:name`; loaded when something is to be computed.
        version: Part of every key: raise it when the same settings give other pictures.
        source_rows: UNet rows computed once per guidance image for all of its prompts.
        target_rows: UNet rows computed per translation.
    """

    function: str
    version: int
    source_rows: Callable[[Settings], int]
    target_rows: Callable[[Settings], int]

    def load(self) -> Callable[..., Any]:
        """Imports the method."""
        module, name = self.function.split(":")
        return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _guided_rows(settings: Settings) -> int:
    """The texts decide only whether two rows are one, and a prompt is never empty: any will do."""
    rows = [
        len(guidance_rows("target", settings, i))
        for i in range(1 if is_constant(settings) else settings.num_inference_steps)
    ]
    return rows[0] * settings.num_inference_steps if len(rows) == 1 else sum(rows)


METHODS: dict[str, Method] = {
    "pnp": Method("pnp_batch.methods.pnp:translate", 1, lambda settings: max(injected_steps(settings)), _guided_rows),
}
