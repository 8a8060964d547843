"""Standard output and error that bear nobody reading them any more."""

from __future__ import annotations

import io
from typing import Any, TextIO


class _Heedless(io.FileIO):
    """A file that takes whatever is written to it, also once nobody reads it: a run is worth more than its words."""

    def write(self, data: Any) -> int:
        """Writes as far as anybody listens."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def heedless(stream: TextIO) -> TextIO:
    """The same stream, but writing to it after `| head` has read enough is no error."""
    raw = io.BufferedWriter(_Heedless(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=bool(stream.line_buffering))
