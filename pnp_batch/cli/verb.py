"""What every verb is wrapped in, how it speaks, and the only place that turns errors into exit codes."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pnp_batch.errors import EnvironmentFailure, ManifestError, ModelError, PnpError
from pnp_batch.interrupts import interruptible
from pnp_batch.names import counted

OK, SOME_FAILED, WRONG_INPUT, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

ManifestPath = Annotated[Path, typer.Argument(metavar="MANIFEST", help="The YAML manifest.", show_default=False)]


def verb(function: Callable[..., int]) -> Callable[..., None]:
    """Runs a verb and turns what it returns or raises into an exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with interruptible():
                code = function(*args, **kwargs)
        except ManifestError as error:
            say(str(error))
            say(f"{counted(len(error.problems), 'problem')} found; nothing was started")
            code = WRONG_INPUT
        except ModelError as error:
            say(f"model: {error}")
            code = WRONG_INPUT
        except EnvironmentFailure as error:
            say(f"stopped: {error}")
            code = ENVIRONMENT
        except PnpError as error:
            say(f"stopped: {error}")
            code = SOME_FAILED
        except OSError as error:  # nothing that was foreseen, but the machine's doing: a dead mount, a folder in /proc
            place = f"{error.filename}: " if error.filename is not None else ""
            say(f"stopped: {place}{error.strerror or error}. Once that is put right, run the same command again.")
            code = ENVIRONMENT
        except KeyboardInterrupt:
            say("\ninterrupted; everything finished so far is kept. Go on with the same command:\n  " + _command_line())
            code = INTERRUPTED
        raise typer.Exit(code)

    return wrapped


def make_console(stderr: bool = True, width: int | None = None) -> Any:
    """A terminal, or what stands for one in a pipe."""
    from rich.console import Console

    return Console(stderr=stderr, width=width)


def _command_line() -> str:
    return shlex.join(["pnp-batch", *sys.argv[1:]])


def say(message: str) -> None:
    """Says something to the person, beside the output proper."""
    print(message, file=sys.stderr, flush=True)
