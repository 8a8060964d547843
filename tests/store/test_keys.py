from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_batch.store.keys import canonical_json, key_of, sha256

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(value=st.dictionaries(st.text(max_size=4), values, max_size=5), seed=st.integers(0, 99))
def test_a_key_depends_on_the_content_and_not_on_its_order_or_its_way_through_a_file(value, seed):
    shuffled = list(value.items())
    random.Random(seed).shuffle(shuffled)
    assert key_of(dict(shuffled)) == key_of(value)
    assert key_of(json.loads(canonical_json(value))) == key_of(value)
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(value).isascii()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values, values)
def test_different_contents_have_different_keys(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (key_of({"v": one}) == key_of({"v": other})) == same


def test_keys_never_change_from_one_version_to_the_next():
    """A store outlives the program that filled it."""
    content = {"stage": "invert", "size": (512, 512), "prompt": "größe 馬", "guidance_scale": 7.5, "none": None}
    assert canonical_json(content) == (
        '{"guidance_scale":7.5,"none":null,"prompt":"gr\\u00f6\\u00dfe \\u99ac","size":[512,512],"stage":"invert"}'
    )
    assert key_of(content) == sha256(canonical_json(content).encode())
    assert key_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_what_has_no_json_form_has_no_key():
    for value in (float("nan"), float("inf"), object(), {1, 2}, b"bytes"):
        with pytest.raises((TypeError, ValueError)):
            key_of({"v": value})
