"""Content-keyed artifacts on disk: keys, safetensors shards, atomic publish, verification."""

from pnp_batch.store.artifacts import Artifact, ArtifactStore
from pnp_batch.store.digests import DigestCache
from pnp_batch.store.keys import canonical_json, key_of

__all__ = ["Artifact", "ArtifactStore", "DigestCache", "canonical_json", "key_of"]
