"""A finished run without a model, for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pnp_batch.media.encode import Look, write_video
from pnp_batch.media.images import encode_png
from pnp_batch.media.video import Timing
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

    def video(self, source: str, prompt: str, **row: Any) -> dict[str, Any]:
        """Publishes a video with what the report plays, and its row."""
        trajectory = self.trajectory(source)
        frame, key = key_of({"frame": source}), key_of({"video": source, "prompt": prompt})
        self.store.publish("translate", frame, {}, {"trajectory": trajectory})
        shown = {name: clip_bytes(f"{source} {name}") for name in ("source", "reconstruction", "result")}
        self.store.publish("assemble", key, {"preview": shown}, {"frames": [frame]})
        values = {
            "file_name": "videos/a.mp4",
            "source": source,
            "prompt": prompt,
            "key": key,
            "model": "builtin:shapes",
        }
        values |= {"frames": 12, "duration": 1.0, "reconstruction_psnr": 29.5, "vae_psnr": 30.0} | row
        self.outputs.write_file(values["file_name"], shown["result"].tobytes())
        self.outputs.add_row(values)
        return values

    def report(
        self,
        failures: Sequence[Mapping[str, Any]] = (),
        name: str = "horses.yaml",
        is_leftover: Callable[[Mapping[str, Any]], bool] = lambda row: False,
    ) -> str:
        """Writes the report and reads it."""
        return write_report(name, self.outputs, self.store, failures, is_leftover).read_text(encoding="utf-8")


def picture(seed: str, size: int) -> Pixels:
    """Noise, different for every seed."""
    generator = np.random.default_rng(list(seed.encode()))
    return generator.integers(0, 256, (size, size, 3), dtype=np.uint8)


def clip_bytes(seed: str, frames: int = 12) -> NDArray[np.uint8]:
    """A small MP4 of a grey that gets lighter, as a video's previews are kept."""
    timing = Timing(tuple(range(frames)), frames, Fraction(1, 12))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        pictures = (picture(seed, 32) // 4 + np.uint8(10 * n) for n in range(frames))
        write_video(path, pictures, Look(timing, Fraction(1)))
        return np.frombuffer(path.read_bytes(), np.uint8)
