"""Weights out of the hub's cache and from the hub itself, which here is a server on this machine; and `prefetch`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from running import Project, program
from tiny_backbones import save_dino, save_lpips

NAME, COMMIT = "owner/dino", "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download takes: what a model's files are, and each of them."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        file = self.folder / Path(self.path).name
        if "/tree/" in self.path:
            entries = [(path.name, path.stat().st_size) for path in self.folder.iterdir()]
            files = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in entries]
            self.answer(json.dumps(files).encode())
        elif self.path.startswith("/api/"):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": files}).encode())
        elif file.is_file():
            self.answer(file.read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{Path(self.path).name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serves a model's folder; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A manifest that evaluates with a model of the hub."""
    project = Project(tmp_path)
    project.picture("a.png")
    save_dino(tmp_path / "published")
    return project.write(
        [{"image": "a.png", "prompts": ["x"]}], evaluation={"dino": NAME, "metrics": ["structure_distance"]}
    )


def prefetched(project: Project, **environment: str) -> subprocess.CompletedProcess[str]:
    """`prefetch` in a process of its own: where the hub's cache is, is read when its library is imported."""
    own = {"HF_HUB_CACHE": str(project.folder / "cache"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    command = program("prefetch", str(project.manifest))
    return subprocess.run(command, env={**os.environ, **own, **environment}, capture_output=True, text=True)


def test_prefetch_fetches_what_the_evaluation_measures_with_and_completes_what_was_broken_off(project: Project) -> None:
    folder = project.folder / f"cache/models--owner--dino/snapshots/{COMMIT}"
    with hub(project.folder / "published") as address:
        first = prefetched(project, HF_ENDPOINT=address)
        assert (first.returncode, f"{NAME} is here: {folder}" in first.stdout) == (0, True), first.stderr
        (folder / "preprocessor_config.json").unlink()
        prefetched(project, HF_ENDPOINT=address)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    again = prefetched(project, HF_HUB_OFFLINE="1")
    assert again.returncode == 0  # nobody is asked for what is complete


def test_prefetch_says_what_cannot_be_had_and_fetches_the_rest(project: Project) -> None:
    save_lpips(project.folder / "lpips.safetensors")
    evaluation = {"dino": NAME, "lpips": "lpips.safetensors", "clip": "nowhere"}
    project.write([{"image": "a.png", "prompts": ["x"]}], evaluation=evaluation)
    done = prefetched(project, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert f"evaluation.dino: cannot get the weights '{NAME}'" in done.stderr
    assert "evaluation.clip: cannot get the weights 'nowhere'" in done.stderr
    assert "lpips.safetensors is here" in done.stdout and "tiny-sd is here" in done.stdout


def test_prefetch_fetches_no_metrics_weights_for_a_manifest_that_does_not_evaluate(project: Project) -> None:
    project.write([{"image": "a.png", "prompts": ["x"]}])
    done = prefetched(project, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stderr) == (0, "")
