"""How steady translated videos are: every frame on its own (`consistency: none`) against keyframes.

    python benchmarks/video.py --clips 6 --frames 24 --json video.json --plot docs/video.png
    python benchmarks/video.py --clips 0 --film wolf.mp4 --film-prompt "a shiny silver robotic wolf"
    python benchmarks/video.py --clips 1 --frames 88                # several windows: what is seen where they overlap
    python benchmarks/video.py --clips 0 --lengths 40 80 160        # cost and memory against the length of the clip
    python benchmarks/video.py --clips 0 --steadying 512            # cost of the last pass at this side in pixels

The rows: frame by frame (`none`), and what the motion-compensated pass of assembly would make of that (`steadied`); keyframes
without that pass (`translated`), and with it, as a user gets them (`keyframes`).

Rendered clips have a known motion, so the next frame can be brought back exactly. Of every pair of neighbouring frames:

- warp error: mean squared difference (levels of 0 to 255) of a frame and the next one brought back along the motion, over all
  pixels that are seen in both; `source` is what the source itself has, from resampling and shading;
- static change: mean absolute difference where nothing moves;
- mask IoU: of the object's exact mask and the pixels that are nearer to the colour inside it than to that outside;
- text error: how far the mean colours of object and background are from the same scene rendered with what the prompt asks for;
- sharpness: mean absolute difference of neighbouring pixels, to the right and below: blurring would lower it, and with it the
  warp error;
- seam: warp error where two windows overlap, over that elsewhere; 1 is no seam.

A film has no known motion; the optical flow of its source stands in for it, where following it forth and back leads home.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation, map_coordinates

from pnp_batch.clips import Window, opened
from pnp_batch.manifest import VideoSpec
from pnp_batch.media.images import Pixels, encode_png
from pnp_batch.media.motion import steadied
from pnp_batch.shapes.clips import clip, clip_scenes
from pnp_batch.shapes.scenes import BACKGROUNDS, MATERIALS, render, stream
from pnp_batch.stages.videos import blended
from pnp_batch.store import ArtifactStore

Array = NDArray[np.float64]
MODES = ("none", "steadied", "translated", "keyframes")
NAMES = {"none": "frame by frame", "steadied": "frame by frame + pass", "translated": "keyframes - pass"}
MEASURES = ("warp_error", "static_change", "mask_iou", "text_error", "sharpness", "seam")


@dataclass(frozen=True)
class Case:
    """A clip with its prompt and everything that is known about it.

    Attributes:
        name: Of its folder.
        frames: The source, (frames, height, width, 3) uint8.
        prompt: The target.
        back: For each pair of frames where each pixel of the first is in the second, (2, height, width) y and x.
        seen: For each pair which pixels are seen in both.
        still: For each pair where nothing moves.
        masks: The object's, or None.
        truth: The target rendered, or None.
    """

    name: str
    frames: NDArray[np.uint8]
    prompt: str
    back: list[Array]
    seen: list[NDArray[np.bool_]]
    still: list[NDArray[np.bool_]]
    masks: NDArray[np.bool_] | None = None
    truth: NDArray[np.uint8] | None = None


def rendered(seed: int, frames: int) -> Case:
    """A scene in motion, and a prompt that asks for another material and background."""
    made = clip(seed, frames)
    scenes = clip_scenes(seed, frames)
    rng = stream(seed, 77)
    material = str(rng.choice([m for m in MATERIALS if m != scenes[0].material]))
    ground = str(rng.choice([b for b in BACKGROUNDS if b != scenes[0].background]))
    truth = [render(replace(scene, material=material, background=ground))[0] for scene in scenes]
    inside = made.masks > 200
    back, seen, still = [], [], []
    for n in range(frames - 1):
        outside = ~binary_dilation((made.masks[n] > 0) | (made.masks[n + 1] > 0), iterations=3)  # its shadow, too
        to = _moved(made.motion[n], made.motion[n + 1], made.masks[n].shape)
        arrives = map_coordinates(inside[n + 1].astype(float), to, order=1) > 0.999
        back.append(np.where(inside[n] & arrives, to, _grid(outside.shape)))
        seen.append((inside[n] & arrives) | outside)
        still.append(outside)
    prompt = f"a {material} {scenes[0].shape} on {ground}"
    return Case(f"scene{seed}", made.frames, prompt, back, seen, still, inside, np.stack(truth))


def _moved(before: Array, after: Array, shape: tuple[int, ...]) -> Array:
    """Where the object's points at each pixel of one frame are in another, from the motions since frame 0."""
    y, x = _grid(shape) + 0.5
    square = [np.vstack([motion, [0, 0, 1]]) for motion in (before, after)]
    step = square[1] @ np.linalg.inv(square[0])
    to_x, to_y, _ = np.einsum("ij,jhw->ihw", step, np.stack([x, y, np.ones_like(x)]))
    return np.stack([to_y, to_x]) - 0.5


