"""Ends what a process started when that process is killed; run as a program this file is the one that waits for it.

Ray's servers and workers die with their driver. Two of its helpers stay for a minute, in which they try to report that to a
server that is dead as well.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import psutil


def descendants() -> set[psutil.Process]:
    """Every process that this one started, and those that they started."""
    return set(psutil.Process().children(recursive=True))


@contextmanager
def no_orphans(processes: Collection[psutil.Process]) -> Iterator[None]:
    """Ends some processes when this one leaves the block or is gone, be it by `kill -9`."""
    command = [sys.executable, "-P", __file__, *(str(process.pid) for process in processes)]
    # In a session of its own: a Ctrl-C on the terminal is not meant for it.
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield


def main() -> None:
    """Waits until nobody holds the other end of standard input, then ends the processes that the command line names."""
    found = []
    for number in sys.argv[1:]:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(number)))  # it remembers when the process began: numbers are used again
    sys.stdin.read()
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
