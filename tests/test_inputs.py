from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pnp_batch.errors import ManifestError
from pnp_batch.inputs import Expansion, Source, Translation, read_prompts, slug
from pnp_batch.manifest import Manifest, Row, load_manifest

Found = list[tuple[Source, tuple[Translation, ...]]]


class Folder:
    """A folder with a manifest in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def files(self, *names: str, text: str = "not read") -> None:
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    def manifest(self, *inputs: Mapping[str, Any], output_dir: str = "out", **top: Any) -> Manifest:
        content = {"model": "m", "output_dir": output_dir, "inputs": list(inputs), **top}
        path = self.root / "manifest.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=False), encoding="utf-8")
        return load_manifest(path)

    def expand(self, *inputs: Mapping[str, Any], **top: Any) -> Found:
        """What the inputs stand for, where nothing is wrong with them."""
        expansion = Expansion(self.manifest(*inputs, **top))
        found = list(expansion)
        assert not expansion.problems
        return found

    def names(self, *inputs: Mapping[str, Any], **top: Any) -> list[str]:
        return [source.name for source, _ in self.expand(*inputs, **top)]

    def problems(self, *inputs: Mapping[str, Any], **top: Any) -> list[str]:
        expansion = Expansion(self.manifest(*inputs, **top))
        list(expansion)
        return [str(problem).replace(f"{self.root}/", "") for problem in expansion.problems]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def prompts_of(found: Found) -> dict[str, list[str]]:
    return {source.name: [t.prompt for t in translations] for source, translations in found}


def stems_of(found: Found) -> list[str]:
    return [str(source.stem) for source, _ in found]


def test_one_image(folder):
    folder.files("photos/horse.jpg")
    ((source, translations),) = folder.expand({"image": "photos/horse.jpg", "prompts": ["a", "b"], "seed": 4})
    assert (source.name, str(source.stem), source.path) == (
        "photos/horse.jpg",
        "horse",
        folder.root / "photos/horse.jpg",
    )
    assert [(t.prompt, t.settings.seed, t.loc) for t in translations] == [
        ("a", 4, ("inputs", 0, "prompts", 0)),
        ("b", 4, ("inputs", 0, "prompts", 1)),
    ]


def test_a_folder_gives_its_tree_in_a_fixed_order_without_what_is_hidden(folder):
    folder.files(
        "p/b.PNG", "p/a.jpg", "p/sub/c.webp", "p/.hidden.png", "p/.git/d.png", "p/notes.txt", "p/sub/deep/e.gif"
    )
    (folder.root / "p/folder.png").mkdir()
    found = folder.expand({"images": "p/", "prompts": ["x"]})
    assert [source.name for source, _ in found] == ["p/a.jpg", "p/b.PNG", "p/sub/c.webp", "p/sub/deep/e.gif"]
    assert stems_of(found) == ["a", "b", "sub/c", "sub/deep/e"]


def test_a_glob_mirrors_the_tree_below_its_first_wildcard(folder):
    folder.files("p/x/a.jpg", "p/y/a.jpg", "p/y/z/a.jpg", "p/y/b.txt", "p/.h/c.jpg")
    (folder.root / "p/y/folder.jpg").mkdir()
    assert stems_of(folder.expand({"images": "p/*/a.jpg", "prompts": ["x"]})) == ["x/a", "y/a"]
    assert folder.names({"images": "p/**/*.jpg", "prompts": ["x"]}) == ["p/x/a.jpg", "p/y/a.jpg", "p/y/z/a.jpg"]
    assert folder.names({"images": "p/?/**a.*", "prompts": ["x"]}) == ["p/x/a.jpg", "p/y/a.jpg"]
    absolute = str(folder.root / "p/x/*.jpg")
    assert folder.names({"images": absolute, "prompts": ["x"]}) == [str(folder.root / "p/x/a.jpg")]


def test_brackets_in_folder_names_are_no_pattern(tmp_path):
    folder = Folder(tmp_path / "run [1]")
    folder.files("cats [old]/a.jpg", "b.jpg")
    assert folder.names({"images": "cats [old]", "prompts": ["x"]}) == ["cats [old]/a.jpg"]
    assert folder.names({"images": "*.jpg", "prompts": ["x"]}) == ["b.jpg"]


def test_a_list_mirrors_the_tree_below_its_root(folder):
    folder.files("p/x/a.jpg", "p/b.jpg", "c.jpg")
    found = folder.expand({"images": ["x/a.jpg", "b.jpg"], "root": "p", "prompts": ["x"]})
    assert [source.name for source, _ in found] == ["p/x/a.jpg", "p/b.jpg"]
    assert stems_of(found) == ["x/a", "b"]
    assert stems_of(folder.expand({"images": ["p/x/a.jpg", "c.jpg"], "prompts": ["x"]})) == ["a", "c"]


@pytest.mark.parametrize(
    "name", ["../up.jpg", "x/../../up.jpg", "{root}/up.jpg", "//{root}/up.jpg", "x/../..jpg", ".h.jpg", "..jpg"]
)
def test_no_name_leads_out_of_the_output_folder_or_into_hiding(tmp_path, name):
    folder = Folder(tmp_path / "base")
    folder.files("p/..jpg", "p/.h.jpg", "up.jpg", "p/x/b.jpg")
    folder.files("../up.jpg")
    written = name.replace("{root}", str(tmp_path).lstrip("/") if name.startswith("//") else str(tmp_path))
    ((source, _),) = folder.expand({"images": [written], "root": "p", "prompts": ["x"]})
    assert not source.stem.is_absolute()
    assert all(part and part[0] != "." for part in source.stem.parts)
    assert source.path is not None
    assert source.path.samefile(folder.root / "p" / written)


def test_a_generated_source_has_a_name_and_no_file(folder):
    ((source, translations),) = folder.expand(
        {"generate": {"prompt": "a horse / in mud", "seed": 5}, "prompts": ["x"], "guidance_scale": 3}
    )
    assert (source.path, str(source.stem)) == (None, "a-horse-in-mud-seed5")
    assert translations[0].settings.guidance_scale == 3


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"image": "hrose.jpg"}, "manifest.yaml:4: inputs.0.image: no such file: hrose.jpg; did you mean horse.jpg?"),
        ({"image": "p"}, "inputs.0.image: p is a folder; write `images: p`"),
        ({"image": "p/c.mp4"}, "manifest.yaml:4: inputs.0.image: p/c.mp4 is a video; write `video: p/c.mp4`"),
        ({"images": ["c.MKV"], "root": "p"}, "inputs.0.images.0: p/c.MKV is a video; write `video: p/c.MKV`"),
        ({"image": "*.jpg"}, "a pattern goes under `images:`"),
        ({"image": "horse.jpg/x.jpg"}, "no such file"),
        ({"image": "x" * 300 + ".jpg"}, "cannot be read: File name too long"),
        ({"image": "pipe.png"}, "cannot be read: not an ordinary file"),
        ({"image": "~nobody-of-that-name/x.png"}, "no such file"),
        ({"images": "photso"}, "manifest.yaml:4: inputs.0.images: no such folder: photso; did you mean photos?"),
        ({"images": "horse.jpg"}, "horse.jpg is a file; write `image: horse.jpg`"),
        ({"images": "p"}, "p: no pictures found (.png, .jpg"),
        ({"images": "p/*.jpg"}, "no pictures found"),
        ({"images": "photso/*.jpg"}, "no such folder: photso; did you mean photos?"),
        ({"images": "x" * 300}, "no such folder"),
        ({"images": ["horse.jpg", "no.jpg", "neither.jpg"]}, "manifest.yaml:6: inputs.0.images.1: no such file"),
        ({"images": ["horse.jpg", "no.jpg", "neither.jpg"]}, "manifest.yaml:7: inputs.0.images.2: no such file"),
    ],
)
def test_what_cannot_be_read_is_found_and_placed(folder, inputs, expected):
    folder.files("horse.jpg", "photos/a.jpg", "p/notes.md", "p/c.mp4", "p/c.MKV")
    os.mkfifo(folder.root / "pipe.png")
    problems = folder.problems({**inputs, "prompts": ["x"]})
    assert any(expected in problem for problem in problems), problems


def test_one_wrong_input_does_not_hide_the_others(folder):
    folder.files("a.jpg")
    manifest = folder.manifest(
        {"image": "no.jpg", "prompts": ["x"]}, {"image": "a.jpg", "prompts": ["x"]}, {"images": "nix", "prompts": ["x"]}
    )
    expansion = Expansion(manifest)
    assert [source.name for source, _ in expansion] == ["a.jpg"]
    assert [problem.key for problem in expansion.problems] == ["inputs.0.image", "inputs.2.images"]


@pytest.mark.parametrize("output_dir", ["photos/out", "photos", "."])
def test_results_never_become_inputs_of_the_next_run(folder, output_dir):
    products = ("images", "videos/x", "inspect/features")
    folder.files("photos/a.jpg", *(f"{output_dir}/{name}/a--x-0123456789.gif" for name in products), "b.jpg")
    for images in ("photos", "photos/**/*.*[gf]", ".", "**/*.*[gf]"):
        names = folder.names({"images": images, "prompts": ["x"]}, output_dir=output_dir)
        assert [name for name in names if "--" in name] == []
        assert "photos/a.jpg" in names
    for name in products:
        (problem,) = folder.problems({"images": f"{output_dir}/{name}", "prompts": ["x"]}, output_dir=output_dir)
        assert "the results would land among these pictures" in problem


@pytest.mark.parametrize("images", ["photos", "photos/*.jpg"])
def test_the_rows_of_an_earlier_run_are_no_prompts(folder, images):
    folder.files("photos/a.jpg")
    folder.files("photos/a.txt", text="a cat")
    folder.files("photos/metadata.jsonl", text='{"file_name": "images/a--x.png", "prompt": "x", "key": "0"}')
    assert prompts_of(folder.expand({"images": images}, output_dir="photos")) == {"photos/a.jpg": ["a cat"]}


def test_links_to_folders_are_not_followed_and_that_is_said(folder):
    folder.files("p/a.jpg", "elsewhere/b.jpg")
    (folder.root / "p/link").symlink_to(folder.root / "elsewhere")
    (folder.root / "p/round").symlink_to(folder.root / "p")
    expansion = Expansion(folder.manifest({"images": "p", "prompts": ["x"]}))
    assert [source.name for source, _ in expansion] == ["p/a.jpg"]
    (warning,) = expansion.warnings
    assert f"in {folder.root / 'p'} links to folders are not followed (2, first: 'link')" in warning
    (folder.root / "p/a.jpg").unlink()
    (problem,) = folder.problems({"images": "p", "prompts": ["x"]})
    assert "no pictures found" in problem
    assert "links to folders are not followed" in problem
    assert folder.names({"images": "p/link", "prompts": ["x"]}) == ["p/link/b.jpg"]


def test_a_name_that_is_no_text_is_left_out_with_a_warning(folder):
    folder.files("p/a.jpg")
    Path(os.fsdecode(os.fsencode(folder.root) + b"/p/caf\xe9.jpg")).write_text("x")
    expansion = Expansion(folder.manifest({"images": "p", "prompts": ["x"]}))
    assert [source.name for source, _ in expansion] == ["p/a.jpg"]
    assert "not valid UTF-8" in expansion.warnings[0]
    expansion.warnings[0].encode()


def test_a_text_file_beside_a_picture_holds_its_prompts(folder):
    folder.files("p/a.jpg", "p/b.png")
    folder.files("p/a.txt", text="# for the horse\na zebra\n\n  a unicorn, #1  \n")
    folder.files("p/b.txt", text="\ufeffa dog\r\n")
    found = folder.expand({"images": "p"}, {"image": "p/a.jpg"})
    assert [t.prompt for _, ts in found for t in ts] == [
        "a zebra",
        "a unicorn, #1",
        "a dog",
        "a zebra",
        "a unicorn, #1",
    ]
    assert found[0][1][1].loc == Row(str(folder.root / "p/a.txt"), 4, frozenset({"prompt"}), ("inputs", 0))


def test_pictures_without_prompts_are_refused_with_a_way_out(folder):
    folder.files("p/a.jpg", *(f"p/{name}.jpg" for name in "bcdefgh"))
    folder.files("p/a.txt", text="x")
    (problem,) = folder.problems({"images": "p"})
    assert problem == (
        "manifest.yaml:4: inputs.0: no prompts: write `prompts:`, or put b.txt (or prompts.txt, prompts.csv, "
        "prompts.jsonl) beside the pictures (without: b.jpg, c.jpg, d.jpg, e.jpg, f.jpg and 2 more)"
    )


@pytest.mark.parametrize("name", ["p/prompts.txt", "p.txt"])
def test_one_text_file_serves_a_folder(folder, name):
    folder.files("p/a.jpg", "p/b.jpg")
    folder.files(name, text="one\ntwo\n")
    both = {"p/a.jpg": ["one", "two"], "p/b.jpg": ["one", "two"]}
    assert prompts_of(folder.expand({"images": "p"})) == both
    assert prompts_of(folder.expand({"images": "p/*.jpg"})) == both


@pytest.mark.parametrize("name", ["p/prompts.csv", "p/metadata.csv", "p.csv"])
def test_a_table_gives_each_picture_its_own_prompts(folder, name):
    folder.files("p/a.jpg", "p/s/b.jpg", "p/c.jpg")
    table = [
        "file_name, prompt, guidance_scale, pnp_attn_layers",
        "a.jpg,a zebra,3,",
        './s/b.jpg,"a dog,\na cat",,"4, 5"',
        ",,,",
        "p/a.jpg,a cow,,",
    ]
    folder.files(name, text="\ufeff" + "\r\n".join(table))
    expansion = Expansion(folder.manifest({"images": "p", "seed": 7, "guidance_scale": 2}))
    found = list(expansion)
    assert not expansion.problems
    assert prompts_of(found) == {"p/a.jpg": ["a zebra", "a cow"], "p/s/b.jpg": ["a dog,\na cat"]}
    first, second = found[0][1][0], found[1][1][0]
    assert (first.settings.guidance_scale, first.settings.seed, first.settings.pnp_attn_layers) == (3, 7, None)
    assert (second.settings.guidance_scale, second.settings.pnp_attn_layers) == (2, (4, 5))
    assert first.loc == Row(str(folder.root / name), 2, frozenset({"prompt", "guidance_scale"}), ("inputs", 0))
    assert expansion.warnings == [f"{folder.root / name} has no row for 1 picture, left out here: c.jpg"]


def test_json_lines_may_hold_any_text(folder):
    folder.files("p/a.jpg", "p/b.jpg")
    rows = [{"prompt": "for\u2028all", "seed": 3}, {"file_name": "b.jpg", "prompt": "only b", "pnp_f_layers": [4]}]
    folder.files("list.jsonl", text="\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    found = folder.expand({"images": "p", "prompts": "list.jsonl"})
    assert prompts_of(found) == {"p/a.jpg": ["for\u2028all"], "p/b.jpg": ["for\u2028all", "only b"]}
    assert found[1][1][1].settings.pnp_f_layers == (4,)


def test_a_prompt_file_serves_one_image_and_generated_ones(folder):
    folder.files("a.jpg")
    folder.files("list.csv", text="image,prompt\na.jpg,x\n")
    folder.files("list.txt", text="y\n")
    found = folder.expand(
        {"image": "a.jpg", "prompts": "list.csv"}, {"generate": {"prompt": "z"}, "prompts": "list.txt"}
    )
    assert [t.prompt for _, ts in found for t in ts] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.csv", "file_name,prompt\nhrose.jpg,x\nb.jpg,y\n", "l.csv:2: hrose.jpg is not among the pictures; did you mean horse"),
        ("l.csv", "prompt,scael\nx,3\n", "l.csv:2: scael: unknown key 'scael'; did you mean 'guidance_scale'?"),
        ("l.csv", "prompt,seed\nx,one\n", "l.csv:2: seed: input should be a valid integer"),
        ("l.csv", "file_name,seed\nb.jpg,1\n", "l.csv:2: prompt: 'prompt' is missing"),
        ("l.csv", "prompt,prompt\nx,y\n", "l.csv:1: prompt: this column is given twice"),
        ("l.csv", "file_name;prompt\nb.jpg;x, y\n", "l.csv:1: the columns are separated by semicolons; write commas"),
        ("l.csv", "file_name\tprompt\nb.jpg\tx\n", "l.csv:1: the columns are separated by tabs; write commas"),
        ("l.csv", "prompt\nx,y\n", "l.csv:2: more cells than the header has columns"),
        ("l.csv", 'prompt\n"x\ny\n', "not valid CSV: unexpected end of data"),
        ("l.csv", "prompt\n" + "x" * 200_000 + "\n", "not valid CSV: field larger than field limit"),
        ("l.csv", "prompt\n", "l.csv: holds no prompt"),
        ("l.csv", "", "l.csv: holds no prompt"),
        ("l.txt", "# nothing\n", "l.txt: holds no prompt"),
        ("l.jsonl", '{"prompt": "x"}\n{"prompt": \n', "l.jsonl:2: not valid JSON"),
        ("l.jsonl", '["x"]\n', "l.jsonl:1: each line must be an object"),
        ("l.jsonl", "[" * 100_000 + "\n", "l.jsonl:1: not valid JSON"),
        ("l.jsonl", '{"prompt": "x", "pnp_f_t": NaN}\n', "l.jsonl:1: pnp_f_t: "),
        ("l.jsonl", '{"prompt": "\\ud800"}\n', "l.jsonl:1: prompt: this text holds a character that no file can hold"),
        ("l.jsonl", '{"prompt": " "}\n', "l.jsonl:1: the prompt is empty"),
        ("lost.csv", "prompt\nx\n", "manifest.yaml:5: inputs.0.prompts: no such prompt file: l.csv; did you mean lost.csv?"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_prompt_file_is_told_once_with_its_line(folder, name, text, expected):
    folder.files("p/horse.jpg", "p/b.jpg")
    folder.files(name, text=text)
    problems = folder.problems({"images": "p", "prompts": "l.csv" if name == "lost.csv" else name})
    assert len(problems) == 1
    assert problems[0].startswith(expected) or expected in problems[0]


def test_a_broken_sidecar_does_not_hide_the_other_pictures(folder):
    folder.files("p/a.jpg", "p/b.jpg")
    folder.files("p/b.txt", text="x")
    (folder.root / "p/a.txt").write_bytes(b"\xff")
    expansion = Expansion(folder.manifest({"images": "p"}))
    assert [source.name for source, _ in expansion] == ["p/b.jpg"]
    assert "a.txt: cannot be read" in str(expansion.problems[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    suffix=st.sampled_from([".txt", ".csv", ".jsonl"]),
    data=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
)
def test_any_prompt_file_gives_prompts_or_a_manifest_error(tmp_path_factory, suffix: str, data: bytes):
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(data)
    try:
        rows: Sequence[Any] = list(read_prompts(file))
    except ManifestError as error:
        assert str(error)
    else:
        assert all(prompt.prompt.strip() and line >= 1 for _, prompt, line in rows)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text())
def test_a_slug_is_a_plain_short_file_name(text):
    name = slug(text)
    assert name
    assert len(name.encode()) <= 96
    assert not set(name) & set("/\\.\0\n :")
    assert name == name.strip("-")


def test_slugs_keep_the_words_of_any_script():
    assert slug("A Bronze statue, of: a horse!") == "a-bronze-statue-of-a-horse"
    assert slug("ein Pferd aus Gold & groß") == "ein-pferd-aus-gold-groß"
    assert slug("金の馬") == "金の馬"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("...") == "prompt"


@pytest.mark.parametrize("images", ["photos", "photos/**/*.png"])
def test_what_runs_of_other_manifests_wrote_is_left_out_with_a_word(folder: Folder, images: str) -> None:
    run = "photos/old/out"
    folder.files("photos/a.png", f"{run}/images/a--x-0123456789.png", f"{run}/videos/c/000000.png", f"{run}/b.png")
    folder.files("photos/images/d.png", f"{run}/progress.json", f"{run}/run.log")
    expansion = Expansion(folder.manifest({"images": images, "prompts": ["x"]}))
    assert [source.name for source, _ in expansion] == ["photos/a.png", "photos/images/d.png", f"{run}/b.png"]
    (warning,) = expansion.warnings
    assert "another manifest's runs wrote is left out (2, first: 'old/out/images')" in warning
    assert folder.names({"images": f"{run}/images", "prompts": ["x"]}) == [f"{run}/images/a--x-0123456789.png"]


def test_the_results_of_another_manifest_in_the_folder_of_its_pictures_are_no_prompts(folder: Folder) -> None:
    folder.files("photos/a.png", "photos/progress.json", "photos/run.log")
    folder.files("photos/metadata.jsonl", text='{"file_name": "images/a--x-0123456789.png", "prompt": "x", "key": "k"}')
    folder.files("photos/a.txt", text="a cat")
    assert prompts_of(folder.expand({"images": "photos"})) == {"photos/a.png": ["a cat"]}
