"""Where evaluation keeps its numbers in the store, and which of them are still about something."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pnp_batch.store import ArtifactStore

STAGE = "evaluate"


def keys_about(store: ArtifactStore, results: Collection[str]) -> Iterator[str]:
    """Keys of the kept numbers of some results, given by key: freeing space should not cost measuring them again."""
    return store.about(STAGE, "result", results)
