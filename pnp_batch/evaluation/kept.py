"""Where evaluation keeps its numbers in the store, and which of them are still about something."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator

from pnp_batch.store import ArtifactStore
from pnp_batch.store.artifacts import META

STAGE = "evaluate"


def keys_about(store: ArtifactStore, results: Collection[str]) -> Iterator[str]:
    """Keys of the kept numbers of some results, given by key: freeing space should not cost measuring them again."""
    for stage, path in store.all():
        if stage == STAGE:
            try:
                about = json.loads((path / META).read_bytes())["content"]["meta"]["result"]
            except (OSError, ValueError, KeyError):
                continue  # corrupt: nobody misses it
            if about in results:
                yield path.name
