"""A finished run without a model, for the tests of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pnp_batch.media.images import encode_png
from pnp_batch.report import write_report
from pnp_batch.stages.outputs import Outputs
from pnp_batch.store import ArtifactStore, key_of

Pixels = NDArray[np.uint8]


class Run:
    """A finished run at tiny size: real artifacts, real pictures, real rows."""

    def __init__(self, root: Path) -> None:
        self.outputs = Outputs(root)
        self.store = ArtifactStore(root / "store")
        self.count = 0

    def trajectory(self, source: str, size: int = 16, **settings: Any) -> str:
        """Publishes an inversion and gives its key."""
        key = key_of({"source": source, **settings})
        pixels = picture(source, size)
        self.store.publish("invert", key, {"preview": {"source": pixels, "reconstruction": pixels[::-1]}}, {})
        return key

    def result(self, source: str, prompt: str, trajectory: str | None, size: int = 16, **row: Any) -> dict[str, Any]:
        """Publishes a result with its picture and its row."""
        self.count += 1
        key = key_of({"source": source, "prompt": prompt, "number": self.count})
        if trajectory is not None:
            self.store.publish("translate", key, {}, {"trajectory": trajectory})
        values = {
            "file_name": f"images/{self.count}.png",
            "source": source,
            "prompt": prompt,
            "method": "pnp",
            "height": size,
            "width": size,
            "num_inference_steps": 50,
            "guidance_scale": 7.5,
            "pnp_f_layers": [4],
            "num_inversion_steps": 999,
            "negative_prompt": "",
            "key": key,
            "model": "builtin:shapes",
            "versions": {"pnp-batch": "0.1.0", "torch": "2.9.0"},
            "reconstruction_psnr": 29.5,
            "vae_psnr": 30.0,
            "seconds": 0.25,
        } | row
        self.outputs.write_file(values["file_name"], encode_png(picture(f"{source} {prompt} {self.count}", size)))
        self.outputs.add_row(values)
        return values

    def report(self, failures: Sequence[Mapping[str, Any]] = (), name: str = "horses.yaml") -> str:
        """Writes the report and reads it."""
        return write_report(name, self.outputs, self.store, failures).read_text(encoding="utf-8")


def picture(seed: str, size: int) -> Pixels:
    """Noise, different for every seed."""
    generator = np.random.default_rng(list(seed.encode()))
    return generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
