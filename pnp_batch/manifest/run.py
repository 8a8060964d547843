"""`run`: how to compute, on what, and by which engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from pnp_batch.manifest.fields import Integer, Name, Number, Text, Value, empty_for_nothing


def _off_is_a_word(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


def _auto_or_count(value: Any) -> Any:
    if value == "auto":
        return value
    if isinstance(value, bool) or not str(value).isdecimal() or not int(value):
        raise PydanticCustomError("batch_size", "this should be a whole number from 1 on, or auto")
    return int(value)


def _devices(value: Any) -> Any:
    """A word, a count, or the numbers of some GPUs, which the command line writes as `0,1`."""
    numbers = re.fullmatch(r"\[?(\d+(?: *, *\d+)+|(?<=\[)\d+)\]?", value) if isinstance(value, str) else None
    listed = [int(part) for part in numbers[1].split(",")] if numbers else value
    if isinstance(listed, list | tuple):
        if not listed or not all(type(n) is int and n >= 0 for n in listed) or len(set(listed)) < len(listed):
            raise PydanticCustomError(
                "devices", "the numbers of GPUs should be whole, at least one, and each named once"
            )
        return tuple(listed)
    if isinstance(value, bool) or not re.fullmatch(r"auto|all|cpu|cuda(:\d+)?|mps|0*[1-9]\d*", str(value)):
        raise PydanticCustomError(
            "devices", "this should be auto, all, cpu, cuda, cuda:1, how many devices, or their numbers ([0, 1])"
        )
    return int(value) if str(value).isdecimal() else value


def _as_pairs(value: Any) -> Any:
    """A mapping as a value that can be hashed."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


class RaySpec(Value):
    """Engine `ray`: which cluster, and what each worker takes of it.

    `num_gpus` is 1 where the cluster has GPUs if left out; a fraction puts several workers on one.
    """

    address: Name | None = None
    num_cpus: Annotated[Integer, Field(ge=1)] = 1
    num_gpus: Annotated[Number, Field(ge=0)] | None = None
    resources: Annotated[tuple[tuple[Name, Annotated[Number, Field(gt=0)]], ...], BeforeValidator(_as_pairs)] = ()


def _one_line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise PydanticCustomError("lines", "this goes into one line of a script and cannot hold a line break")
    return text


Word = Annotated[Name, AfterValidator(_one_line)]


class SlurmSpec(Value):
    """Engine `slurm`: a job array. Everything but the first three goes into the sbatch script as it is.

    `tasks` is the size of the array, `parallel` how many of it run at once, `logs` the folder of scripts and logs.
    """

    tasks: Annotated[Integer, Field(ge=1, le=100_000)] = 8
    parallel: Annotated[Integer, Field(ge=1)] | None = None
    logs: Word | None = None
    partition: Word | None = None
    time: Annotated[Integer, Field(ge=1)] = 60
    gres: Word | None = None
    gpus_per_node: Annotated[Integer, Field(ge=1)] | None = None
    cpus_per_task: Annotated[Integer, Field(ge=1)] = 1
    mem: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    nodelist: Word | None = None
    setup: tuple[Text, ...] = ()
    python: Word | None = None

    @property
    def wants_gpus(self) -> bool:
        """Whether its jobs get a GPU."""
        return self.gpus_per_node is not None or "gpu" in (self.gres or "")


class RunSpec(Value):
    """How to run, never what: nothing here changes a result (but `dtype` and `bank_compression`, which are in its key)."""

    engine: Literal["local", "ray", "slurm"] = "local"
    devices: Annotated[str | int | tuple[int, ...], PlainValidator(_devices)] = "auto"
    ray: Annotated[RaySpec, BeforeValidator(empty_for_nothing)] = RaySpec()
    slurm: Annotated[SlurmSpec, BeforeValidator(empty_for_nothing)] = SlurmSpec()
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_auto_or_count)] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    bank: Annotated[Literal["auto", "memory", "disk", "off"], BeforeValidator(_off_is_a_word)] = "auto"
    bank_compression: Literal["none", "int8", "fp8"] = "none"
    bank_budget: ByteSize | None = None
    reconstruction: Literal["measured", "skipped"] = "measured"
    store: Name | None = None
    checkpoint_seconds: Annotated[Number, Field(ge=0)] = 30.0
    max_attempts: Annotated[Integer, Field(ge=2, le=1000)] = 3
    unit_timeout: Annotated[Number, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _something_to_compress(self) -> RunSpec:
        if self.bank == "off" and self.bank_compression != "none":
            raise PydanticCustomError(
                "bank_compression", "bank_compression needs a bank; write bank: auto, memory or disk"
            )
        return self

    @property
    def devices_wanted(self) -> int | None:
        """How many devices are asked for; None for as many as there are."""
        if isinstance(self.devices, tuple):
            return len(self.devices)
        return self.devices if isinstance(self.devices, int) else None if self.devices in ("auto", "all") else 1

    @property
    def device_elsewhere(self) -> str | None:
        """`cpu` or `cuda` where the manifest says what a cluster's workers have, whatever this machine has; else None."""
        gpus = self.slurm.wants_gpus if self.engine == "slurm" else self.ray.num_gpus if self.engine == "ray" else None
        return None if gpus is None else "cuda" if gpus else "cpu"

    @property
    def device(self) -> str:
        """The one device of a worker in this process, as torch calls it, or `auto`."""
        if isinstance(self.devices, tuple):
            return f"cuda:{self.devices[0]}"
        return "auto" if isinstance(self.devices, int) or self.devices == "all" else self.devices

    def dtype_on(self, device: str) -> str:
        """The dtype on a device type: as written, else half precision on a GPU and float32 on a CPU, where halves are slower."""
        return self.dtype if self.dtype != "auto" else "float32" if device == "cpu" else "float16"
