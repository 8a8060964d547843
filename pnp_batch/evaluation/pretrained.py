"""Loading transformers checkpoints from a folder, and from nowhere else."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging as transformers_logging

from pnp_batch.evaluation.backbones import Backbone
from pnp_batch.evaluation.values import Unavailable


def load(backbone: Backbone, loader: Any, **options: Any) -> Any:
    """Runs a `from_pretrained` of transformers on weights: safetensors only, no network, no remote code.

    Raises:
        Unavailable: transformers cannot read them.
    """
    transformers_logging.disable_progress_bar()
    try:
        return loader.from_pretrained(backbone.path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        raise Unavailable(f"{backbone.name} ({backbone.path}) cannot be loaded: {error}") from error
