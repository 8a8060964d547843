"""Translation methods. One file and one line here per method; what a method needs is declared without importing torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from pnp_batch.diffusion.guidance import guidance_rows, injected_steps, is_constant, replaced_steps, skipped_steps
from pnp_batch.manifest import Settings


@dataclass(frozen=True)
class Method:
    """A translation method.

    Attributes:
        function: Where it is, as `module:name`; loaded when something is to be computed.
        version: Part of every key: raise it when the same settings give other pictures.
        source_rows: UNet rows computed once per guidance image for all of its prompts.
        target_rows: UNet rows computed per translation.
        needs: What it is given of a guidance image: its `trajectory` of latents, or only the `latent` it encodes to, which
            costs no UNet row.
        needs_source_prompt: Whether it compares the target prompt with that of the guidance image.
        settings: Its own settings that are part of a result's key.
        uses_layers: Whether it injects at decoder layers.
        joint: Where the same method for the frames of a video together is; empty where there is none.
    """

    function: str
    version: int
    source_rows: Callable[[Settings], int]
    target_rows: Callable[[Settings], int]
    needs: Literal["trajectory", "latent"] = "trajectory"
    needs_source_prompt: bool = False
    settings: tuple[str, ...] = ()
    uses_layers: bool = False
    joint: str = ""

    def load(self) -> Callable[..., Any]:
        """Imports the method."""
        return _imported(self.function)

    def load_joint(self) -> Callable[..., Any]:
        """Imports the method for frames of a video together."""
        return _imported(self.joint)


def _imported(place: str) -> Callable[..., Any]:
    module, name = place.split(":")
    return getattr(import_module(module), name)  # type: ignore[no-any-return]


def _guided_rows(settings: Settings, first: int = 0) -> int:
    """Rows of guided sampling from step `first` on. The texts decide only whether two rows are one: any will do."""
    steps = range(first, settings.num_inference_steps)
    if is_constant(settings):
        return len(steps) * len(guidance_rows("target", settings, 0))
    return sum(len(guidance_rows("target", settings, i)) for i in steps)


def _no_rows(settings: Settings) -> int:
    return 0


METHODS: dict[str, Method] = {
    "pnp": Method(
        "pnp_batch.methods.pnp:translate",
        1,
        lambda settings: max(injected_steps(settings)),
        _guided_rows,
        settings=("pnp_f_t", "pnp_attn_t", "seed"),
        uses_layers=True,
        joint="pnp_batch.methods.pnp_video:translate",
    ),
    "ddim": Method("pnp_batch.methods.ddim:translate", 1, _no_rows, _guided_rows),
    "sdedit": Method(
        "pnp_batch.methods.sdedit:translate",
        1,
        _no_rows,
        lambda settings: _guided_rows(settings, skipped_steps(settings)),
        needs="latent",
        settings=("num_inference_steps", "sdedit_strength", "seed"),
    ),
    "p2p": Method(
        "pnp_batch.methods.p2p:translate",
        1,
        lambda settings: max(replaced_steps(settings)),
        _guided_rows,
        needs_source_prompt=True,
        settings=("p2p_edit", "p2p_cross_replace", "p2p_self_replace", "p2p_self_cells"),
    ),
    "text-to-image": Method(
        "pnp_batch.methods.text_to_image:translate",
        1,
        _no_rows,
        _guided_rows,
        needs="latent",
        settings=("num_inference_steps", "seed"),
    ),
}
