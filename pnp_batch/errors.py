"""Every error a person may meet, each with what happened, where, and what to do next.

Library code raises these; only `cli` turns them into exit codes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class PnpError(Exception):
    """Base of all errors that pnp-batch raises on purpose."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user wrote.

    Attributes:
        file: The manifest (or prompt file) it stands in.
        line: 1-based line, or None where a whole file is meant.
        key: Dotted path of the key, such as `inputs.2.prompts.0.pnp_f_t`.
        message: What is wrong and what would be right.
    """

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


class ManifestError(PnpError):
    """The manifest is wrong; nothing was started. Carries every problem found, not just the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class ModelError(PnpError):
    """The model cannot be used with this method (unknown layout, unsupported pipeline)."""


class EnvironmentFailure(PnpError):
    """The machine failed, not the input: no disk, no device, no weights. Running again may succeed."""


class ItemError(PnpError):
    """One input or one result is bad; the others go on."""


class NonFiniteError(ItemError):
    """A latent or a picture holds NaN or infinity, or came out all black."""


_DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EIO,
    errno.ENAMETOOLONG,
}


@contextmanager
def disk_errors_named(what: str) -> Iterator[None]:
    """Turns a full or read-only disk met in the block into an `EnvironmentFailure` that names `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "Free some space" if full else "Make it writable or choose another place"
            raise EnvironmentFailure(
                f"cannot write {what}: {error.strerror}. {advice} and run the same command again; "
                "everything finished so far is kept."
            ) from error
        raise
