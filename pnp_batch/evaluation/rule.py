"""The rule of a manifest's quality gate. Finds the weights that its thresholds need, without loading them (no torch)."""

from __future__ import annotations

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.evaluation.backbones import locate
from pnp_batch.evaluation.columns import BACKBONES, VERSIONS
from pnp_batch.evaluation.values import Unavailable
from pnp_batch.manifest import Manifest
from pnp_batch.stages.quality import Rule
from pnp_batch.store import DigestCache


def rule_of(manifest: Manifest, digests: DigestCache) -> Rule | None:
    """What the manifest's `quality` asks for; None where it asks for nothing.

    Raises:
        EnvironmentFailure: Weights that it needs are not here and cannot be had.
    """
    spec = manifest.quality
    if spec is None:
        return None
    kinds = {BACKBONES[column]: name for name, column in spec.columns.items() if column in BACKBONES}
    identity = {"versions": dict(VERSIONS)} | {
        kind: _fingerprint(manifest, digests, kind, threshold) for kind, threshold in kinds.items()
    }
    return Rule(spec.thresholds, spec.retry, identity)


def _fingerprint(manifest: Manifest, digests: DigestCache, kind: str, threshold: str) -> str:
    try:
        return locate(kind, getattr(manifest.evaluation, kind), manifest.base, digests).fingerprint
    except Unavailable as error:
        raise EnvironmentFailure(f"quality.{threshold} needs the weights of evaluation.{kind}: {error}") from error
