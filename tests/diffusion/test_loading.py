from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from original_layout import same_weights, write_single_file
from safetensors.torch import load_file, save_file
from tiny_sdxl import write_tiny_sdxl
from transformers import CLIPTextModel, CLIPTokenizer

from pnp_batch.checkpoint import Schedule, resolve
from pnp_batch.diffusion.loading import load_parts
from pnp_batch.diffusion.model import DiffusionModel, load_model, pick_device
from pnp_batch.errors import EnvironmentFailure, ModelError
from pnp_batch.manifest import RunSpec

CPU = torch.device("cpu")
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


def load(path: Path, dtype: str = "float32", **arguments: str) -> DiffusionModel:
    return load_model(resolve(str(path), Path("/"), **arguments), CPU, dtype)


def same_models(one: DiffusionModel, other: DiffusionModel) -> dict[str, bool]:
    return {name: same_weights(getattr(one, name).state_dict(), getattr(other, name).state_dict()) for name in FILES}


ALL_THE_SAME = dict.fromkeys(FILES, True)


@pytest.fixture(scope="module")
def tiny(tiny_sd: Path) -> DiffusionModel:
    return load(tiny_sd)


@pytest.fixture(scope="module")
def single_file(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_single_file(tiny_sd, path)
    return path


@pytest.fixture(scope="module")
def sd2(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline as Stable Diffusion 2.x is: v-prediction, linear projections, another head count per level."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(tiny_sd / "unet")
    unet = UNet2DConditionModel.from_config(config, use_linear_projection=True, attention_head_dim=[2, 4, 4, 8])
    scheduler = DDIMScheduler.from_pretrained(tiny_sd / "scheduler", prediction_type="v_prediction")
    return saved(tiny_sd, tmp_path_factory.mktemp("sd2"), unet=unet, scheduler=scheduler)


def saved(base: Path, target: Path, variant: str | None = None, shard: str = "10GB", **parts: object) -> Path:
    """A pipeline folder written by diffusers, of the base's parts where no other ones are given."""
    own = {
        "unet": lambda: UNet2DConditionModel.from_pretrained(base / "unet"),
        "vae": lambda: AutoencoderKL.from_pretrained(base / "vae"),
        "text_encoder": lambda: CLIPTextModel.from_pretrained(base / "text_encoder"),
        "tokenizer": lambda: CLIPTokenizer.from_pretrained(base / "tokenizer"),
        "scheduler": lambda: DDIMScheduler.from_pretrained(base / "scheduler"),
    }
    built = {name: parts.get(name) or make() for name, make in own.items()}
    pipeline = StableDiffusionPipeline(
        **built, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(target, variant=variant, max_shard_size=shard)
    return target


def test_a_folder_is_loaded_as_it_lies_on_disk(tiny, tiny_sd):
    for name, file in FILES.items():
        assert same_weights(getattr(tiny, name).state_dict(), load_file(tiny_sd / file))
        assert not getattr(tiny, name).training
    scheduler = DDIMScheduler.from_pretrained(tiny_sd / "scheduler")
    assert tiny.alphas == scheduler.alphas_cumprod.double().tolist()
    assert tiny.final_alpha == float(scheduler.final_alpha_cumprod)
    assert (tiny.prediction_type, tiny.dtype) == ("epsilon", torch.float32)


def test_half_precision_spares_the_vae(tiny, tiny_sd):
    half = load(tiny_sd, "float16")
    assert half.unet.dtype == half.text_encoder.dtype == torch.float16
    assert half.vae.dtype == torch.float32
    assert same_models(half, tiny)["vae"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_single_file_gives_the_very_weights_of_the_folder(single_file, tiny_sd, dtype):
    """In half precision too, where the loader for single files would round the VAE."""
    assert same_models(load(single_file, dtype, config=str(tiny_sd)), load(tiny_sd, dtype)) == ALL_THE_SAME


def test_a_single_file_is_not_read_in_twice_the_memory(single_file, tiny_sd):
    parts = load_parts(resolve(str(single_file), Path("/"), config=str(tiny_sd)), torch.float16)
    assert [part.dtype for part in (parts.unet, parts.text_encoder, parts.vae)] == [torch.float16] * 2 + [torch.float32]


def test_a_single_file_of_the_second_generation_is_loaded_too(sd2, tmp_path):
    write_single_file(sd2, tmp_path / "model.safetensors", open_clip=True)
    one, other = load(tmp_path / "model.safetensors", config=str(sd2)), load(sd2)
    assert same_models(one, other) == ALL_THE_SAME
    assert one.prediction_type == "v_prediction"


def test_a_single_file_of_sdxl_is_loaded_too(tmp_path):
    """Both text encoders are in it, one in CLIP's own layout and one in OpenCLIP's."""
    folder = write_tiny_sdxl(tmp_path / "model")
    write_single_file(folder, tmp_path / "model.safetensors")
    one, other = load(tmp_path / "model.safetensors"), load(folder)
    assert same_models(one, other) == ALL_THE_SAME
    assert same_weights(one.text_encoder_2.state_dict(), other.text_encoder_2.state_dict())
    weights = load_file(tmp_path / "model.safetensors")
    lost = "conditioner.embedders.1.model.text_projection"
    save_file({name: weights[name] for name in weights if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks [0-9,]* of the [0-9,]* weights of its text_encoder_2"):
        load(tmp_path / "model.safetensors")


def test_a_folder_of_sdxl_without_its_second_text_encoder_is_refused(tmp_path):
    folder = write_tiny_sdxl(tmp_path / "model")
    path = folder / "text_encoder_2/model.safetensors"
    weights = load_file(path)
    save_file({name: weights[name] for name in weights if name != "text_projection.weight"}, path)
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as text_projection\.weight"):
        load(folder)
    path.unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors in .*text_encoder_2"):
        load(folder)


def test_a_single_file_needs_only_the_small_files_of_a_folder(single_file, tiny_sd, tiny, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    assert same_models(load(single_file, config=str(tmp_path / "configs")), tiny) == ALL_THE_SAME


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ("model.diffusion_model.out.2", "lacks 580 of the 827,476 weights of its unet"),
        ("first_stage_model.quant_conv", "lacks 72 of the 261,079 weights of its vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1", "lacks 8,544 of the 36,320 weights of its text_encoder"),
        ("first_stage_model.", "AutoencoderKL"),
        ("cond_stage_model.", "CLIPTextModel"),
    ],
)  # fmt: skip
def test_a_single_file_without_all_its_weights_is_refused(single_file, tiny_sd, tmp_path, dropped, message):
    """diffusers would go on with random ones."""
    weights = load_file(single_file)
    save_file({name: weights[name] for name in weights if not name.startswith(dropped)}, tmp_path / "part.safetensors")
    shutil.copytree(tiny_sd, tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "part.safetensors")


@pytest.mark.parametrize("file", FILES.values())
def test_a_folder_without_all_its_weights_is_refused(tiny_sd, tmp_path, file):
    folder = tmp_path / "part"
    shutil.copytree(tiny_sd, folder)
    weights = load_file(folder / file)
    lost = sorted(weights)[-1]
    save_file({name: weights[name] for name in weights if name != lost}, folder / file)
    with pytest.raises(ModelError, match=f"lacks 1 weights, such as {lost}"):
        load(folder)


@pytest.mark.parametrize("file", FILES.values())
@pytest.mark.parametrize("damage", ["half", "garbage", "empty", "shape"])
def test_broken_weights_are_a_model_error(tiny_sd, tmp_path, file, damage):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_sd, folder)
    path = folder / file
    if damage == "shape":
        weights = load_file(path)
        name = next(name for name in sorted(weights) if weights[name].ndim > 1)
        save_file(weights | {name: weights[name][:1].clone()}, path)
    else:
        path.write_bytes(
            {"half": path.read_bytes()[: path.stat().st_size // 2], "garbage": b"x" * 99, "empty": b""}[damage]
        )
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_v_prediction_and_linear_projections_are_loaded(sd2, tiny):
    model = load(sd2)
    assert model.prediction_type == "v_prediction"
    assert model.unet.config.use_linear_projection
    latents, texts = torch.randn(2, 4, 16, 16, generator=torch.manual_seed(1)), ("a", "b")
    with torch.inference_mode():
        expected = model.unet(latents, 500, encoder_hidden_states=model.encode_texts(texts)).sample
    assert torch.allclose(model.predict(latents, 500, texts), expected, atol=1e-6)
    alpha = model.alphas[500]
    noise = alpha**0.5 * expected + (1 - alpha) ** 0.5 * latents
    assert torch.allclose(model.noise(latents, 500, texts), noise, atol=1e-5)
    assert torch.equal(model.encode_texts(texts), tiny.encode_texts(texts))
    assert model.checkpoint.layers == tiny.checkpoint.layers


def test_a_variant_is_loaded(tiny_sd, tmp_path):
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_sd / "unet", dtype=torch.float16),
        "vae": AutoencoderKL.from_pretrained(tiny_sd / "vae", dtype=torch.float16),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_sd / "text_encoder", dtype=torch.float16),
    }
    folder = saved(tiny_sd, tmp_path / "half", variant="fp16", **parts)
    with pytest.raises(ModelError, match="write `variant: fp16`"):
        resolve(str(folder), Path("/"))
    model = load(folder, variant="fp16")
    assert same_weights(model.unet.state_dict(), {k: v.float() for k, v in parts["unet"].state_dict().items()})
    assert model.vae.dtype == torch.float32


def test_sharded_weights_are_loaded(tiny_sd, tiny, tmp_path):
    folder = saved(tiny_sd, tmp_path / "shards", shard="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    assert same_models(load(folder), tiny) == ALL_THE_SAME


def test_text_encoder_weights_with_the_old_prefix_are_loaded(tiny_sd, tiny, tmp_path):
    """As the published checkpoints have them."""
    folder = tmp_path / "old"
    shutil.copytree(tiny_sd, folder)
    weights = load_file(folder / FILES["text_encoder"])
    old = {f"text_model.{name}": weight for name, weight in weights.items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, folder / FILES["text_encoder"])
    assert same_models(load(folder), tiny) == ALL_THE_SAME


def test_the_scheduler_is_read_as_ddim_whatever_wrote_it(tiny_sd, tmp_path):
    """Another scheduler's own defaults must not slip in: `set_alpha_to_one` is false by default in PNDM, true in DDIM."""
    folder = saved(
        tiny_sd,
        tmp_path / "pndm",
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1),
    )
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    del config["set_alpha_to_one"]
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    model = load(folder)
    assert model.final_alpha == 1
    assert model.alphas == load(tiny_sd).alphas


def test_a_model_that_predicts_neither_noise_nor_v_is_refused(tiny_sd, tmp_path):
    scheduler = DDIMScheduler.from_pretrained(tiny_sd / "scheduler", prediction_type="sample")
    with pytest.raises(ModelError, match="predicts 'sample'"):
        load(saved(tiny_sd, tmp_path / "sample", scheduler=scheduler))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("total", [1000, 100])
def test_the_grid_is_the_one_of_diffusers(spacing, offset, total):
    theirs = DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset)
    ours = Schedule(total, spacing, offset)
    for steps in (1, 2, 3, 7, 10, 20, 33, 50, 51, 99, *((250, 333, 500, 999) if total == 1000 else ())):
        theirs.set_timesteps(steps)
        assert ours.timesteps(steps) == theirs.timesteps.tolist()


def test_what_is_told_to_be_cut_is_what_the_text_encoder_does_not_see(tiny):
    prompt = " ".join("abcdefghijklmnopqrstuvwxyz" * 4)
    kept = prompt.removesuffix(tiny.checkpoint.cut_words(prompt))
    assert torch.equal(tiny.encode_texts([prompt]), tiny.encode_texts([kept]))
    assert not torch.equal(tiny.encode_texts([kept]), tiny.encode_texts([kept.strip()[:-1]]))


def test_a_device_that_is_not_there_is_an_environment_failure():
    assert pick_device("cpu") == CPU
    assert RunSpec().dtype_on("cpu") == "float32"
    for wanted in ("cuda:99", 99, "nonsense"):
        with pytest.raises(EnvironmentFailure, match=f"device '{wanted}'"):
            pick_device(wanted)
