"""What the quality gate decided: verdicts in the store, found by result and rule. Judging is `evaluation.gate`'s part.

A verdict is an artifact like any other, so a run that goes on knows at once which results are settled, loads no backbone for
them and makes no rejected attempt again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pnp_batch.manifest import Settings
from pnp_batch.store import Artifact, ArtifactStore, key_of

STAGE = "judge"
VERSION = 1

PASSED, FLAGGED, NOT_JUDGED = "passed", "flagged", "not judged"


@dataclass(frozen=True)
class Rule:
    """What the gate of a manifest asks for.

    Attributes:
        thresholds: By name, such as `min_psnr`.
        retries: Settings to try in place of a result's own, in this order.
        identity: What else decides the figures: the backbones' bytes and the metrics' versions.
    """

    thresholds: Mapping[str, float]
    retries: Sequence[Settings]
    identity: Mapping[str, Any]

    def key(self, first: Artifact) -> str:
        """Where the verdict on a result is kept.

        Args:
            first: The result at its own settings.
        """
        content = {"stage": STAGE, "version": VERSION, "result": first.key, "thresholds": dict(self.thresholds)}
        return key_of(content | {"retry": [each.given() for each in self.retries], "identity": dict(self.identity)})

    def find(self, store: ArtifactStore, first: Artifact) -> Verdict | None:
        """The verdict on a result, if there is one."""
        artifact = store.find(STAGE, self.key(first))
        return Verdict.of(artifact) if artifact else None


@dataclass(frozen=True)
class Verdict:
    """How a result was judged.

    Attributes:
        word: `passed`, `flagged` (nothing that was tried reaches every threshold), or `not judged` (no threshold is missed, but
            one could not be measured).
        chosen: Key of the result that stands.
        attempt: 0 for the result's own settings, else the number of the retry.
        reason: Which thresholds the chosen result misses, or why one could not be measured; else empty.
        figures: Of the chosen result by column; None where there is none.
        tried: Keys of all results that were made for it, the chosen one among them.
    """

    word: str
    chosen: str
    attempt: int
    reason: str
    figures: Mapping[str, float | None]
    tried: Sequence[str]

    @staticmethod
    def of(artifact: Artifact) -> Verdict:
        """The verdict that an artifact of stage `judge` holds."""
        names = ("word", "chosen", "attempt", "reason", "figures", "tried")
        return Verdict(**{name: artifact.meta[name] for name in names})

    def row(self) -> dict[str, Any]:
        """For `metadata.jsonl`."""
        return {
            "quality": self.word,
            "quality_attempt": self.attempt,
            "quality_reason": self.reason,
            "quality_figures": dict(self.figures),
        }
