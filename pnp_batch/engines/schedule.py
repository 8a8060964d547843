"""Which package goes to a worker next, and when to stop replacing workers that die. Decisions only: no processes, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.plan import Package

SHARE = 4  # a piece is at most this fraction of what each worker has left to do, so that all end at about the same time


class Schedule:
    """Hands out the packages of a plan, whole at first and cut into parts towards the end.

    Args:
        packages: The packages, in plan order; taken one at a time.
        parts: Cuts a package into its parts.
        rows: UNet rows that the plan counts for a package.
        total: UNet rows of the whole plan.
        workers: How many work.
    """

    def __init__(
        self,
        packages: Iterable[Package],
        parts: Callable[[Package], list[Package]],
        rows: Callable[[Package], int],
        total: int,
        workers: int,
    ) -> None:
        self._packages = iter(packages)
        self._parts, self._rows, self._left, self._workers = parts, rows, total, workers
        self._again: deque[Package] = deque()
        self._open: deque[Package] = deque()
        self._fruitless = 0

    def take(self) -> Package | None:
        """The next piece of work, or None when all of it was handed out."""
        return self._open.popleft() if self.has_more() else None

    def has_more(self) -> bool:
        """Whether something is left to hand out."""
        if not self._open and (package := self._again.popleft() if self._again else next(self._packages, None)):
            self._open.extend(self._pieces(package))
        return bool(self._open)

    def _pieces(self, package: Package) -> Iterator[Package]:
        """A package as it is, or, towards the end of the plan, in runs of parts that get smaller and smaller."""
        rows = self._rows(package)
        if rows * SHARE * self._workers <= self._left:
            self._left -= rows
            yield package
            return
        run: list[Package] = []
        for part in self._parts(package):
            run.append(part)
            if sum(map(self._rows, run)) * SHARE * self._workers >= self._left:
                yield self._joined(run)
                run = []
        if run:
            yield self._joined(run)

    def _joined(self, run: list[Package]) -> Package:
        joined = Package(run[0].index, tuple(job for part in run for job in part.jobs))
        self._left -= self._rows(joined)
        return joined

    def settled(self) -> None:
        """A piece came back: the workers work."""
        self._fruitless = 0

    def died(self, package: Package | None, blamed: bool, cause: str) -> None:
        """A worker died.

        Args:
            package: What it had; it is handed out again, in pieces if the end is near.
            blamed: Whether the ledger holds a strike for it. Such deaths come to an end by themselves.
            cause: What is known about it.

        Raises:
            EnvironmentFailure: Workers die of nothing in particular, one after the other.
        """
        if package is not None:
            self._left += self._rows(package)
            self._again.append(package)
        self._fruitless += not blamed
        if self._fruitless > 2 * self._workers + 2:
            raise EnvironmentFailure(
                f"{self._fruitless} workers died one after the other before they did any work; the last one: {cause}"
            )