def _grid(shape: tuple[int, ...]) -> Array:
    return np.stack(np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")).astype(float)


def filmed(path: Path, prompt: str, frames: int, side: int) -> Case:
    """A film, with the optical flow of its source as the motion."""
    from skimage.registration import optical_flow_tvl1

    pictures = [Image.fromarray(frame) for frame in iio.imiter(path, plugin="pyav")][:frames]
    source = np.stack([np.asarray(p.resize((side, side), Image.Resampling.LANCZOS)) for p in pictures])
    grey = source.mean(3) / 255
    back, seen, still = [], [], []
    grid = _grid(grey.shape[1:])
    for n in range(len(source) - 1):
        forth = optical_flow_tvl1(grey[n], grey[n + 1], attachment=5)
        home = optical_flow_tvl1(grey[n + 1], grey[n], attachment=5)
        there = grid + forth
        astray = np.hypot(*(forth + np.stack([map_coordinates(part, there, order=1, mode="nearest") for part in home])))
        within = np.all((there >= 0) & (there <= side - 1), axis=0)
        back.append(there)
        seen.append((astray < 0.5) & within)
        still.append((np.hypot(*forth) < 0.1) & (np.abs(grey[n] - grey[n + 1]) < 2 / 255))
    return Case(path.stem, source, prompt, back, seen, still)


def measured(case: Case, frames: NDArray[np.uint8], windows: Sequence[Window]) -> dict[str, float]:
    """The measures of a video of a case, which was or might have been made in windows."""
    frames = frames.astype(float)
    warp, change = [], []
    for n, (back, seen, still) in enumerate(zip(case.back, case.seen, case.still, strict=True)):
        returned = np.stack(
            [map_coordinates(frames[n + 1, ..., c], back, order=1, mode="nearest") for c in range(3)], -1
        )
        warp.append(np.mean((returned - frames[n])[seen] ** 2))
        change.append(np.mean(np.abs(frames[n + 1] - frames[n])[still]))
    found = {"warp_error": float(np.mean(warp)), "static_change": float(np.nanmean(change))}
    found["sharpness"] = float(np.mean([np.abs(np.diff(frames, axis=axis)).mean() for axis in (1, 2)]))
    if any(overlaps := _overlaps(windows)):
        found["seam"] = float(np.mean(np.array(warp)[overlaps]) / np.mean(np.array(warp)[~overlaps]))
    if case.masks is not None and case.truth is not None:
        pairs = list(zip(frames, case.masks, strict=True))
        found["mask_iou"] = float(np.mean([_iou(frame, mask) for frame, mask in pairs]))
        truth = case.truth.astype(float)
        found["text_error"] = float(
            np.mean([_colour_gap(frame, other, mask) for (frame, mask), other in zip(pairs, truth, strict=True)])
        )
    return found


def _overlaps(windows: Sequence[Window]) -> NDArray[np.bool_]:
    """For each pair of neighbouring frames whether one of them stands in two windows."""
    held = np.zeros(windows[-1].first + windows[-1].count, int)
    for window in windows:
        held[window.first : window.first + window.count] += 1
    return (held[:-1] > 1) | (held[1:] > 1)


def _iou(frame: Array, mask: NDArray[np.bool_]) -> float:
    inner, outer = frame[mask].mean(0), frame[~mask].mean(0)
    guess = np.linalg.norm(frame - inner, axis=-1) < np.linalg.norm(frame - outer, axis=-1)
    return float((guess & mask).sum() / (guess | mask).sum())


def _colour_gap(frame: Array, truth: Array, mask: NDArray[np.bool_]) -> float:
    return float(np.mean([np.abs(frame[part].mean(0) - truth[part].mean(0)).mean() for part in (mask, ~mask)]))


def translated(
    folder: Path, cases: Sequence[Case], defaults: Mapping[str, Any], model: str
) -> dict[str, dict[str, Any]]:
    """All videos of all cases, made by the program itself; by case and mode the frames."""
    inputs = []
    for case in cases:
        (folder / case.name).mkdir(parents=True, exist_ok=True)
        for n, frame in enumerate(case.frames):
            (folder / case.name / f"{n:05}.png").write_bytes(encode_png(frame))
        prompts = [{"prompt": case.prompt, "consistency": mode} for mode in ("none", "keyframes")]
        inputs.append({"video": case.name, "container": "frames", "prompts": prompts})
    content = {"model": model, "output_dir": "out", "defaults": dict(defaults), "inputs": inputs}
    (folder / "manifest.yaml").write_text(yaml.safe_dump(content))
    subprocess.run([sys.executable, "-m", "pnp_batch.cli", "run", str(folder / "manifest.yaml")], check=True)
    rows = [json.loads(line) for line in (folder / "out/metadata.jsonl").read_text().splitlines()]
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        files = sorted((folder / "out" / row["file_name"]).glob("*.png"))
        found.setdefault(row["source"], {})[row["consistency"]] = np.stack([iio.imread(file) for file in files])
        if row["consistency"] == "none":
            sources = next(case.frames for case in cases if case.name == row["source"])
            found[row["source"]]["steadied"] = np.stack(list(steadied(found[row["source"]]["none"], sources)))
        else:
            store = ArtifactStore(folder / "out/store")
            found[row["source"]]["translated"] = _as_translated(store, row, windows_of(folder, row["source"]))
    return found


def windows_of(folder: Path, name: str) -> list[Window]:
    """The windows in which the frames of a case were translated together."""
    return list(opened(folder / name, VideoSpec(), folder / "out/store").windows(overlapping=True))


def _as_translated(store: ArtifactStore, row: Mapping[str, Any], windows: Sequence[Window]) -> NDArray[np.uint8]:
    """The frames of a video as the store keeps them, windows going over into each other, without what assembly does."""
    keys = iter(store.find("assemble", row["key"]).meta["frames"])
    frames: list[Pixels] = []
    for window in windows:
        for place in range(window.first, window.first + window.count):
            picture = store.find("translate", next(keys)).load("result")["image"]
            if place < len(frames):
                frames[place] = blended(frames[place], picture, window.share_of_later(place))
            else:
                frames.append(picture)
    return np.stack(frames)


def steadying(side: int, frames: int = 16) -> None:
    """CPU seconds a frame of the motion-compensated pass, on one thread."""
    torch.set_num_threads(1)
    made = clip(0, frames, side).frames
    begin = time.process_time()
    for _ in steadied(made, made):
        pass
    print(f"steadying at {side}x{side}: {(time.process_time() - begin) / frames:.2f} CPU s a frame")


def steadiness(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each case and mode, and for its source."""
    cases = [rendered(arguments.first + n, arguments.frames) for n in range(arguments.clips)]
    if arguments.film:
        cases.append(filmed(arguments.film, arguments.film_prompt, arguments.frames, arguments.film_side))
    defaults = {"guidance_scale": arguments.guidance, "num_inference_steps": arguments.steps}
    videos = translated(folder, cases, defaults, arguments.model)
    rows = []
    for case in cases:
        windows = windows_of(folder, case.name)
        source = measured(replace(case, truth=None, masks=None), case.frames, windows)
        rows.append({"clip": case.name, "prompt": case.prompt, "mode": "source", **source})
        for mode in MODES:
            found = measured(case, videos[case.name][mode], windows)
            rows.append({"clip": case.name, "prompt": case.prompt, "mode": mode, **found})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over the rendered clips, then every clip, as Markdown."""
    lines = ["| clip | mode | " + " | ".join(MEASURES) + " |", "|---|---|" + "---|" * len(MEASURES)]
    groups = {"all rendered clips": [row for row in rows if "scene" in row["clip"]]}
    for row in rows:
        groups.setdefault(row["clip"], []).append(row)
    for name, own in groups.items():
        for mode in ("source", *MODES):
            values = {m: [row[m] for row in own if row["mode"] == mode and m in row] for m in MEASURES}
            cells = [f"{np.mean(values[m]):.3f}" if values[m] else "" for m in MEASURES]
            if any(cells):
                lines.append(f"| {name} | {NAMES.get(mode, mode)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """CPU seconds a frame and peak memory of runs over clips of several lengths, each in a process of its own."""
    rows = []
    for length in arguments.lengths:
        place = folder / f"length{length}"
        (place / "clip").mkdir(parents=True, exist_ok=True)
        for n, frame in enumerate(clip(arguments.first, length).frames):
            (place / "clip" / f"{n:05}.png").write_bytes(encode_png(frame))
        content = {
            "model": arguments.model,
            "output_dir": "out",
            "defaults": {"num_inference_steps": 4, "guidance_scale": arguments.guidance, "height": 64, "width": 64},
            "inputs": [{"video": "clip", "prompts": ["a gold star on night"]}],
        }
        (place / "manifest.yaml").write_text(yaml.safe_dump(content))
        code = (
            "import resource, sys; from pnp_batch.cli import app\n"
            "try: app()\n"
            "except SystemExit as end: assert not end.code\n"
            "used = resource.getrusage(resource.RUSAGE_SELF)\n"
            "print('USED', used.ru_maxrss, used.ru_utime + used.ru_stime)"
        )
        command = [sys.executable, "-c", code, "run", str(place / "manifest.yaml")]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak, seconds = (float(word) for word in printed.split("USED")[1].split())
        rows.append({"frames": length, "cpu_seconds_per_frame": seconds / length, "peak_mb": peak / 1024})
        print(f"{length:>6} frames: {seconds / length:6.2f} CPU s a frame, peak {peak / 1024:6.0f} MB", flush=True)
    return rows


TALLEST = 1.5  # bars of the plot end there, and say how far they would go


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Warp errors of every clip as bars, in percent of frame by frame, as PNG."""
    from PIL import ImageDraw

    clips = list(dict.fromkeys(row["clip"] for row in rows))
    errors = {(row["clip"], row["mode"]): row["warp_error"] for row in rows}
    share = {(name, mode): error / errors[name, "none"] for (name, mode), error in errors.items()}
    colours = {
        "source": (150, 150, 150),
        "none": (214, 96, 77),
        "steadied": (244, 165, 130),
        "translated": (146, 197, 222),
        "keyframes": (33, 102, 172),
    }
    width, height, left, bottom = max(124 * len(clips) + 80, 820), 320, 60, 40
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    tallest = min(max(share.values()), TALLEST)
    full = (height - bottom - 60) / tallest
    for line in (0, 0.5, 1):
        y = height - bottom - line * full
        draw.line([(left, y), (width - 20, y)], fill=(120, 120, 120) if line == 0.5 else (220, 220, 220))
        draw.text((left - 36, y - 6), f"{line:.0%}", fill="black")
    for n, name in enumerate(clips):
        for m, (mode, colour) in enumerate(colours.items()):
            x = left + 14 + 124 * n + 22 * m
            y = height - bottom - min(share[name, mode], tallest) * full
            draw.rectangle([x, y, x + 18, height - bottom], fill=colour)
            if share[name, mode] > tallest:
                draw.text((x - 4, y - 13), f"{share[name, mode]:.0%}", fill="black")
        draw.text((left + 14 + 124 * n, height - bottom + 8), name[:12], fill="black")
    for m, (mode, colour) in enumerate(colours.items()):
        begin = left + 50 + 140 * m
        draw.rectangle([begin, 12, begin + 12, 24], fill=colour)
        draw.text((begin + 18, 12), NAMES.get(mode, mode), fill="black")
    draw.text((6, 12), "warp error", fill="black")
    picture.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clips", type=int, default=6, help="rendered clips")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--frames", type=int, default=24, help="of every clip")
    parser.add_argument("--film", type=Path, help="a real clip, too")
    parser.add_argument("--film-prompt", default="a gold star on night")
    parser.add_argument("--film-side", type=int, default=64, help="side in pixels that it is scaled to")
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="measure cost for clips of these lengths")
    parser.add_argument("--steadying", type=int, help="measure the cost of the last pass at this side in pixels")
    parser.add_argument("--model", default="builtin:shapes")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--plot", type=Path, help="write a plot here")
    parser.add_argument("--work", type=Path, help="folder for clips and results, kept; default: a temporary one")
    arguments = parser.parse_args()
    if Path(arguments.model).exists():
        arguments.model = str(Path(arguments.model).absolute())  # manifests lie elsewhere
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.work or Path(temporary)).absolute()
        found: dict[str, Any] = {}
        if arguments.clips or arguments.film:
            found["steadiness"] = steadiness(arguments, folder)
            print(table(found["steadiness"]))
            if arguments.plot:
                plot(found["steadiness"], arguments.plot)
        if arguments.steadying:
            steadying(arguments.steadying)
        if arguments.lengths:
            found["cost"] = cost(arguments, folder)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
