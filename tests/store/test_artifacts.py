from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from running import Project, small_disk

from pnp_batch.errors import EnvironmentFailure
from pnp_batch.store import ArtifactStore, key_of
from pnp_batch.store.artifacts import META, CorruptArtifact
from pnp_batch.store.files import TEMP_PREFIX, temp_name

KEY = key_of({"a": 1})
SHARDS = {
    "latents": {"x": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "pixels": {"rgb": np.zeros((2, 2, 3), np.uint8)},
}
DEAD_PID = 2**22 + 1  # above the largest that Linux gives


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, index: int) -> None:
    """Flips a bit and sets the times back, as a failing disk would."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_is_published_is_found_in_its_place(store):
    assert store.find("invert", KEY) is None
    published = store.publish("invert", KEY, SHARDS, {"prompt": "größe", "size": (2, 3)})
    assert published.path == store.root / "invert" / KEY[:2] / KEY
    for artifact in (published, ArtifactStore(store.root).find("invert", KEY)):
        assert artifact is not None
        assert (artifact.key, artifact.meta) == (KEY, {"prompt": "größe", "size": [2, 3]})
        assert np.array_equal(artifact.load("latents")["x"], SHARDS["latents"]["x"])
        artifact.verify()
    assert list(store.all()) == [("invert", published.path)]
    assert {path.name for path in published.path.iterdir()} == {"latents.safetensors", META, "pixels.safetensors"}


dtypes = st.sampled_from(["f4", "f2", "f8", "u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "?", ">f4", ">i8"])
tensors = arrays.arrays(dtypes, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
shapes_of_memory = st.sampled_from(
    [lambda a: a, np.transpose, np.asfortranarray, lambda a: a[..., ::-1] if a.ndim else a]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(tensors=st.dictionaries(st.text("abc.äß_", min_size=1), st.tuples(tensors, shapes_of_memory), max_size=3))
def test_any_arrays_come_back_as_they_were(tmp_path_factory, tensors):
    store = ArtifactStore(tmp_path_factory.getbasetemp() / "arrays")
    shard = {name: change(array) for name, (array, change) in tensors.items()}
    artifact = store.publish("s", key_of({"n": np.random.default_rng().bytes(8).hex()}), {"shard": shard}, {})
    loaded = artifact.load("shard")
    assert loaded.keys() == shard.keys()
    for name, array in shard.items():
        assert loaded[name].dtype == array.dtype.newbyteorder("=")
        assert loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array, equal_nan=array.dtype.kind == "f")


def test_every_flipped_bit_of_a_shard_or_of_the_meta_is_noticed_or_harmless(store):
    artifact = store.publish("s", KEY, {"x": {"x": np.arange(4, dtype=np.uint8)}}, {"prompt": "a"})
    whole = {path: path.read_bytes() for path in artifact.path.iterdir()}
    unnoticed = []
    for path, data in whole.items():
        for index in range(len(data)):
            flip(path, index)
            fresh = ArtifactStore(store.root)
            found = fresh.find("s", KEY)
            try:
                if found is not None:
                    assert (found.meta, found.load("x")["x"].tolist()) == ({"prompt": "a"}, [0, 1, 2, 3])
                    unnoticed.append(chr(data[index]))
            except CorruptArtifact:
                pass
            shutil.rmtree(store.root / "corrupt", ignore_errors=True)
            artifact.path.mkdir(parents=True, exist_ok=True)
            for each, content in whole.items():
                stamp = artifact.shards.get(each.name, {"mtime_ns": 0})["mtime_ns"]
                each.write_bytes(content)
                os.utime(each, ns=(stamp, stamp))
    assert set(unnoticed) <= {" ", "\n"}  # white space of the JSON, and nothing else


def test_a_corrupt_artifact_is_set_aside_reported_and_can_be_made_again(store, caplog):
    artifact = store.publish("s", KEY, SHARDS, {})
    flip(artifact.path / "latents.safetensors", -1)
    damaged = bytes_below(artifact.path)
    with pytest.raises(CorruptArtifact, match=r"latents\.safetensors does not match its checksum"):
        store.load(artifact, "latents")
    assert store.find("s", KEY) is None
    assert store.was_corrupt("s", KEY)
    assert "set aside" in caplog.text
    (aside,) = (store.root / "corrupt").iterdir()
    assert bytes_below(aside) == damaged
    again = store.publish("s", KEY, SHARDS, {})
    again.verify()
    assert len(list((store.root / "corrupt").iterdir())) == 1


def test_a_changed_time_or_size_alone_makes_a_look_inside(store):
    artifact = store.publish("s", KEY, SHARDS, {})
    shard = artifact.path / "latents.safetensors"
    os.utime(shard, ns=(1, 1))
    assert store.find("s", KEY) is not None  # touched, but whole
    shard.write_bytes(shard.read_bytes()[:-1])
    assert store.find("s", KEY) is None
    assert store.was_corrupt("s", KEY)


@pytest.mark.parametrize(
    "damage", ["no meta", "no shard", "empty meta", "not json", "nested", "list", "other format", "empty"]
)
def test_whatever_is_wrong_with_a_folder_it_is_set_aside(store, damage):
    path = store.publish("s", KEY, SHARDS, {}).path
    if damage in ("no meta", "empty"):
        (path / META).unlink()
    if damage in ("no shard", "empty"):
        (path / "latents.safetensors").unlink()
    if damage == "empty":
        (path / "pixels.safetensors").unlink()
    texts = {
        "empty meta": "",
        "not json": "{",
        "nested": "[" * 100_000,
        "list": "[]",
        "other format": '{"content": {}}',
    }
    if damage in texts:
        (path / META).write_text(texts[damage])
    assert store.find("s", KEY) is None
    assert store.was_corrupt("s", KEY)
    assert not path.exists()


def test_check_reads_everything(store):
    artifact = store.publish("s", KEY, SHARDS, {})
    assert store.check("s", artifact.path)
    flip(artifact.path / "pixels.safetensors", -1)
    assert not store.check("s", artifact.path)


def test_of_two_publishers_one_wins_and_both_have_it(store):
    first = store.publish("s", KEY, SHARDS, {"by": 1})
    second = ArtifactStore(store.root).publish("s", KEY, SHARDS, {"by": 2})
    assert first.meta == second.meta == {"by": 1}
    assert not list(store.root.rglob(f"{TEMP_PREFIX}*"))


def test_a_corrupt_artifact_in_the_way_is_replaced(store):
    path = store.publish("s", KEY, SHARDS, {"by": 1}).path
    (path / META).write_text("{")
    assert store.publish("s", KEY, SHARDS, {"by": 2}).meta == {"by": 2}
    assert len(list((store.root / "corrupt").iterdir())) == 1


def test_many_publishers_and_readers_at_once(store):
    """Readers see nothing or all of it, never something broken."""
    keys = [key_of({"n": n}) for n in range(8)]
    start, errors = threading.Barrier(6), []

    def work(number: int) -> None:
        own = ArtifactStore(store.root)
        start.wait()
        try:
            for key in keys:
                own.publish("s", key, SHARDS, {"by": number})
                for other in keys:
                    if artifact := own.find("s", other):
                        artifact.verify()
            assert not own.corrupt
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(path.name for _, path in store.all()) == sorted(keys)
    assert not list(store.root.rglob(f"{TEMP_PREFIX}*"))


def test_nothing_half_written_stays_where_publishing_fails(store):
    for shards, meta in (
        ({"x": {"x": np.array(["text"])}}, {}),
        (SHARDS, {"x": float("nan")}),
        (SHARDS, {"x": object()}),
    ):
        with pytest.raises(Exception, match=r"dtype|JSON"):
            store.publish("s", KEY, shards, meta)
    assert store.find("s", KEY) is None
    assert not bytes_below(store.root)


def test_stale_temporaries_go_and_those_of_living_processes_stay(store):
    store.publish("s", KEY, SHARDS, {})
    host = os.uname().nodename
    dead = store.root / "s" / f"{TEMP_PREFIX}{host}-{DEAD_PID}-0a"
    elsewhere = store.root / "s" / f"{TEMP_PREFIX}other-host-{DEAD_PID}-0a"
    living = store.root / "s" / temp_name()
    for folder in (dead, elsewhere, living):
        folder.mkdir()
        (folder / "half.safetensors").write_bytes(b"x")
    dead_file = store.root / "digests" / f"{TEMP_PREFIX}{host}-{DEAD_PID}-0b"
    dead_file.parent.mkdir()
    dead_file.write_bytes(b"x")
    (store.root / "s" / f"{TEMP_PREFIX}of-another-program").write_bytes(b"x")
    assert {path for path in store.garbage() if path.name.startswith(TEMP_PREFIX)} == {dead, dead_file}
    store.remove_stale_temporaries()
    assert not dead.exists()
    assert not dead_file.exists()
    assert elsewhere.exists()
    assert living.exists()
    assert store.find("s", KEY) is not None


def test_temporaries_of_other_machines_are_garbage_when_nobody_touched_them_for_a_day(store):
    fresh, old = (store.root / "s" / f"{TEMP_PREFIX}other-host-1-0{token}" for token in "ab")
    for folder in (fresh, old):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 90_000,) * 2)
    assert list(store.garbage()) == [old]


def test_a_killed_publisher_leaves_a_temporary_that_the_next_run_removes(store):
    """A real process, killed in the middle of a publication by a shard that never ends."""
    child = os.fork()
    if not child:

        class Endless(dict):
            def items(self):
                os.kill(os.getpid(), 9)

        store.publish("s", KEY, {"good": SHARDS["latents"], "endless": Endless()}, {})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    assert store.find("s", KEY) is None
    (left,) = store.root.glob(f"s/{TEMP_PREFIX}*")
    assert (left / "good.safetensors").exists()
    store.remove_stale_temporaries()
    assert not left.exists()


def test_garbage_is_what_no_result_needs(store):
    used = store.publish("s", KEY, SHARDS, {})
    unused = store.publish("s", key_of({"b": 2}), SHARDS, {})
    broken = store.publish("s", key_of({"c": 3}), SHARDS, {})
    store.set_aside(broken.path, "for the test")
    (store.root / "checkpoints").mkdir()
    (store.root / "checkpoints/loop").write_bytes(b"x")
    (store.root / "checkpoints" / temp_name()).write_bytes(b"x")
    always = {*(store.root / "corrupt").iterdir(), store.root / "checkpoints/loop"}
    assert set(store.garbage()) == always
    assert set(store.garbage({used.key})) == always | {unused.path}


def test_a_file_system_that_does_not_answer_costs_no_artifact(store):
    """Out of file handles: the artifact is whole, so it must not be set aside."""
    import resource

    store.publish("s", KEY, SHARDS, {})
    child = os.fork()
    if not child:
        soft = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
        keep = []
        try:
            while True:
                keep.append(os.dup(0))
        except OSError:
            pass
        try:
            store.find("s", KEY)
            os._exit(1)
        except EnvironmentFailure:
            os._exit(0)
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert store.find("s", KEY) is not None


def test_meta_is_readable_by_other_programs(store):
    artifact = store.publish("s", KEY, SHARDS, {"prompt": "a"})
    content = json.loads((artifact.path / META).read_text())["content"]
    assert content["meta"] == {"prompt": "a"}
    assert content["shards"].keys() == {"latents.safetensors", "pixels.safetensors"}


@pytest.fixture
def full_soon(tmp_path: Path):
    """A real file system of one megabyte."""
    with small_disk(tmp_path / "disk", "1m"):
        yield tmp_path / "disk"


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_the_store_intact(full_soon):
    store = ArtifactStore(full_soon / "store")
    big = {"x": {"x": np.random.default_rng(0).integers(0, 255, 300_000, dtype=np.uint8)}}
    kept = [store.publish("s", key_of({"n": n}), big, {}) for n in range(3)]
    before = bytes_below(store.root)
    with pytest.raises(EnvironmentFailure, match=os.strerror(errno.ENOSPC)):
        store.publish("s", key_of({"n": 3}), big, {})
    assert bytes_below(store.root) == before
    assert not list(store.root.rglob(f"{TEMP_PREFIX}*"))
    for artifact in kept:
        artifact.verify()
    shutil.rmtree(kept[0].path)
    store.publish("s", key_of({"n": 3}), big, {}).verify()


def test_verify_promises_what_the_next_run_does(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write([{"image": project.picture("a.png"), "prompts": "x"}]).pnp("run")
    (shard,) = project.store.glob("translate/*/*/result.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    said = project.pnp("store verify", code=1)
    assert "set aside in" in said and ", to be made again" in said
    assert "1 of 1 result is there (1 computed now" in project.pnp("run")
