"""Who runs workers where. An engine takes a plan and gives a summary; correctness never depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pnp_batch.engines.devices import engine_for
from pnp_batch.engines.run import Run, Summary
from pnp_batch.errors import EnvironmentFailure
from pnp_batch.plan import Plan


@dataclass(frozen=True)
class Engine:
    """An engine, imported when it is used: Ray and submitit may not be installed, and take long to import.

    Attributes:
        module: Where it is.
        function: Its name there.
        library: What it cannot do without, or empty.
    """

    module: str
    function: str
    library: str = ""

    def __call__(self, run: Run) -> Summary:
        """Makes everything a plan names that is not there yet.

        Raises:
            EnvironmentFailure: The machine failed, another run works in the folder, or the engine is not installed.
        """
        summary: Summary = self._load(self.function)(run)
        return summary

    def preview(self, plan: Plan) -> None:
        """Prints what the engine would submit, where it submits anything."""
        if self.function == "run_slurm":
            self._load("preview")(plan)

    def _load(self, name: str) -> Any:
        try:
            return getattr(import_module(self.module), name)
        except ModuleNotFoundError as error:
            if not self.library or (error.name or "").partition(".")[0] != self.library:
                raise
            extra = self.module.rpartition("_")[2]
            raise EnvironmentFailure(
                f"engine {extra} needs {self.library}, which is not installed: pip install 'pnp-batch[{extra}]'"
            ) from None


ENGINES = {
    "local": Engine("pnp_batch.engines.local", "run_local"),
    "ray": Engine("pnp_batch.engines.on_ray", "run_ray", "ray"),
    "slurm": Engine("pnp_batch.engines.on_slurm", "run_slurm", "submitit"),
}

__all__ = ["ENGINES", "Engine", "Run", "Summary", "engine_for"]
