from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_batch.errors import ManifestError, Problem
from pnp_batch.manifest import (
    InputSpec,
    Manifest,
    Row,
    Settings,
    load_manifest,
    prompt_from_row,
    settings_from,
)
from pnp_batch.manifest.keys import GENERATE_ALIASES, INPUT_ALIASES, SETTING_ALIASES

HEAD = "model: some/model\noutput_dir: out\n"
INPUTS = "inputs:\n- image: a.png\n  prompts: [a cat]\n"


@pytest.fixture
def read(tmp_path: Path):
    """Loads a manifest from its text."""

    def load(text: str) -> Manifest:
        path = tmp_path / "manifest.yaml"
        path.write_text(text, encoding="utf-8")
        return load_manifest(path)

    return load


@pytest.fixture
def problems(read):
    """The problems of a manifest's text, as `line: key: message`."""

    def find(text: str) -> list[str]:
        with pytest.raises(ManifestError) as caught:
            read(text)
        assert all(problem.file.endswith("manifest.yaml") for problem in caught.value.problems)
        return [f"{problem.line}: {problem.key}: {problem.message}" for problem in caught.value.problems]

    return find


def test_what_was_written_comes_in_a_fixed_order(read):
    """A set of names has another order in every process, and files are written from them."""
    names = ["height", "width", "num_inference_steps", "guidance_scale", "pnp_f_t", "pnp_attn_t", "seed"]
    written = dict.fromkeys(reversed(names), 8) | {"pnp_f_t": 0.5, "pnp_attn_t": 0.5}
    assert list(read(HEAD + INPUTS + yaml.safe_dump({"defaults": written}, sort_keys=False)).defaults.given()) == names


def test_the_example_of_the_design_is_understood(read):
    manifest = read("""\
version: 1
model: stable-diffusion-v1-5/stable-diffusion-v1-5
output_dir: outputs/horses
defaults: {height: 512, width: 512, guidance_scale: 7.5, pnp_f_t: 0.8, pnp_f_layers: [4], negative_prompt: "ugly, blurry"}
inputs:
  - image: photos/horse.jpg
    prompts:
      - a bronze statue of a horse
      - {prompt: a zebra in the snow, guidance_scale: 10}
  - images: photos/cats/
    prompts: [a marble cat]
  - generate: {prompt: a photo of a horse in mud, seed: 50, guidance_scale: 5.0}
    prompts: [a photo of a zebra in the snow]
run: {engine: local, devices: auto, batch_size: auto, dtype: auto, bank: auto}
""")
    assert [prompt.prompt for prompt in manifest.inputs[0].prompts or ()] == [
        "a bronze statue of a horse",
        "a zebra in the snow",
    ]
    assert manifest.defaults.overridden((manifest.inputs[0].prompts or ())[1]).guidance_scale == 10
    assert manifest.defaults.pnp_f_layers == (4,)
    assert manifest.inputs[2].generate is not None
    assert manifest.inputs[2].generate.seed == 50


def test_keys_of_the_public_configurations_are_understood(read):
    manifest = read(
        "model_id: m\noutput_path: o\ndefaults: {n_timesteps: 40, scale: 3, negative_prompt_alpha: 0.5, H: 64, W: 32}\n"
        "inputs:\n- {init_img: a.png, target_prompts: [x]}\n- {image_path: b.png, prompt: y, inversion_steps: 500}\n"
        "- {generate: {source_prompt: z, ddim_steps: 20}, prompts: w}\n"
        "- {generate: {prompt: z, num_ddim_sampling_steps: 30}, prompts: w}\n"
    )
    defaults = manifest.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.negative_alpha) == (40, 3, 0.5)
    assert (defaults.height, defaults.width) == (64, 32)
    assert [spec.image for spec in manifest.inputs] == ["a.png", "b.png", None, None]
    assert manifest.inputs[1].num_inversion_steps == 500
    assert manifest.inputs[2].generate is not None
    assert manifest.inputs[2].generate.num_inference_steps == 20
    assert manifest.inputs[3].generate is not None
    assert manifest.inputs[3].generate.num_inference_steps == 30


