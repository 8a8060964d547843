"""Feature banks: every place gives the same picture, what is stored is used, budgets hold, what is corrupt is made again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running import Project

from pnp_batch.checkpoint import resolve
from pnp_batch.manifest import load_manifest
from pnp_batch.plan import Plan
from pnp_batch.runner import Silent, Worker
from pnp_batch.stages.bank import costs
from pnp_batch.stages.remembered import Costs
from pnp_batch.stages.work import Item
from pnp_batch.store.disk import Bandwidth

PROMPTS = ["a cat", {"prompt": "a dog", "pnp_f_t": 0.4}, {"prompt": "a cow", "pnp_attn_layers": [4, 5]}]


def project(folder: Path, prompts: list[Any] = PROMPTS, **run: Any) -> Project:
    made = Project(folder)
    names = [made.picture("one.png", 1), made.picture("two.png", 2)]
    return made.write([{"images": names, "prompts": prompts}], run=run)


def pictures(made: Project) -> Mapping[tuple[str, str], np.ndarray[Any, Any]]:
    return {
        (row["source"], row["prompt"]): np.array(Image.open(made.output / row["file_name"])).astype(int)
        for row in made.rows()
    }


def rows_computed(printed: str) -> int:
    return int(printed.split(" UNet rows")[0].rsplit(" ", 1)[-1])


def banks(made: Project) -> list[Path]:
    return sorted(made.store.glob("bank/??/*"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = project(tmp_path_factory.mktemp("off"), bank="off")
    made.pnp("run")
    return made


@pytest.mark.parametrize("mode", ["auto", "memory", "disk"])
def test_every_place_gives_the_same_bytes(plain: Project, tmp_path: Path, mode: str) -> None:
    made = project(tmp_path, bank=mode)
    made.pnp("run")
    for row in plain.rows():
        assert (made.output / row["file_name"]).read_bytes() == (plain.output / row["file_name"]).read_bytes()
    assert len(banks(made)) == (2 if mode == "disk" else 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_comes_back_from_the_disk_bit_by_bit(tmp_path: Path, dtype: str) -> None:
    made = [project(tmp_path / mode, ["a cat"], bank=mode, dtype=dtype) for mode in ("off", "disk")]
    off, disk = (pictures(each) for each in made if each.pnp("run"))
    assert all(np.array_equal(off[name], disk[name]) for name in off)


def test_an_added_prompt_reads_the_stored_bank(tmp_path: Path) -> None:
    project(tmp_path, ["a cat"], bank="disk").pnp("run")
    added = project(tmp_path, ["a cat", "a dog"], bank="disk")
    printed = added.pnp("run")
    assert rows_computed(printed) == 2 * 2 * 5  # two pictures, two guidance rows, five steps: no source row
    fresh = project(tmp_path / "fresh", ["a cat", "a dog"], bank="off")
    fresh.pnp("run")
    for name, picture in pictures(fresh).items():
        assert np.abs(picture - pictures(added)[name]).max() <= 1


def test_a_lost_result_comes_back_to_the_byte_from_the_bank(tmp_path: Path) -> None:
    made = project(tmp_path, bank="disk")
    made.pnp("run")
    before = {row["file_name"]: (made.output / row["file_name"]).read_bytes() for row in made.rows()}
    victim = next(made.store.glob("translate/??/*/result.safetensors"))
    victim.write_bytes(b"torn")
    next(made.output.glob("images/*.png")).unlink()
    made.pnp("run")
    assert {row["file_name"]: (made.output / row["file_name"]).read_bytes() for row in made.rows()} == before


def test_a_corrupt_bank_is_set_aside_and_made_again(tmp_path: Path) -> None:
    project(tmp_path, ["a cat"], bank="disk").pnp("run")
    made = project(tmp_path, ["a cat", "a dog"], bank="disk")
    shard = next(banks(made)[0].glob("steps-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "set aside" in made.pnp("run")
    assert len(pictures(made)) == 4 and len(banks(made)) == 2


def test_a_bank_that_rots_unseen_costs_no_result_its_batch(tmp_path: Path) -> None:
    made = []
    for name in ("whole", "rotten"):
        (tmp_path / name).mkdir()
        project(tmp_path / name, ["a cat"], bank="disk").pnp("run")
        made.append(project(tmp_path / name, ["a cat", "a dog"], bank="disk"))
    shard = next(banks(made[1])[0].glob("steps-*"))
    stamp, data = shard.stat(), bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as bits rot: only its checksum tells
    printed = [each.pnp("run") for each in made]
    assert "set aside" in printed[1] and rows_computed(printed[1]) > rows_computed(printed[0])
    whole, rotten = map(pictures, made)
    assert all(np.array_equal(whole[name], rotten[name]) for name in whole)


@pytest.mark.parametrize(("mode", "compression"), [("memory", "int8"), ("disk", "fp8")])
def test_a_compressed_bank_differs_a_little_and_says_so(
    plain: Project, tmp_path: Path, mode: str, compression: str
) -> None:
    made = project(tmp_path, bank=mode, bank_compression=compression)
    made.pnp("run")
    differences = [np.abs(picture - pictures(plain)[name]) for name, picture in pictures(made).items()]
    assert max(d.max() for d in differences) > 0 and max(d.mean() for d in differences) < 3
    assert {row["bank_compression"] for row in made.rows()} == {compression}
    assert not {row["key"] for row in made.rows()} & {row["key"] for row in plain.rows()}


def test_compressed_banks_are_smaller_and_give_one_result_wherever_they_are(tmp_path: Path) -> None:
    kept = project(tmp_path / "plain", bank="disk")
    made = [project(tmp_path / mode, bank=mode, bank_compression="int8") for mode in ("memory", "disk")]
    for each in (kept, *made):
        each.pnp("run")
    memory, disk = map(pictures, made)
    assert all(np.array_equal(memory[name], disk[name]) for name in memory)
    sizes = [sum(f.stat().st_size for path in banks(each) for f in path.glob("steps-*")) for each in (kept, made[1])]
    assert sizes[1] < 0.4 * sizes[0]


def test_a_bank_budget_is_respected_and_the_least_recently_used_go(tmp_path: Path) -> None:
    first = project(tmp_path, ["a cat"], bank="disk", batch_size=1)
    first.pnp("run")
    old, new = sorted(banks(first), key=lambda path: (path / "meta.json").stat().st_mtime_ns)
    os.utime(old / "meta.json", ns=(1, 1))
    each = sum(file.stat().st_size for file in old.iterdir())
    made = Project(tmp_path).write(
        [{"image": Project(tmp_path).picture("three.png", 3), "prompts": ["a cat"]}],
        run={"bank": "disk", "bank_budget": 2 * each + each // 2},
    )
    made.pnp("run")
    assert old not in banks(made) and new in banks(made) and len(banks(made)) == 2


def test_a_budget_too_small_for_one_group_is_said_and_costs_nothing_else(plain: Project, tmp_path: Path) -> None:
    made = project(tmp_path, bank="disk", bank_budget="1kB")
    assert "do not fit bank_budget" in made.pnp("run")
    assert not banks(made)
    assert {row["file_name"] for row in made.rows()} == {row["file_name"] for row in plain.rows()}


def test_gc_keeps_the_banks_of_pictures_in_use_and_takes_the_others(tmp_path: Path) -> None:
    project(tmp_path, ["a cat"], bank="disk").pnp("run")
    made = Project(tmp_path).write([{"image": "one.png", "prompts": ["a cat"]}])
    made.pnp("store gc", "--unused")
    assert len(banks(made)) == 1


def test_only_bank_prepares_pictures_for_prompts_to_come(tmp_path: Path) -> None:
    made = project(tmp_path, bank="disk")
    made.pnp("run", "--only", "invert")
    made.pnp("run", "--only", "bank")
    assert len(banks(made)) == 2 and not list(made.store.glob("translate/*"))


def test_the_dry_run_shows_sizes_and_seconds(tmp_path: Path) -> None:
    made = project(tmp_path, bank="auto")
    printed = made.pnp("run", "--dry-run")
    assert "bank:" in printed and "by auto" in printed and "MB" in printed
    assert not banks(made)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"bank": "off", "bank_compression": "int8"}, "needs a bank"),
        ({"bank": "disc"}, "bank"),
        ({"bank": "disk", "bank_budget": "plenty"}, "bank_budget"),
        ({"bank": "disk", "bank_compression": "zip"}, "bank_compression"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, run: Mapping[str, Any], message: str) -> None:
    assert message in project(tmp_path, **run).pnp("validate", code=2)


def test_what_is_stored_is_read_where_that_is_faster() -> None:
    slow, fast = Bandwidth(1e6, 1e6), Bandwidth(1e9, 1e9)
    assert Costs(seconds=1, size=10_000_000, disk=slow).choice == "off"
    assert Costs(seconds=1, size=10_000_000, disk=fast).choice == "disk"


def test_the_measured_size_is_that_of_the_bank(tmp_path: Path) -> None:
    made = project(tmp_path, bank="disk")
    made.pnp("run")
    manifest = load_manifest(made.manifest)
    plan = Plan(manifest, resolve(manifest.model, manifest.base))
    worker = Worker(manifest, plan.checkpoint, Silent())
    item = Item(next(plan.jobs()), worker.context)
    written = sum(file.stat().st_size for file in banks(made)[0].glob("steps-*"))
    assert costs(worker.context, item, 1).size == pytest.approx(written, rel=0.02)
