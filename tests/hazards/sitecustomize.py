"""Poisons one artifact for every Python process that has this folder on its path: `HAZARD="<how> <pattern of a path>"`.

Just before that artifact is published the process is killed (`kill`), crashes (`segfault`), hangs (`hang`) or waits for a while
(`wait`, `wait5`), so that somebody else can interfere. With `HAZARD_ONCE=<file>` only the first process that gets there is hit.
"""

import ctypes
import os
import re
import signal
import sys
import time

how, _, where = os.environ.get("HAZARD", "").partition(" ")
once = os.environ.get("HAZARD_ONCE")
DEEDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "hang": lambda: time.sleep(1e6),
    "wait": lambda: time.sleep(1),
    "wait5": lambda: time.sleep(5),
}


def hook(event: str, arguments: tuple) -> None:
    if (
        event == "os.rename"
        and re.search(where, os.fsdecode(arguments[1]))
        and ".json" not in os.fsdecode(arguments[1])
    ):
        if once is not None:
            try:
                os.close(os.open(once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        DEEDS[how]()


if where:
    sys.addaudithook(hook)
