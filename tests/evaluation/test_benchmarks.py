"""Importers on small files in the authors' formats; what comes out is a manifest that loads and finds everything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from running import TINY_SD
from typer.testing import CliRunner

from pnp_batch.cli import app
from pnp_batch.evaluation.benchmarks import STYLES, TARGETS, template_prompts
from pnp_batch.evaluation.masks import Masks
from pnp_batch.inputs import Expansion, Source, Translation
from pnp_batch.manifest import Manifest, load_manifest

WILD_REAL = """
- init_img: /wild-ti2i/data/Horse.png
  target_prompts:
    - a photo of a bronze horse in a museum
    - a robot horse
- init_img: data/real_karate.png
  source_prompt: a photo of two karate fighters
  target_prompts: [two penguins]
"""
WILD_FAKE = """
- source_prompt: "a photo of a horse in mud"
  seed: 50
  scale: 5.0
  ddim_steps: 50
  target_prompts: ["a photo of a zebra in the snow", "a photo of a husky on the grass"]
"""


def picture(path: Path, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(path)


def imported(benchmark: str, path: Path, code: int = 0) -> str:
    outcome = CliRunner().invoke(app, ["import", benchmark, str(path), "--model", str(TINY_SD)])
    assert outcome.exit_code == code, outcome.output
    return outcome.stdout if code == 0 else outcome.output


def expanded(text: str, folder: Path) -> tuple[Manifest, list[tuple[Source, tuple[Translation, ...]]]]:
    (folder / "imported.yml").write_text(text)
    expansion = Expansion(load_manifest(folder / "imported.yml"))
    found = list(expansion)
    assert not expansion.problems
    return expansion.manifest, found


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    folder = tmp_path / "wild-ti2i"
    picture(folder / "data/horse.png")
    picture(folder / "data/real_karate.png")
    (folder / "wild-ti2i-real.yaml").write_text(WILD_REAL)
    (folder / "wild-ti2i-fake.yaml").write_text(WILD_FAKE)
    return folder


def test_wild_ti2i(wild: Path, tmp_path: Path) -> None:
    _, found = expanded(imported("wild-ti2i", wild), tmp_path)
    (generated, targets), (horse, horses), (_, karate) = found
    assert generated.generate is not None
    own = generated.generate
    assert (own.prompt, own.seed, own.guidance_scale, own.num_inference_steps) == (
        "a photo of a horse in mud",
        50,
        5.0,
        50,
    )
    assert [t.prompt for t in targets] == ["a photo of a zebra in the snow", "a photo of a husky on the grass"]
    assert horse.path == wild / "data/horse.png"  # the authors' paths begin elsewhere and differ in case
    assert [t.settings.inversion_prompt for t in (*horses, *karate)] == ["", "", "a photo of two karate fighters"]
    assert horses[0].settings.num_inference_steps == 50


def test_one_yaml_file_alone(wild: Path, tmp_path: Path) -> None:
    _, found = expanded(imported("wild-ti2i", wild / "wild-ti2i-fake.yaml"), tmp_path)
    assert len(found) == 1


def test_imported_manifest_passes_validation(wild: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yml").write_text(imported("wild-ti2i", wild))
    outcome = CliRunner().invoke(app, ["validate", str(tmp_path / "m.yml")])
    assert outcome.exit_code == 0, outcome.output
    assert "5 results of 3 guidance images" in outcome.output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- init_img: data/nowhere.png\n  target_prompts: [x]", "0.init_img: there is no data/nowhere.png"),
        ("- target_prompts: [x]", "0: it names neither a picture"),
        ("- init_img: data/horse.png", "an entry has `target_prompts`"),
        ("a: b", "a list of entries"),
        ("- [", "cannot be read"),
    ],
)
def test_mistakes_are_named_with_their_file(wild: Path, content: str, said: str) -> None:
    (wild / "wild-ti2i-fake.yaml").unlink()
    (wild / "wild-ti2i-real.yaml").write_text(content)
    output = imported("wild-ti2i", wild, code=2)
    assert "wild-ti2i-real.yaml" in output
    assert said in output


def test_folder_without_the_benchmark(tmp_path: Path) -> None:
    assert "no .yaml file of the benchmark is there" in imported("wild-ti2i", tmp_path, code=2)
    assert "there is no such file; name PIE-Bench's folder" in imported("pie-bench", tmp_path, code=2)
    assert "'pie' is not one of" in imported("pie", tmp_path, code=2)


def test_imagenet_r_ti2i_in_the_authors_format(tmp_path: Path) -> None:
    folder = tmp_path / "imagenetr-ti2i"
    picture(folder / "panda/cartoon_30.jpg")
    picture(folder / "cat/cartoon_30.jpg")
    entry = {"init_img": "/ImageNetR-TI2I/panda/cartoon_30.jpg", "target_prompts": ["a cartoon of a husky"]}
    (folder / "imnetr-ti2i.yaml").write_text(yaml.safe_dump([entry]))
    _, ((source, _),) = expanded(imported("imagenet-r-ti2i", folder), tmp_path)
    assert source.path == folder / "panda/cartoon_30.jpg"


def test_no_other_picture_of_the_same_name_takes_the_place_of_one_that_is_missing(tmp_path: Path) -> None:
    picture(tmp_path / "dog/sketch_20.jpg")
    entry = {"init_img": "ImageNetR-TI2I/cat/sketch_20.jpg", "target_prompts": ["a sketch of a husky"]}
    (tmp_path / "imnetr-ti2i.yaml").write_text(yaml.safe_dump([entry]))
    said = imported("imagenet-r-ti2i", tmp_path, code=2)
    assert "0.init_img: there is no ImageNetR-TI2I/cat/sketch_20.jpg below" in said
    assert "folder and file name have to agree" in said


def test_of_pictures_that_agree_alike_the_uppermost_is_meant_and_none_is_guessed(wild: Path, tmp_path: Path) -> None:
    (wild / "wild-ti2i-fake.yaml").unlink()
    picture(wild / "backup/data/horse.png")
    _, found = expanded(imported("wild-ti2i", wild), tmp_path)
    assert found[0][0].path == wild / "data/horse.png"
    (wild / "data/horse.png").unlink()
    picture(wild / "again/data/horse.png")
    said = imported("wild-ti2i", wild, code=2)
    assert "may be any of these" in said
    assert "again/data/horse.png" in said and "backup/data/horse.png" in said


def test_imagenet_r_pictures_alone_get_prompts_from_templates(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet-r"
    picture(folder / "cat/sketch_20.jpg")
    picture(folder / "violin/origami_3.jpg")
    text = imported("imagenet-r-ti2i", folder)
    assert text == imported("imagenet-r-ti2i", folder)
    _, found = expanded(text, tmp_path)
    assert [len(translations) for _, translations in found] == [5, 5]
    assert str(found[0][0].stem) == "cat/sketch_20"


def test_imagenet_r_class_without_targets_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "teapot/sketch_1.jpg")
    assert "no target classes are known for 'teapot'" in imported("imagenet-r-ti2i", tmp_path, code=2)


def test_templates_are_style_by_class_and_repeatable() -> None:
    every = template_prompts("cat", TARGETS["cat"], STYLES, 1000)
    assert len(every) == len(set(every)) == len(STYLES) * 6
    assert "an origami of a cat" in every
    assert "a sketch of a tiger" in every
    assert template_prompts("cat", TARGETS["cat"], STYLES, 5) == every[:0] + template_prompts(
        "cat", TARGETS["cat"], STYLES, 5
    )
    assert template_prompts("cat", TARGETS["cat"], STYLES, 5, seed=1) != template_prompts(
        "cat", TARGETS["cat"], STYLES, 5
    )


PIE = {
    "000000000000": {
        "image_path": "0_random_140/000000000000.jpg",
        "original_prompt": "a slanted mountain bicycle on the road in front of a building",
        "editing_prompt": "a slanted [rusty] mountain bicycle on the road in front of a building",
        "editing_instruction": "Make the frame of the bike rusty",
        "editing_type_id": "0",
        "blended_word": "bicycle bicycle",
        "mask": [0, 262144],
    },
    "111000000001": {
        "image_path": "1_change_object_80/1_artificial/1_animal/111000000001.jpg",
        "original_prompt": "a [cat]  sitting",
        "editing_prompt": "a [dog] sitting",
        "editing_instruction": "",
        "editing_type_id": "1",
        "blended_word": "cat dog",
        "mask": [512 * 100, 512 * 50],
    },
}


def test_pie_bench(tmp_path: Path) -> None:
    folder = tmp_path / "PIE-Bench_v1"
    for entry in PIE.values():
        picture(folder / "annotation_images" / str(entry["image_path"]), 512)
    (folder / "mapping_file.json").write_text(json.dumps(PIE))
    manifest, found = expanded(imported("pie-bench", folder), tmp_path)
    assert [str(source.stem) for source, _ in found] == [
        "0_random_140/000000000000",
        "1_change_object_80/1_artificial/1_animal/111000000001",
    ]
    (bicycle,), (dog,) = (translations for _, translations in found)
    assert bicycle.prompt == "a slanted rusty mountain bicycle on the road in front of a building"
    assert (dog.prompt, dog.settings.inversion_prompt) == ("a dog sitting", "a cat sitting")
    assert "structure_distance_pie" in manifest.evaluation.metrics  # the one that PIE-Bench's table shows
    assert manifest.evaluation.masks is not None
    masks = Masks(manifest.base / manifest.evaluation.masks)
    mask = masks.of(found[1][0], (512, 512))
    assert mask is not None
    assert mask[100:150].all()
    assert not mask[151:-1, 1:-1].any()


def test_pie_bench_picture_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mapping_file.json").write_text(json.dumps(PIE))
    assert "000000000000: there is no" in imported("pie-bench", tmp_path, code=2)
