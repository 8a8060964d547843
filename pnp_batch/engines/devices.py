"""How many devices a run is to use, and which engine that takes."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.manifest import Manifest
from pnp_batch.runner import NVIDIA_DRIVER

log = logging.getLogger(__name__)


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


def check_gpus(manifest: Manifest) -> int:
    """How many GPUs of this machine are to be used; 0 where there are none.

    Raises:
        EnvironmentFailure: More are asked for than there are.
    """
    run, there = manifest.run, visible_gpus()
    if isinstance(run.devices, tuple):
        missing = [number for number in run.devices if number >= there]
        if missing:
            raise EnvironmentFailure(
                f"there is no GPU {missing[0]}: this machine shows {there} (devices: {list(run.devices)})"
            )
        return len(run.devices)
    wanted = run.devices_wanted
    if there and wanted is not None and wanted > there:
        raise EnvironmentFailure(f"{wanted} devices are asked for, and this machine shows {there} GPUs")
    return there if wanted is None else min(wanted, there)