def test_a_prompt_overrides_its_input_and_that_the_defaults(read):
    manifest = read(
        HEAD + "defaults: {seed: 1, pnp_f_t: 0.1, height: 64}\n"
        "inputs:\n- image: a\n  seed: 2\n  pnp_f_t: 0.2\n  height: null\n  prompts: [{prompt: x, seed: 3}]\n"
    )
    spec = manifest.inputs[0]
    settings = manifest.defaults.overridden(spec, (spec.prompts or ())[0])
    assert (settings.seed, settings.pnp_f_t, settings.height) == (3, 0.2, None)
    assert type(settings) is Settings


def test_a_bare_off_is_the_word_off(read):
    assert read(HEAD + INPUTS + "run: {bank: off}").run.bank == "off"


def test_a_key_with_nothing_below_it_is_as_if_left_out(read):
    manifest = read(HEAD + INPUTS + "defaults:\n  # seed: 3\nrun:\n")
    assert manifest.defaults == Settings()
    assert manifest.run.engine == "local"


def test_one_prompt_one_layer_and_a_prompt_file_need_no_list(read):
    manifest = read(HEAD + "inputs:\n- {image: a, prompts: x, pnp_f_layers: 4}\n- {image: b, prompts: p/List.CSV}\n")
    assert [p.prompt for p in manifest.inputs[0].prompts or ()] == ["x"]
    assert manifest.inputs[0].pnp_f_layers == (4,)
    assert manifest.inputs[1].prompts_file == "p/List.CSV"


