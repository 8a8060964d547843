"""The model hub: what its cache on this machine holds, and what is downloaded into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from pnp_batch.errors import PnpError

_may_download = ContextVar("may_download", default=True)


class NoHubId(PnpError):
    """What is asked for cannot be the name of a repository."""


class NotHere(PnpError):
    """It is not in the cache, and cannot be downloaded, or is not to be."""


@contextmanager
def nothing_downloaded() -> Iterator[None]:
    """Within it (or in a function that it decorates) the cache is all there is: who only looks does not wait for gigabytes."""
    token = _may_download.set(False)
    try:
        yield
    finally:
        _may_download.reset(token)


def snapshot(
    name: str, patterns: Sequence[str], is_whole: Callable[[Path], bool] = Path.is_dir, revision: str | None = None
) -> Path:
    """The folder of a repository in the cache; what is missing of it is downloaded first.

    Args:
        name: `owner/name`.
        patterns: Which of its files are wanted.
        is_whole: Whether a folder holds them all: a download may have been broken off.
        revision: Branch, tag or commit.

    Raises:
        NoHubId: The name is none.
        NotHere: With the reason, in a line.
    """
    from huggingface_hub import snapshot_download  # takes its time, and most runs need no hub
    from huggingface_hub.errors import HFValidationError

    get = partial(snapshot_download, name, revision=revision, allow_patterns=list(patterns))
    try:
        cached = Path(get(local_files_only=True))
        if is_whole(cached):
            return cached
    except HFValidationError as error:
        raise NoHubId(str(error)) from error
    except OSError:
        pass  # not in the cache: the network is asked next, as where a part is missing
    if not _may_download.get():
        raise NotHere("it is not, or not all of it, in the hub's cache, and nothing is downloaded just to look")
    try:
        return Path(get())
    except Exception as error:  # which ones depends on the HTTP library that the hub's client uses underneath
        raise NotHere((str(error) or type(error).__name__).splitlines()[0]) from error
