"""Notes every artifact that a process on this path publishes, first or again, in `published` beside the output folder.

Poisons come first (see hazards/sitecustomize.py): what a process dies of it does not publish.
"""

import os
import runpy
import sys
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[2] / "hazards/sitecustomize.py"))


def hook(event: str, arguments: tuple) -> None:
    if event != "os.rename":
        return
    final = Path(os.fsdecode(arguments[1]))
    stage = final.parents[1].name
    if stage in ("invert", "translate") and Path(os.fsdecode(arguments[0])).is_dir():
        with (final.parents[4] / "published").open("a") as file:
            file.write(f"{stage}-{final.name}\n")


sys.addaudithook(hook)
