"""pnp-batch: Plug-and-Play Diffusion Features for folders of images."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnp_batch.api import Translation, translate

__version__ = version("pnp-batch")
__all__ = ["Translation", "__version__", "translate"]


def __getattr__(name: str) -> Any:
    """Loads the Python front door on first use: it imports torch, which the CLI must not."""
    if name in ("Translation", "translate"):
        from pnp_batch import api

        return getattr(api, name)
    raise AttributeError(f"module 'pnp_batch' has no attribute '{name}'")
