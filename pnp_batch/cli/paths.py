"""Files and folders named on the command line, looked at before all the work."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from pnp_batch.errors import EnvironmentFailure


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))  # noqa: PTH110 - a name may be too long


def check_folder(folder: Path, hint: str = "OUTPUT", *, begun: bool) -> None:
    """Nothing is written over what is there, unless this very command has begun it."""
    if not (found := existing_parent(folder)).is_dir():
        raise typer.BadParameter(f"{folder} cannot be a folder: {found} is a file", param_hint=hint)
    if not begun and folder.exists() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is there and not empty; name another folder", param_hint=hint)


def check_file(path: Path, hint: str) -> None:
    """Says before all the work, not after it, that a file cannot be written there."""
    folder = existing_parent(path.absolute().parent)
    if os.path.isdir(path) or not folder.is_dir():  # noqa: PTH112 - as in existing_parent
        raise typer.BadParameter(f"{path} cannot be a file: name one in a folder", param_hint=hint)
    if not os.access(folder, os.W_OK):
        raise EnvironmentFailure(f"{path} cannot be written: there is no permission to write to {folder}")
