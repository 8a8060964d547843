"""How long `report.html` takes for many large results, the first time and again.

    python benchmarks/report.py --results 2000 --side 512

The pictures are smooth noise with grain, about as hard to compress as photographs; nothing is computed by a model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pnp_batch.media.images import Pixels, encode_png
from pnp_batch.report import write_report
from pnp_batch.stages.outputs import Outputs
from pnp_batch.store import ArtifactStore, key_of

PROMPTS = 4


def picture(seed: int, side: int) -> Pixels:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 215, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    return (smooth + rng.integers(-6, 7, (side, side, 3))).clip(0, 255).astype(np.uint8)


def fill(root: Path, results: int, side: int) -> tuple[Outputs, ArtifactStore]:
    outputs, store = Outputs(root), ArtifactStore(root / "store")
    rng = np.random.default_rng(0)
    metrics = []
    for number in range(results):
        source, key = f"photos/{number // PROMPTS}.jpg", key_of({"result": number})
        trajectory = key_of({"source": source})
        if number % PROMPTS == 0:
            pixels = picture(number, side)
            store.publish("invert", trajectory, {"preview": {"source": pixels, "reconstruction": pixels}}, {})
        store.publish("translate", key, {}, {"trajectory": trajectory})
        name = f"images/{number}.png"
        outputs.write_file(name, encode_png(picture(results + number, side)))
        row = {"file_name": name, "source": source, "key": key, "reconstruction_psnr": 30.0}
        outputs.add_row(row | {"prompt": f"prompt {number % PROMPTS}", "quality": "passed"})
        figures = {"structure_distance": rng.gamma(3, 0.01), "clip_similarity": rng.normal(0.25, 0.03)}
        metrics.append({"key": key, "source": source} | figures)
    outputs.write_file("metrics.jsonl", "".join(json.dumps(each) + "\n" for each in metrics).encode())
    return outputs, store


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outputs, store = fill(Path(folder), arguments.results, arguments.side)
        for when in ("first", "again"):
            begin, cpu = time.monotonic(), time.process_time()
            size = write_report("many.yaml", outputs, store, ()).stat().st_size
            seconds = time.monotonic() - begin
            print(f"{when}: {seconds:.1f} s, {time.process_time() - cpu:.1f} s of CPU, {size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
