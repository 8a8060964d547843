"""What files are called, so that no two of them are called the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from pnp_batch.inputs import slug


def file_names(names: Iterable[str]) -> Iterator[str]:
    """Names of files without suffix; where two would be the same, the later ones are numbered."""
    times: Counter[str] = Counter()
    for name in map(slug, names):
        times[name] += 1
        yield name if times[name] == 1 else f"{name}--{times[name]}"
