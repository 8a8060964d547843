"""Names and numbers for people: what tells two of the same name apart, and which one is meant by a part of a path."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from pnp_batch.errors import ManifestError, Problem

MAX_LISTED = 5


def counted(count: int, one: str, many: str = "") -> str:
    """`1 result`, `2 results`; `many` where an s is not all, as in `results are`."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def differences(names: Sequence[Hashable], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each name the settings in which it differs from others that are called the same; empty where none is.

    A setting counts among those that have it: what means something to one method only says nothing about the others. An
    empty one is not said, since the others say theirs.
    """
    values: dict[Hashable, dict[str, list[Any]]] = {}
    for name, own in zip(names, settings, strict=True):
        known = values.setdefault(name, {})
        for key, value in own.items():
            seen = known.setdefault(key, [])
            if value not in seen:
                seen.append(value)
    return [
        ", ".join(
            f"{key} {value}" for key, value in own.items() if len(values[name][key]) > 1 and value not in (None, "")
        )
        for name, own in zip(names, settings, strict=True)
    ]


def distinct(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names, each with the settings in which it differs from others that are called the same."""
    words = differences(names, settings)
    return [f"{name} ({own})" if own else name for name, own in zip(names, words, strict=True)]


def meant(written: str, names: Collection[str], option: str) -> str | None:
    """The name that is meant: that very one, else the only one whose path ends so; None where none does.

    Args:
        written: What stands on the command line.
        names: Those there are.
        option: Where it stands.

    Raises:
        ManifestError: The paths of several end so.
    """
    if written in names:
        return written
    found = sorted(set(_ending(PurePosixPath(written).parts, names)))
    if len(found) > 1:
        what = f"'{written}' may be any of {listed(found)}; write more of the path"
        raise ManifestError([Problem("command line", None, option, what)])
    return found[0] if found else None


def _ending(parts: tuple[str, ...], names: Iterable[str]) -> Iterable[str]:
    """Names whose last parts are these: whole ones, so that `horse.jpg` is no end of `seahorse.jpg`."""
    if not parts:
        return ()
    return (name for name in names if name.endswith(parts[-1]) and PurePosixPath(name).parts[-len(parts) :] == parts)
