"""PIE-Bench's run-length masks, decoded as its own code does."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from pnp_batch.evaluation.masks import Masks, decode_pie
from pnp_batch.evaluation.values import Unavailable
from pnp_batch.inputs import Source


def of_the_authors(encoded_mask: list[int]) -> np.ndarray:
    """`mask_decode` of PIE-Bench's evaluation, loop by loop."""
    array = np.zeros(512 * 512)
    for i in range(0, len(encoded_mask), 2):
        for j in range(min(encoded_mask[i + 1], len(array) - encoded_mask[i])):
            array[encoded_mask[i] + j] = 1
    array = array.reshape(512, 512)
    array[0, :] = array[-1, :] = array[:, 0] = array[:, -1] = 1
    return array


def test_decodes_as_the_authors_code() -> None:
    runs = [5 * 512 + 3, 1000, 300 * 512, 40, 512 * 512 - 10, 50]
    assert np.array_equal(decode_pie(runs), of_the_authors(runs))


def source(path: Path) -> Source:
    return Source(path.name, PurePosixPath(path.stem), path, None, ())


def test_finds_the_entry_of_a_picture_and_resizes_it(tmp_path: Path) -> None:
    entry = {"image_path": "0_random/a.jpg", "mask": [0, 256 * 512]}
    (tmp_path / "mapping_file.json").write_text(json.dumps({"000": entry}))
    masks = Masks(tmp_path / "mapping_file.json")
    mask = masks.of(source(tmp_path / "annotation_images/0_random/a.jpg"), (64, 64))
    assert mask is not None
    assert mask[:32].all()
    assert not mask[33:-1, 1:-1].any()
    assert masks.of(source(tmp_path / "annotation_images/0_random/b.jpg"), (64, 64)) is None
    assert masks.of(source(tmp_path / "elsewhere/a.jpg"), (64, 64)) is None


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mapping_file.json").write_text('{"000": {"image": "a.jpg"}}')
    with pytest.raises(Unavailable, match=r"is not PIE-Bench's mapping_file.json"):
        Masks(tmp_path / "mapping_file.json")
    entry = {"image_path": "a.jpg", "mask": ["0", 5]}
    (tmp_path / "mapping_file.json").write_text(json.dumps({"000": entry}))
    with pytest.raises(Unavailable, match="that are no numbers"):
        Masks(tmp_path / "mapping_file.json")
