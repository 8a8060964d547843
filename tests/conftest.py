"""Shared set-up. Tiny models are fastest on one thread, and parallel tests must not fight for cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every child process

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_sd() -> Path:
    """The reference's tiny Stable Diffusion 1.x pipeline folder."""
    return Path(__file__).parent / "conformance/tiny-sd"
