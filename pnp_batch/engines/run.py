"""A run: what was asked for, the lock on its output folder, its log, and how it ended."""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from pnp_batch.errors import EnvironmentFailure, disk_errors_named
from pnp_batch.inputs import LOG_FILE
from pnp_batch.monitor import View
from pnp_batch.plan import Plan
from pnp_batch.stages import STAGES

log = logging.getLogger(__name__)

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # how file systems say so


@dataclass(frozen=True)
class Run:
    """What was asked for.

    Attributes:
        plan: The work.
        view: Who shows how it goes.
        stages: Names of the stages to run.
        fail_fast: End at the first failure.
        forgive: Try again what was given up for the workers it took down.
    """

    plan: Plan
    view: View
    stages: Sequence[str] = tuple(STAGES)
    fail_fast: bool = False
    forgive: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether it goes through everything the manifest names, with all stages."""
        return self.plan.limit is None and self.plan.only is None and tuple(self.stages) == tuple(STAGES)


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        translations: Results in the plan.
        done: Results that are there.
        failed: Results that are not, because of an error.
        inverted: Trajectories this run made.
        translated: Results this run computed.
        rows: UNet rows this run computed.
        seconds: Wall time.
        corrupt: Corrupt artifacts met, one sentence each.
        passed: Results that the quality gate let pass.
        saved: Of them those that a retry made pass.
        flagged: Results that missed a threshold in every attempt.
        not_judged: Results of which a figure could not be measured.
    """

    translations: int
    done: int
    failed: int
    inverted: int
    translated: int
    rows: int
    seconds: float
    corrupt: Sequence[str]
    passed: int = 0
    saved: int = 0
    flagged: int = 0
    not_judged: int = 0


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Holds the lock of an output folder: two runs would compute everything twice (though they would corrupt nothing).

    A file system without locks gets a lock file that says who made it; that of a dead process of this machine does not count.

    Raises:
        EnvironmentFailure: Another run holds it, or the disk is full.
    """
    path = output / ".lock"
    with disk_errors_named(str(output)):
        output.mkdir(parents=True, exist_ok=True)
        try:
            lock = _acquired(FileLock(path))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            lock = _acquired(SoftFileLock(path))
    if isinstance(lock, SoftFileLock):
        log.warning("the file system of %s has no locks; %s stands for one", output, path)
    try:
        yield
    finally:
        lock.release()


def _acquired(lock: BaseFileLock) -> BaseFileLock:
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # of filelock itself, which turns into a SoftFileLock where it must
            lock.acquire(timeout=0)
    except Timeout:
        output = Path(lock.lock_file).parent
        message = f"another run is working in {output}; `pnp-batch status` shows how far it is"
        if isinstance(lock, SoftFileLock):
            message += f". If it was killed on another machine, delete {lock.lock_file}"
        raise EnvironmentFailure(message) from None
    return lock


@contextmanager
def logged(output: Path) -> Iterator[None]:
    """Appends the package's log to `run.log` within the block."""
    with disk_errors_named(str(output)):
        handler = logging.FileHandler(output / LOG_FILE, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pnp_batch")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
