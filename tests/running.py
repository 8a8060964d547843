"""Running the program in tests: real manifests, the real CLI, in this process or in a forked one that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from pnp_batch.cli import app

TINY_SD = Path(__file__).parent / "conformance/tiny-sd"
FEW_STEPS = {"num_inference_steps": 5, "num_inversion_steps": 10, "guidance_scale": 5.0, "height": 64, "width": 64}


@dataclass(frozen=True)
class Project:
    """A manifest in a folder of its own."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def store(self) -> Path:
        return self.output / "store"

    def write(
        self, inputs: Sequence[Mapping[str, Any]], *, defaults: Mapping[str, Any] | None = None, **top: Any
    ) -> Project:
        """Writes the manifest; `run`, `model` and other keys by keyword."""
        content = {
            "model": str(TINY_SD),
            "output_dir": "out",
            "defaults": FEW_STEPS | dict(defaults or {}),
            "inputs": list(inputs),
        }
        self.manifest.write_text(yaml.safe_dump(content | top))
        return self

    def picture(self, name: str, seed: int = 0, size: tuple[int, int] = (64, 64)) -> str:
        """Writes a smooth random picture and gives its name."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
        return name

    def pnp(self, *arguments: str, code: int | None = 0) -> str:
        """`pnp-batch <verb> manifest ...`; checks the exit code and gives what was printed."""
        verb, *rest = arguments
        outcome = CliRunner().invoke(app, [*verb.split(), str(self.manifest), *rest])
        if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
            raise outcome.exception
        assert code is None or outcome.exit_code == code, outcome.output
        return outcome.output

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metadata.jsonl."""
        return [json.loads(line) for line in (self.output / "metadata.jsonl").read_text().splitlines()]

    def failures(self) -> list[dict[str, Any]]:
        """The rows of failures.jsonl."""
        path = self.output / "failures.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def pictures(self) -> dict[str, bytes]:
        """Every picture in the output folder by name."""
        return {
            str(p.relative_to(self.output)): p.read_bytes() for p in sorted((self.output / "images").rglob("*.png"))
        }

    def tensors(self) -> dict[str, bytes]:
        """Every shard in the store by stage, key and name."""
        return {str(p.relative_to(self.store)): p.read_bytes() for p in sorted(self.store.rglob("*.safetensors"))}

    def progress(self) -> dict[str, Any]:
        """What the last run wrote about itself."""
        return json.loads((self.output / "progress.json").read_text())


def run_with_hazard(
    project: Project, hazard: str, *options: str, once: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """`pnp-batch run` where one artifact is poisoned; see hazards/sitecustomize.py."""
    return subprocess.run(
        program("run", str(project.manifest), *options), env=hazardous(hazard, once), capture_output=True, text=True
    )


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A real file system of its own, `size` as mount takes it: `200k`, `2m`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"NO TMPFS HERE, A FULL DISK IS NOT TESTED: {mounted.stderr}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def program(*arguments: str) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "pnp_batch.cli", *arguments]


def hazardous(hazard: str, once: Path | None = None) -> dict[str, str]:
    """An environment in which an artifact is poisoned."""
    path = os.pathsep.join([str(Path(__file__).parent / "hazards"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HAZARD": hazard} | ({"HAZARD_ONCE": str(once)} if once else {})


_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["pnp_batch.api", "pnp_batch.engines", "pnp_batch.report.html"])


def start(project: Project) -> ForkServerProcess:
    """`pnp-batch run` in a process of its own that can be killed; it is forked from one that has imported torch."""
    process = _FORKSERVER.Process(target=_run, args=(str(project.manifest),))
    process.start()
    return process


def _run(manifest: str) -> None:
    """What the child does; it exits with the program's own exit code."""
    app(["run", manifest])


def footprint(project: Project) -> set[str]:
    """Everything below the output folder: it changes with every checkpoint, artifact and picture."""
    return {
        f"{p}{p.stat().st_mtime_ns}"
        for p in project.output.rglob("*")
        if p.is_file() and p.name != "progress.json" and "ledger" not in p.parts
    }


def wait_for_changes(project: Project, process: ForkServerProcess, count: int) -> bool:
    """Waits until so many files changed; False if the process ended before."""
    before = footprint(project)
    while process.is_alive():
        try:
            if len(footprint(project) - before) >= count:
                return True
        except FileNotFoundError:
            continue  # it was renamed between the listing and the look
    return False
