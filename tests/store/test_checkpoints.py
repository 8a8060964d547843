from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pnp_batch.store.checkpoints import LoopCheckpoint

STATE = {"latents": np.arange(8, dtype=np.float32).reshape(2, 4).T, "step": np.array(1.5), "empty": np.zeros((0, 3))}


@pytest.fixture
def checkpoint(tmp_path: Path) -> LoopCheckpoint:
    return LoopCheckpoint(tmp_path, "invert", ["a", "b"], 0)


def test_a_state_comes_back_as_it_was_and_can_be_written_to(checkpoint, tmp_path):
    assert checkpoint.load() is None
    checkpoint.save(41, {"old": np.zeros(3)})
    checkpoint.save(42, STATE)
    found = LoopCheckpoint(tmp_path, "invert", ["a", "b"], 0).load()
    assert found is not None
    step, tensors = found
    assert step == 42
    assert tensors.keys() == STATE.keys()
    for name, array in STATE.items():
        assert np.array_equal(tensors[name], array)
        assert tensors[name].shape == array.shape
        assert tensors[name].flags.writeable


def test_it_belongs_to_one_batch_in_one_order_and_one_stage(checkpoint, tmp_path):
    checkpoint.save(1, STATE)
    for stage, keys in (("invert", ["b", "a"]), ("invert", ["a"]), ("translate", ["a", "b"])):
        assert LoopCheckpoint(tmp_path, stage, keys, 0).load() is None


def test_a_torn_or_damaged_file_is_as_good_as_none(checkpoint):
    checkpoint.save(3, STATE)
    whole = checkpoint.path.read_bytes()
    for length in (0, 1, 63, 64, 65, len(whole) // 2, len(whole) - 1):
        checkpoint.path.write_bytes(whole[:length])
        assert checkpoint.load() is None
    for index in range(len(whole)):
        checkpoint.path.write_bytes(whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])
        assert checkpoint.load() is None
    checkpoint.path.write_bytes(whole)
    assert checkpoint.load() is not None


def test_a_folder_in_its_place_is_as_good_as_none(checkpoint):
    checkpoint.path.mkdir(parents=True)
    assert checkpoint.load() is None


def test_it_is_due_after_its_time_and_cleared_when_done(tmp_path):
    often, seldom = LoopCheckpoint(tmp_path, "s", ["a"], 0), LoopCheckpoint(tmp_path, "s", ["b"], 3600)
    assert often.due()
    assert not seldom.due()
    often.save(1, STATE)
    often.clear()
    often.clear()
    assert often.load() is None
    assert not list(often.path.parent.iterdir())