def test_paths_are_relative_to_the_manifest_and_the_home_is_known(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    manifest = read(HEAD + INPUTS)
    assert (manifest.output, manifest.store) == (tmp_path / "out", tmp_path / "out/store")
    manifest = read("model: m\noutput_dir: ~/results\n" + INPUTS + "run: {store: ../store}")
    assert (manifest.output, manifest.store) == (tmp_path / "home/results", tmp_path.parent / "store")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            HEAD + INPUTS + "defaults:\n  guidence_scale: 3\n",
            "7: defaults.guidence_scale: .*did you mean 'guidance_scale'",
        ),
        (HEAD + INPUTS + "defaults: {num_steps: 9}\n", "6: defaults.num_steps: .*did you mean 'num_inference_steps'"),
        (
            "model: m\noutput_dir: o\ninputs: [{generate: {prompt: p, ddim_step: 9}, prompts: [x]}]\n",
            "3: .*did you mean 'num_inference_steps'",
        ),
        (
            HEAD + INPUTS + "defaults: {pnp_f_t: 40}\n",
            r"6: defaults.pnp_f_t: .*equal to 1 \(got 40\); if it counts .* as a fraction of them \(40 of 50 is 0.8\)",
        ),
        (
            HEAD + INPUTS + "defaults: {feature_injection_threshold: 40}\n",
            r"6: .*write pnp_f_t as .*\(40 of 50 is 0.8\)",
        ),
        (HEAD + INPUTS + "defaults: {negative_alpha: 40}\n", r"6: defaults.negative_alpha: .*equal to 1 \(got 40\)$"),
        (HEAD + INPUTS + "defaults: {strength: 0.5}\n", "6: defaults.strength: .*pnp_f_t"),
        (HEAD + INPUTS + "defaults: {strenght: 0.5}\n", "6: defaults.strenght: .*pnp_f_t"),
        (HEAD + INPUTS + "guidance_scale: 3\n", "6: guidance_scale: .*belongs under `defaults`"),
        (HEAD + INPUTS + "run:\n  device: cuda\n", "7: run.device: .*devices: cuda"),
        (HEAD + INPUTS + "run: {model: m}\n", "6: run.model: .*belongs at the top"),
        (HEAD + INPUTS + "run: {bank_budget: lots}\n", "6: run.bank_budget: .*a size such as 50GB"),
        (HEAD + INPUTS + "run: {bank_budget: 3 spoons}\n", "6: run.bank_budget: .*a size such as 50GB"),
        (HEAD + INPUTS + "defaults: {batch_size: 3}\n", "6: defaults.batch_size: .*belongs under `run`"),
        (HEAD + INPUTS + "defaults: {pnp_f_t: 1.5}\n", r"6: defaults.pnp_f_t: .*less than or equal to 1 \(got 1.5\)"),
        (HEAD + INPUTS + "defaults: {pnp_attn_t: .nan}\n", "6: defaults.pnp_attn_t: .*finite"),
        (HEAD + INPUTS + "defaults: {guidance_scale: .inf}\n", "6: defaults.guidance_scale: .*finite"),
        (HEAD + INPUTS + "defaults: {num_inference_steps: yes}\n", "6: defaults.num_inference_steps: .*a number"),
        (HEAD + INPUTS + "defaults: {pnp_f_layers: [-1]}\n", "6: defaults.pnp_f_layers.0: .*greater"),
        (HEAD + INPUTS + "defaults: {negative_prompt: }\n", "6: defaults.negative_prompt: .*has no value"),
        (HEAD + INPUTS + "defaults: {negative_prompt: no}\n", "6: defaults.negative_prompt: .*in quotes"),
        (HEAD + INPUTS + 'defaults: {negative_prompt: "a\\0b"}\n', "6: defaults.negative_prompt: .*no file can hold"),
        (
            HEAD + INPUTS + "defaults: {negative_schedule: expo}\n",
            "6: defaults.negative_schedule: .*did you mean 'exp'",
        ),
        (HEAD + INPUTS + f"defaults: {{seed: {9**60}}}\n", "6: defaults.seed: .*less than"),
        (HEAD + INPUTS + f"defaults: {{seed: {'9' * 5000}}}\n", "6: : not valid YAML: .*int"),
        (HEAD + INPUTS + "defaults: {negative_prompt: 2001-99-99}\n", "6: : not valid YAML: .*timestamp.*quotes"),
        (HEAD + INPUTS + "defaults: {negative_prompt: !!bool maybe}\n", "6: : not valid YAML: .*bool"),
        (HEAD + INPUTS + "run: {batch_size: 0}\n", "6: run.batch_size: .*from 1 on, or auto"),
        (HEAD + INPUTS + "run: {batch_size: on}\n", "6: run.batch_size: .*from 1 on, or auto"),
        (HEAD + INPUTS + "run: {devices: [0, 0]}\n", "6: run.devices: .*each named once"),
        (HEAD + INPUTS + "run: {engine: locale}\n", "6: run.engine: .*did you mean 'local'"),
        (HEAD + INPUTS + "version: 2\n", "6: version: .*should be 1"),
        (HEAD + INPUTS + "1: 2\n", "6: 1: .*text"),
        (HEAD + "inputs:\n", "3: inputs: .*has no value"),
        (HEAD + "inputs: []\n", "1: : the list of inputs is empty"),
        (HEAD, "1: inputs: 'inputs' is missing"),
        ("model: m\noutput_dir: ''\n" + INPUTS, "2: output_dir: 'output_dir' is empty"),
        (HEAD + "inputs:\n- a.png\n", "4: inputs.0: an input is a mapping"),
        (HEAD + "inputs:\n- prompts: [x]\n", "4: inputs.0: .*image, images or generate"),
        (HEAD + "inputs:\n- {image: a, images: b}\n", "4: inputs.0: .*has image and images"),
        (HEAD + "inputs:\n- {image: a.png, stop: 3, prompts: [b]}\n", "4: inputs.0: stop goes with `video:`"),
        (HEAD + "inputs:\n- {video: a.mp4, start: 3, stop: 3, prompts: [b]}\n", "4: inputs.0: stop comes after start"),
        (HEAD + "inputs:\n- image: a\n  prompts: []\n", "4: inputs.0: .*prompts is empty"),
        (HEAD + "inputs:\n- images: []\n", "4: inputs.0.images: .*empty"),
        (HEAD + "inputs:\n- images: [1]\n", "4: inputs.0.images: .*list of files"),
        (HEAD + "inputs:\n- images: a\n  root: b\n  prompts: [x]\n", "4: inputs.0: root goes with a list"),
        (HEAD + "inputs:\n- images: a\n  missing: fail\n  prompts: [x]\n", "4: inputs.0: missing goes with files"),
        (HEAD + "inputs:\n- {image: a, prompts: a.csv, prompts_file: b.csv}\n", "4: .*same setting"),
        (HEAD + "inputs:\n- {image: a, prompts_file: b.yaml}\n", "4: .*ends in .txt, .csv or .jsonl"),
        (HEAD + "inputs:\n- generate: {prompt: x}\n", "4: inputs.0: a generated input needs prompts"),
        (HEAD + "inputs:\n- image: a\n  prompts:\n  - x\n  - 7\n", "7: inputs.0.prompts.1: a prompt is text"),
        (HEAD + "inputs:\n- image: a\n  prompts:\n  - ' '\n", "6: inputs.0.prompts.0: the prompt is empty"),
        (
            HEAD + "inputs:\n- image: a\n  prompts: {prompt: x,\n    seed: -1}\n",
            "6: inputs.0.prompts.0.seed: .*greater",
        ),
        (
            HEAD + INPUTS + "defaults:\n  steps: 4\n  n_timesteps: 3\n",
            "8: defaults.n_timesteps: .*'steps' are the same",
        ),
        (HEAD + INPUTS + "defaults:\n  steps: 4\n  num_inference_steps: 3\n", "8: .*num_inference_steps' and 'steps'"),
        (HEAD + INPUTS + "model: again\n", "6: model: this key is given twice"),
        ("", "1: : the file is empty"),
        ("- a\n", "1: : a manifest is a mapping"),
        ("a: b: c\n", "1: : not valid YAML"),
        (HEAD + "é: \x07\n", r"3: : not valid YAML: the character U\+0007"),
        ("--- a\n--- b\n", "2: : not valid YAML"),
        ("a: !!python/object:os.system x\n", "1: : not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_with_line_key_and_the_right_word(problems, text, expected):
    found = problems(text)
    assert any(re.match(expected, problem) for problem in found), found


def test_a_colon_inside_a_prompt_is_explained(problems):
    found = problems(HEAD + "inputs:\n- image: a\n  prompts:\n  - a cat: in snow\n")
    assert any(problem.startswith("6: ") and "needs quotes" in problem for problem in found)


def test_all_problems_are_told_at_once(problems):
    assert len(problems(HEAD + INPUTS + "defaults: {seed: -1, pnp_f_t: 2, bogus: 1}\nrun: {dtype: int8}\n")) == 4


def test_lines_are_right_where_keys_are_merged_from_an_anchor(problems):
    text = (
        HEAD
        + "inputs:\n- &first\n  image: a\n  negative_alpha: 0.1\n  prompts: [x]\n- <<: *first\n  negative_alpha: 4\n"
    )
    assert problems(text) == ["9: inputs.1.negative_alpha: input should be less than or equal to 1 (got 4)"]
    assert problems(text.replace("0.1", "9").replace(": 4", ": 0.5")) == [
        "6: inputs.0.negative_alpha: input should be less than or equal to 1 (got 9)"
    ]


def test_a_merge_key_takes_what_is_not_written(read):
    manifest = read(HEAD + "inputs:\n- &a {image: a, seed: 1, prompts: [x]}\n- {<<: *a, seed: 2}\n")
    assert [(spec.image, spec.seed) for spec in manifest.inputs] == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: &a\n  <<: *a\n",
        "? &a [*a]\n: 1",
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
        "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "? &b [x, x, x, x]\n: 1\n? [[*b, *b], [*b, *b]]\n: 2\n",
        "[" * 50_000,
        "{a: " * 50_000,
        "- " * 50_000,
        "".join(" " * i + "a:\n" for i in range(500)),
    ],
)
def test_bombs_and_circles_are_refused(problems, text):
    assert problems(text)


