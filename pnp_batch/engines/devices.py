"""How many devices a run is to use, and which engine that takes."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib.util import find_spec

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.manifest import Manifest, RunSpec
from pnp_batch.runner import NVIDIA_DRIVER

log = logging.getLogger(__name__)

ROUNDING = 1e-9  # 1 / 0.1 and the like may come out a little below the whole number


def visible_gpus() -> int:
    """How many GPUs this process may use; torch is asked only where there could be one, since importing it takes seconds."""
    if not NVIDIA_DRIVER.exists():
        return 0
    import torch

    return torch.cuda.device_count()


def engine_for(manifest: Manifest) -> str:
    """The engine of a run: as written, else what its devices need (one: in this process; several: Ray).

    Raises:
        EnvironmentFailure: Several devices are asked for, and Ray is not installed.
    """
    run = manifest.run
    if "engine" in run.model_fields_set:
        if run.engine == "local" and (run.devices_wanted or 1) > 1:
            raise EnvironmentFailure(
                f"engine local uses one device, {run.devices_wanted} are asked for; write `engine: ray`"
            )
        return run.engine
    wanted = run.devices_wanted
    count = visible_gpus() if wanted is None else wanted
    if count <= 1:
        return "local"
    if not has_ray() and run.devices == "auto":
        log.warning("%d GPUs are there and one is used; for all of them: pip install 'pnp-batch[ray]'", count)
        return "local"
    if not has_ray():
        raise EnvironmentFailure(
            f"{count} devices need engine ray: pip install 'pnp-batch[ray]'; for a single one write `devices: 1`"
        )
    return "ray"


def has_ray() -> bool:
    """Whether Ray is installed."""
    return find_spec("ray") is not None


def gpus_needed(run: RunSpec, there: int) -> int:
    """How many GPUs of this machine a Ray of this run alone is to have; 0 where there are none.

    Args:
        run: What is asked for; a worker may take a part of a GPU.
        there: How many GPUs this process may use.

    Raises:
        EnvironmentFailure: More are asked for than there are.
    """
    each = 1.0 if run.ray.num_gpus is None else run.ray.num_gpus
    if not each:
        return 0
    if isinstance(run.devices, tuple):
        if each < 1:
            raise EnvironmentFailure(
                f"a list of GPUs means one worker on each, and `num_gpus: {each:g}` would put several on one; "
                "leave one of the two out, or write how many workers: `devices: N`"
            )
        missing = [number for number in run.devices if number >= there]
        if missing:
            raise EnvironmentFailure(
                f"there is no GPU {missing[0]}: this machine shows {there} (devices: {list(run.devices)})"
            )
        return len(run.devices)
    if not there or run.devices_wanted is None:
        return there
    needed = math.ceil(run.devices_wanted / workers_on(1, each) if each < 1 else run.devices_wanted * each)
    if needed > there:
        raise EnvironmentFailure(
            f"{run.devices_wanted} devices of {each:g} GPU are asked for, and this machine shows {there} GPUs"
        )
    return needed


def workers_on(gpus: float, each: float) -> int:
    """How many workers some GPUs hold: Ray gives a worker that takes less than a GPU a part of one, never parts of two.

    Args:
        gpus: How many GPUs.
        each: GPUs of each worker.
    """
    return int(gpus) * int(1 / each + ROUNDING) if each < 1 else int(gpus / each)


def visible_as(numbers: Sequence[int], visible: str | None) -> str:
    """`CUDA_VISIBLE_DEVICES` for some of the GPUs that this process may use.

    Args:
        numbers: As this process counts them.
        visible: What the variable says now: numbers or names that a batch system gave out, or None for all.
    """
    return ",".join(str(number) if visible is None else visible.split(",")[number].strip() for number in numbers)
