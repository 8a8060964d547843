"""What a worker remembers from one package to the next: banks, what they cost, and what is there of videos."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pnp_batch.store.disk import Bandwidth

if TYPE_CHECKING:
    from pnp_batch.diffusion.banks import MemoryBank

Place = Literal["off", "memory", "disk"]


@dataclass(frozen=True)
class Costs:
    """What the source features of one guidance image cost.

    Attributes:
        seconds: Of its source pass at all steps, in the batch it shares.
        size: Of its bank, in bytes.
        disk: Of the store.
    """

    seconds: float
    size: int
    disk: Bandwidth

    @property
    def read_seconds(self) -> float:
        """Of reading its bank."""
        return self.size / self.disk.read

    @property
    def write_seconds(self) -> float:
        """Of writing its bank."""
        return self.size / self.disk.write

    @property
    def choice(self) -> Place:
        """Where to take features from that lie on the disk already."""
        return "disk" if self.read_seconds < self.seconds else "off"


@dataclass(frozen=True)
class Banks:
    """Where a worker takes source features from (`stages/bank.py`).

    Attributes:
        mode: `auto`, `memory`, `disk` or `off`.
        compression: How features are packed: `none`, `int8` or `fp8`.
        budget: Bytes that all banks on disk may take; None for no limit.
        remembered: The banks in memory, least recently used first.
        costs: What was measured.
    """

    mode: str = "auto"
    compression: str = "none"
    budget: int | None = None
    remembered: dict[str, MemoryBank] = field(default_factory=dict)
    costs: dict[Any, Costs] = field(default_factory=dict)


@dataclass
class Reel:
    """What a worker knows of one video for one prompt, so that it looks at every window once.

    Attributes:
        windows: Of windows all of whose frames are there their results' keys, by the place of the first frame; empty again
            once the video is named or written, since the keys of long clips would fill memory.
        name: Of the video in the output folder, once all frames are known to be there.
        is_written: Whether the video itself is there.
    """

    windows: dict[int, tuple[str, ...]] = field(default_factory=dict)
    name: str | None = None
    is_written: bool = False
