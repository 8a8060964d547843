"""How large `report.html` is for many large results, how long it takes to write, and how long until a browser shows it.

    python benchmarks/report.py --results 2000 --side 512 --keep report-bench

The pictures are smooth noise with grain, about as hard to compress as photographs; nothing is computed by a model. With `--keep`
the folder stays, with a screenshot of each look, and is measured again without being filled again. Chromium is used if installed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from pnp_batch.media.images import Pixels, encode_png
from pnp_batch.report import write_report
from pnp_batch.stages.outputs import Outputs
from pnp_batch.store import ArtifactStore, key_of

PROMPTS = (
    "a photo of a bronze horse in a museum",
    "a robot horse in the snow, studio light",
    "a horse made of lego bricks",
    "a watercolour painting of a zebra on a beach at sunset",
)
LOOKS = {
    "wide": ("--window-size=1500,1000",),
    "narrow": ("--window-size=500,1000",),
    "dark": ("--window-size=1200,900", "--blink-settings=preferredColorScheme=0"),
}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Said by the page itself once its script has run and the first picture was painted.
PAINTED = """<script>requestAnimationFrame(() => setTimeout(() => {
  const shown = performance.getEntriesByType("paint").find((entry) => entry.name === "first-contentful-paint");
  const begin = performance.now();
  document.querySelector("#sort").value = "metric-worst";
  document.querySelector("#sort").dispatchEvent(new Event("change", { bubbles: true }));
  document.body.getBoundingClientRect();
  const sorted = performance.now() - begin;
  document.documentElement.replaceChildren(`first paint ${shown?.startTime} all ${begin} sorted ${sorted}`);
}));</script>"""


def picture(seed: int, side: int) -> Pixels:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 215, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    return (smooth + rng.integers(-6, 7, (side, side, 3))).clip(0, 255).astype(np.uint8)


def fill(outputs: Outputs, store: ArtifactStore, results: int, side: int) -> None:
    rng = np.random.default_rng(0)
    metrics = []
    for number in range(results):
        source, key = f"photos/{number // len(PROMPTS):04}.jpg", key_of({"result": number})
        trajectory = key_of({"source": source})
        if number % len(PROMPTS) == 0:
            pixels = picture(number, side)
            store.publish("invert", trajectory, {"preview": {"source": pixels, "reconstruction": pixels}}, {})
        store.publish("translate", key, {}, {"trajectory": trajectory})
        name = f"images/{number}.png"
        outputs.write_file(name, encode_png(picture(results + number, side)))
        outputs.add_row(
            row(number, rng) | {"file_name": name, "source": source, "key": key, "width": side, "height": side}
        )
        figures = {
            "psnr": rng.normal(17, 2),
            "ssim": rng.beta(12, 8),
            "structure_distance": rng.gamma(3, 0.01),
            "clip_similarity": rng.normal(0.25, 0.03),
            "text_gain": rng.normal(0.05, 0.02),
        }
        metrics.append({"key": key, "source": source} | figures)
    outputs.write_file("metrics.jsonl", "".join(json.dumps(each) + "\n" for each in metrics).encode())


def row(number: int, rng: np.random.Generator) -> dict[str, object]:
    """What a run notes of a result."""
    flagged = number % 9 == 0
    quality = {"quality": "flagged" if flagged else "passed", "quality_attempt": number % 9 if number % 9 < 3 else 0}
    return quality | {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "quality_reason": "clip_similarity 0.19 is below 0.2" if flagged else "",
        "method": "pnp",
        **{"num_inference_steps": 50, "guidance_scale": 7.5, "pnp_f_t": 0.8, "pnp_attn_t": 0.5, "seed": 0},
        **{"pnp_f_layers": [4], "pnp_attn_layers": [4, 5, 6, 7, 8, 9, 10, 11]},
        **{"inversion_method": "fixed-point", "inversion_prompt": "", "negative_prompt": "ugly, blurry, low quality"},
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "reconstruction_psnr": round(float(rng.normal(26, 1.5)), 2),
        "vae_psnr": 27.5,
        "seconds": 3.2,
    }


def looked_at(page: Path, folder: Path) -> None:
    """Says when Chromium shows the page, by the page's own clock, and takes a screenshot of each look."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no chromium: nobody looked at the page")
        return
    timed = folder / "timed.html"
    text = page.read_text(encoding="utf-8")
    timed.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text, count=1).replace("</body>", f"{PAINTED}</body>"))
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    dom = subprocess.run([*command, "--dump-dom", timed.as_uri()], capture_output=True, text=True, check=True).stdout
    first, ready, sort = (float(figure) / 1000 for figure in re.findall(r"[\d.]+", re.sub("<[^>]*>", "", dom)))
    print(f"chromium: first paint after {first:.1f} s, usable after {ready:.1f} s; sorted by a metric in {sort:.1f} s")
    for look, flags in LOOKS.items():
        begin = time.monotonic()
        shot = [*command, *flags, f"--screenshot={folder / f'{look}.png'}", page.as_uri()]
        subprocess.run(shot, capture_output=True, check=True)
        print(f"{look}: started, loaded and painted in {time.monotonic() - begin:.1f} s", flush=True)


@contextmanager
def folder_of(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="a folder for all of it")
    arguments = parser.parse_args()
    with folder_of(arguments.keep) as folder:
        outputs, store = Outputs(folder), ArtifactStore(folder / "store")
        if not outputs.has("metrics.jsonl"):
            fill(outputs, store, arguments.results, arguments.side)
        shutil.rmtree(folder / "store/thumbnails", ignore_errors=True)
        for when in ("first", "again"):
            begin, cpu = time.monotonic(), time.process_time()
            page = write_report("many.yaml", outputs, store, ())
            seconds, size = time.monotonic() - begin, page.stat().st_size / 1e6
            print(f"{when}: {seconds:.1f} s, {time.process_time() - cpu:.1f} s of CPU, {size:.0f} MB", flush=True)
        looked_at(page.absolute(), folder.absolute())


if __name__ == "__main__":
    main()
