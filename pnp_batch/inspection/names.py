"""What sheets, strips and files are called, so that no two of them are called the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pnp_batch.inputs import slug


def distinct(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names, each with the settings in which it differs from others that are called the same."""
    found = []
    for name, own in zip(names, settings, strict=True):
        twins = [other for twin, other in zip(names, settings, strict=True) if twin == name]
        words = [f"{key} {value}" for key, value in own.items() if any(twin.get(key) != value for twin in twins)]
        found.append(f"{name} ({', '.join(words)})" if words else name)
    return found


def file_names(names: Iterable[str]) -> Iterator[str]:
    """Names of files without suffix; where two would be the same, the later ones are numbered."""
    times: Counter[str] = Counter()
    for name in map(slug, names):
        times[name] += 1
        yield name if times[name] == 1 else f"{name}--{times[name]}"
