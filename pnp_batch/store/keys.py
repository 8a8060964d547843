"""Content keys: the sha256 of the canonical JSON of everything that decides a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinity are refused, since they have no JSON form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def key_of(value: Mapping[str, Any]) -> str:
    """The full sha256 (64 hex digits) of a mapping; never truncated, so that no two results share a key."""
    return sha256(canonical_json(value).encode())


def sha256(data: bytes | memoryview) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()