def test_a_manifest_that_is_not_there_names_the_one_that_is(tmp_path):
    (tmp_path / "horses.yaml").write_text("")
    with pytest.raises(ManifestError, match=r"no such file; did you mean horses\.yaml\?"):
        load_manifest(tmp_path / "horse.yaml")
    with pytest.raises(ManifestError, match="is a folder; name the YAML file"):
        load_manifest(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: größe".encode("latin-1"))
    with pytest.raises(ManifestError, match="UTF-8"):
        load_manifest(tmp_path / "latin.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "m.yaml").write_text(HEAD + INPUTS, encoding="utf-8-sig")
    assert load_manifest(tmp_path / "m.yaml").model == "some/model"


def test_a_setting_problem_stands_where_the_setting_was_written(read):
    manifest = read(
        HEAD + "defaults:\n  seed: 1\ninputs:\n- image: a\n  height: 64\n  prompts:\n  - {prompt: x, width: 32}\n"
    )
    loc = ("inputs", 0, "prompts", 0)
    lines = {key: manifest.setting_problem(loc, key, "wrong").line for key in ("width", "height", "seed", "pnp_f_t")}
    assert lines == {"width": 9, "height": 7, "seed": 4, "pnp_f_t": 9}
    row = Row("list.csv", 3, frozenset({"width"}), ("inputs", 0))
    assert manifest.setting_problem(row, "width", "wrong") == Problem("list.csv", 3, "width", "wrong")
    assert manifest.setting_problem(row, "height", "wrong").line == 7
    assert manifest.setting_problem(row, "pnp_f_t", "wrong") == Problem("list.csv", 3, "", "wrong")


def test_settings_from_keywords_explain_themselves():
    assert settings_from({"steps": 20, "seed": 3}).num_inference_steps == 20
    with pytest.raises(ManifestError, match="did you mean 'guidance_scale'"):
        settings_from({"guidence_scale": 3})


def test_a_row_names_its_file_and_line():
    assert prompt_from_row({"prompt": "x", "scale": "3", "pnp_f_layers": "4, 5"}, Path("l.csv"), 7).guidance_scale == 3
    assert prompt_from_row({"prompt": "x", "pnp_f_layers": "[4, 5]"}, Path("l.csv"), 7).pnp_f_layers == (4, 5)
    with pytest.raises(ManifestError, match=r"l\.csv:7: scael: .*did you mean 'guidance_scale'"):
        prompt_from_row({"prompt": "x", "scael": "3"}, Path("l.csv"), 7)
    with pytest.raises(ManifestError, match=r"l\.csv:7: prompt: 'prompt' is missing"):
        prompt_from_row({"seed": "3"}, Path("l.csv"), 7)


def test_values_are_frozen(read):
    manifest = read(HEAD + INPUTS)
    with pytest.raises(ValueError, match="frozen"):
        manifest.model = "other"


def test_run_settings_can_be_overridden_from_the_command_line(read):
    manifest = read(HEAD + INPUTS + "run: {dtype: float16}")
    changed = manifest.with_run({"devices": "cpu"})
    assert (changed.run.devices, changed.run.dtype, changed.base) == ("cpu", "float16", manifest.base)
    with pytest.raises(ManifestError, match="--engine"):
        manifest.with_run({"engine": "cloud"})


# Arbitrary values as YAML, JSON or a caller may bring them.
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["auto", "off", "pnp", "ddim", "constant", "0.5", "50", "1e3", "x.csv", "", "\0", "builtin:shapes"]
    ),
    st.dates(),
    st.binary(max_size=4),
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaves, inner, max_size=3), max_leaves=5
)
names = sorted({*Settings.model_fields, *InputSpec.model_fields, *SETTING_ALIASES, *INPUT_ALIASES, *GENERATE_ALIASES})
mappings = st.dictionaries(st.sampled_from(names) | st.text(max_size=8), values, max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(mappings)
def test_any_mapping_of_settings_round_trips_or_is_refused(mapping):
    try:
        chosen = settings_from(mapping)
    except ManifestError as error:
        assert str(error)
    else:
        assert settings_from(chosen.model_dump()) == chosen
        assert settings_from(json.loads(json.dumps(chosen.given()))) == chosen


valid_settings = st.fixed_dictionaries(
    {},
    optional={
        "height": st.integers(8, 16384),
        "num_inference_steps": st.integers(1, 1000),
        "guidance_scale": st.floats(allow_nan=False, allow_infinity=False),
        "pnp_f_t": st.floats(0, 1),
        "pnp_attn_layers": st.lists(st.integers(0, 20), max_size=4),
        "negative_prompt": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
        "negative_schedule": st.sampled_from(["constant", "linear", "exp"]),
        "seed": st.integers(0, 2**63 - 1),
    },
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(defaults=valid_settings, own=valid_settings)
def test_valid_settings_come_through_the_file_as_they_were(tmp_path_factory, defaults, own):
    path = tmp_path_factory.getbasetemp() / "valid.yaml"
    content = {
        "model": "m",
        "output_dir": "o",
        "defaults": defaults,
        "inputs": [{"image": "a", "prompts": ["x"], **own}],
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    manifest = load_manifest(path)
    expected = settings_from(defaults | own)
    assert manifest.defaults.overridden(manifest.inputs[0]) == expected


structures = st.fixed_dictionaries(
    {},
    optional={
        "model": values,
        "output_dir": values,
        "defaults": mappings | values,
        "inputs": st.lists(mappings | values, max_size=2) | values,
        "run": st.dictionaries(st.sampled_from(["engine", "devices", "batch_size", "bank", "dtype"]), values) | values,
        "revision": values,
        "bogus": values,
    },
)


@pytest.mark.parametrize(
    ("written", "rate"),
    [
        ("24", "24"),
        ("12.5", "25/2"),
        ("23.976023976023978", "24000/1001"),
        ("23.976", "24000/1001"),
        ("29.97", "30000/1001"),
        ("24000/1001", "24000/1001"),
    ],
)
def test_frame_rates_are_exact(read, written: str, rate: str):
    manifest = read(HEAD + f"inputs:\n- video: a/\n  prompts: [a cat]\n  fps: {written}\n")
    assert manifest.inputs[0].of_video.fps == rate


@pytest.mark.parametrize("written", ["0", "-1", "2000", "fast", "true", "1/0", ".nan", "[24]", "1e999999999", "1e3"])
def test_wrong_frame_rates_are_named(read, written: str):
    with pytest.raises(ManifestError, match="frames a second, up to 1000"):
        read(HEAD + f"inputs:\n- video: a/\n  prompts: [a cat]\n  fps: {written}\n")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(structures)
def test_any_structure_gives_a_manifest_or_a_manifest_error(tmp_path_factory, structure: dict[str, Any]):
    path = tmp_path_factory.getbasetemp() / "structure.yaml"
    path.write_text(yaml.safe_dump(structure), encoding="utf-8")
    _load_or_refuse(path)


tags = [f"!!{tag.rpartition(':')[2]} " for tag in yaml.SafeLoader.yaml_constructors if tag]
words = [
    "inputs: ",
    "prompts: ",
    "model: ",
    "2001-01-01",
    "1:30",
    "0x",
    "1e9",
    ".inf",
    "&a ",
    "*a ",
    "<<: ",
    "? ",
    ": ",
    "- ",
    "---\n",
]
fragments = st.sampled_from([*"a[]{},|>'\"#%~=?:-&*!\n\t\\\0\u2028\ufeff ", *words, *tags])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.text(max_size=60) | st.lists(fragments, max_size=25).map("".join))
def test_any_text_gives_a_manifest_or_a_manifest_error(tmp_path_factory, text: str):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    _load_or_refuse(path)


def _load_or_refuse(path: Path) -> None:
    try:
        load_manifest(path)
    except ManifestError as error:
        assert error.problems
        assert str(error)
