"""`report.html`: every source with its reconstruction and its results, on one page that needs nothing else.

Prompts, file names and error messages are other people's text. Jinja escapes all of it, it stands in text and quoted
attributes only, and the page's Content-Security-Policy runs the one script whose digest it names and loads nothing.

The page is streamed: rows of text are held, pictures are not, so 2,000 results cost the memory of one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pnp_batch.errors import ItemError, disk_errors_named
from pnp_batch.evaluation.columns import better
from pnp_batch.manifest import Settings
from pnp_batch.names import counted, differences
from pnp_batch.plan import TRAJECTORY_SETTINGS
from pnp_batch.report.metrics import Metrics
from pnp_batch.report.plots import Dot, histograms, scatter
from pnp_batch.report.thumbnails import Thumbnail, Thumbnails, clip_of
from pnp_batch.stages.outputs import Outputs
from pnp_batch.stages.videos import PREVIEW_FRAMES
from pnp_batch.store import Artifact, ArtifactStore
from pnp_batch.store.artifacts import CorruptArtifact
from pnp_batch.store.files import temp_name

Row = Mapping[str, Any]

REPORT = "report.html"
MAX_RESULTS = 5_000  # about 100 MB; a browser does not enjoy more
WELL_DB, FAIRLY_DB = 1.0, 3.0  # below the VAE alone: 26% more squared error, twice the squared error
SHOWN_ELSEWHERE = (
    *("source", "prompt", "reconstruction_psnr", "frame_reconstruction_psnr"),
    *("quality", "quality_attempt", "quality_reason", "quality_figures"),
)
MAX_TRACEBACK = 20_000  # characters
TELLING = (*Settings.model_fields, "model", "dtype", "bank_compression")  # what results of one prompt may differ in
SHORT_KEY = 16  # of a key in a command: long enough to mean one result, short enough to read
CAPTION_KEY = 10  # of a key in a caption: as much as the file's name ends with
LONG_VALUE = 28  # characters


def write_report(
    manifest_name: str,
    outputs: Outputs,
    store: ArtifactStore,
    failures: Sequence[Row],
    is_leftover: Callable[[Row], bool] = lambda row: False,
) -> Path:
    """Writes `report.html` into the output folder, whole or not at all; the same inputs give the same bytes.

    Args:
        manifest_name: Path of the manifest: what the page is named after, and what its commands name.
        outputs: The run's folder: its rows and its pictures.
        store: Where the sources and their reconstructions are; what is missing there is said on the page.
        failures: Rows with `source`, `prompt`, `stage`, `error` and `traceback` (text, or the path of a file).
        is_leftover: Whether a row is that of a result which the manifest does not ask for any more.

    Returns:
        The path of the page.

    Raises:
        EnvironmentFailure: The disk is full or read-only.
    """
    stream = _template().stream(_page(manifest_name, outputs, store, failures, is_leftover))
    target = outputs.root / REPORT
    temporary = target.with_name(temp_name())
    with disk_errors_named(str(target)):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                # A file name that is not UTF-8 comes as lone surrogates, which UTF-8 cannot say.
                stream.dump(file, encoding="utf-8", errors="backslashreplace")
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return target


@dataclass(frozen=True)
class Verdict:
    """How well a source was inverted.

    Attributes:
        level: `good`, `fair`, `poor` or `none`.
        word: For the badge.
        reason: The figures behind it, as a sentence.
    """

    level: str
    word: str
    reason: str


def verdict(psnr: float | None, vae_psnr: float | None) -> Verdict:
    """Puts the reconstruction's PSNR into words.

    The VAE alone, encoding and decoding, is the best any inversion can reach; the inversion answers only for the rest.
    """
    if psnr is None:
        return Verdict("none", "Not inverted", "Nothing was inverted here, so there is no reconstruction.")
    if vae_psnr is None:
        return Verdict("none", "Reconstructed", f"Reconstruction {psnr:.1f} dB.")
    levels = (("good", "Inverted well", WELL_DB), ("fair", "Inverted fairly well", FAIRLY_DB))
    found = ((level, word) for level, word, limit in levels if vae_psnr - psnr <= limit)
    level, word = next(found, ("poor", "Inverted poorly"))
    return Verdict(level, word, f"Reconstruction {psnr:.1f} dB; the VAE alone, the best possible, {vae_psnr:.1f} dB.")


@dataclass(frozen=True)
class Guide:
    """The source and its reconstruction, or the reason why they cannot be shown."""

    source: Thumbnail | None = None
    reconstruction: Thumbnail | None = None
    missing: str = ""


@dataclass(frozen=True)
class Setting:
    """A name and a value in words; a long value gets a line of its own."""

    name: str
    value: str

    @property
    def is_long(self) -> bool:
        """Whether the value is wider than a column."""
        return len(self.value) > LONG_VALUE


@dataclass(frozen=True)
class Tile:
    """One result.

    Attributes:
        number: On the page, from 1.
        prompt: Its prompt.
        difference: In which settings it differs from the others of its source and prompt; empty where it is the only one.
        method: How it was made.
        href: Relative address of the full picture, empty where that is missing.
        picture: None where the picture is missing or cannot be read.
        settings: Everything else the row says, long values last.
        entry: The result as an entry for the `prompts:` of a manifest.
        command: What makes just this result again.
        figures: Its metrics by column.
        quality: The gate's word, empty where there was no gate.
        attempt: 0 for its own settings, else which retry of the gate.
        reason: Why it is flagged or not judged.
        is_leftover: Whether it is no longer in the manifest.
    """

    number: int
    prompt: str
    difference: str
    method: str
    href: str
    picture: Thumbnail | None
    settings: list[Setting]
    entry: str
    command: str
    figures: dict[str, float]
    quality: str
    attempt: int
    reason: str
    is_leftover: bool

    @property
    def name(self) -> str:
        """What it is called where it stands alone."""
        return _called(self.prompt, self.difference)


@dataclass(frozen=True)
class Card:
    """One source with its results; `tiles` makes one after the other."""

    number: int
    source: str
    about: str
    psnr: float | None
    verdict: Verdict
    guide: Guide
    failures: int
    count: int
    tiles: Iterator[Tile]


def _page(
    manifest_name: str,
    outputs: Outputs,
    store: ArtifactStore,
    failures: Sequence[Row],
    is_leftover: Callable[[Row], bool],
) -> dict[str, Any]:
    rows = outputs.rows()
    groups = _grouped(islice(rows, MAX_RESULTS), store)
    left_out = sum(1 for _ in rows)
    shown = [row for group in groups.values() for row in group]
    failed = Counter(str(row.get("source")) for row in failures)
    script = _asset("report.js")
    metrics = Metrics(outputs.root)
    apart = _told_apart(shown)
    dots = list(_dots(shown, apart, metrics))
    columns = list(dict.fromkeys(column for dot in dots for column in dot.figures))
    thumbnails = Thumbnails(store)
    tiles = Tiles(outputs.root, thumbnails, metrics, manifest_name, apart, is_leftover)
    thumbnails.make(file for row in shown if (file := _file(row, outputs.root)) and file.suffix == ".png")
    return {
        "title": Path(manifest_name).name,
        "columns": {column: better(column) for column in columns},
        "qualities": Counter(dot.quality for dot in dots if dot.quality),
        "histograms": histograms(dots, columns),
        "scatter": scatter(dots, columns),
        "number": _short,
        "results": len(shown) + left_out,
        "leftovers": sum(map(is_leftover, shown)),
        "left_out": left_out,
        "sources": len({source for source, _ in groups} | set(failed)),
        "models": list(dict.fromkeys(str(row["model"]) for row in shown if row.get("model"))),
        "verdicts": Counter(_verdict_of(group).level for group in groups.values()),
        "cards": _cards(groups, store, failed, tiles),
        "failures": [_failure(row, outputs.root, manifest_name) for row in failures],
        "style": _asset("report.css"),
        "script": script,
        "script_digest": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


Groups = dict[tuple[str, str | None], list[Row]]


def _grouped(rows: Iterable[Row], store: ArtifactStore) -> Groups:
    """Rows by source and trajectory: the same file at other inversion settings has another reconstruction."""
    groups: Groups = {}
    for row in rows:
        video = _video(row, store)
        artifact = store.find("translate", video.meta["frames"][0] if video else str(row.get("key")))
        trajectory = artifact.meta.get("trajectory") if artifact else None
        groups.setdefault((str(row.get("source")), trajectory), []).append(row)
    return groups


def _video(row: Row, store: ArtifactStore) -> Artifact | None:
    """The artifact of a row that is a video."""
    return store.find("assemble", str(row.get("key"))) if str(row.get("file_name")).startswith("videos/") else None


def _told_apart(rows: Sequence[Row]) -> list[str]:
    """For each row the settings in which it differs from the others of its source and prompt, on whichever card they are.

    Where settings say nothing, as for another container of a video or other weights of the model, the key does.
    """
    names = [(row.get("source"), row.get("prompt")) for row in rows]
    settings = [{name: _in_caption(row[name]) for name in TELLING if name in row} for row in rows]
    words = differences(names, settings)
    keys = differences(
        list(zip(names, words, strict=True)), [{"key": str(row.get("key"))[:CAPTION_KEY]} for row in rows]
    )
    return [", ".join(filter(None, both)) for both in zip(words, keys, strict=True)]


def _in_caption(value: Any) -> str:
    """A value among others: a list keeps its brackets, and an empty one stays empty."""
    words = _worded(value) if value not in (None, "") else ""
    return f"[{words}]" if isinstance(value, list) else words


def _called(prompt: str, difference: str) -> str:
    return f"{prompt} ({difference})" if difference else prompt


def _dots(rows: Sequence[Row], apart: Sequence[str], metrics: Metrics) -> Iterator[Dot]:
    """Every result as the plots see it, in the order of the tiles."""
    for number, (row, difference) in enumerate(zip(rows, apart, strict=True), 1):
        name = _called(str(row.get("prompt")), difference)
        yield Dot(number, f"{name} ({row.get('source')})", str(row.get("quality") or ""), metrics.of(row))


def _file(row: Row, root: Path) -> Path | None:
    try:
        return _inside(root, str(row.get("file_name")))
    except ItemError:
        return None


def _cards(groups: Groups, store: ArtifactStore, failed: Counter[str], tiles: Tiles) -> Iterator[Card]:
    first = 1
    inverted = [{name: rows[0][name] for name in TRAJECTORY_SETTINGS if name in rows[0]} for rows in groups.values()]
    apart = differences([source for source, _ in groups], inverted)
    for number, (((source, trajectory), rows), own) in enumerate(zip(groups.items(), apart, strict=True), 1):
        yield Card(
            number=number,
            source=source,
            about=" · ".join(filter(None, (_about(rows[0]), own))),
            psnr=rows[0].get("reconstruction_psnr"),
            verdict=_verdict_of(rows),
            guide=_guide_of(rows[0], trajectory, store, tiles.thumbnails),
            failures=failed.pop(source, 0),  # said once, on the first card of the source
            count=len(rows),
            tiles=tiles.of(rows, first),
        )
        first += len(rows)


def _verdict_of(rows: Sequence[Row]) -> Verdict:
    return verdict(rows[0].get("reconstruction_psnr"), rows[0].get("vae_psnr"))


def _about(row: Row) -> str:
    size = f"{row['width']} \N{MULTIPLICATION SIGN} {row['height']}" if row.get("width") and row.get("height") else ""
    inverted_by = (
        f"inverted by {row['inverted_by']} in {row['inversion_rows']:.4g} UNet rows" if row.get("inverted_by") else ""
    )
    length = (
        f"{counted(row['frames'], 'frame')}, {row['duration']:.4g} s"
        if row.get("frames") and row.get("duration")
        else ""
    )
    part = f"the first {PREVIEW_FRAMES} frames are shown" if row.get("frames", 0) > PREVIEW_FRAMES else ""
    return " · ".join(filter(None, (size, length, part, inverted_by)))


def _guide_of(row: Row, trajectory: str | None, store: ArtifactStore, thumbnails: Thumbnails) -> Guide:
    video = _video(row, store)
    if video is None:
        return _guide(store, thumbnails, trajectory, row.get("reconstruction_psnr") is not None)
    source, reconstruction = (_played(video, store, name) for name in ("source", "reconstruction"))
    return Guide(source, reconstruction, "" if source else "The store no longer holds what this was made from.")


def _played(video: Artifact, store: ArtifactStore, name: str) -> Thumbnail | None:
    """A clip out of a video's previews; None where it was not kept or is damaged."""
    try:
        return clip_of(store.load(video, "preview")[name].tobytes())
    except (CorruptArtifact, KeyError, OSError):
        return None


def _guide(store: ArtifactStore, thumbnails: Thumbnails, trajectory: str | None, is_inverted: bool) -> Guide:
    if trajectory is None:
        return Guide(
            missing="The store no longer holds what this was made from, so source and reconstruction cannot be shown."
        )
    artifact = store.find("invert", trajectory)
    if artifact is None:
        return Guide(missing="The store no longer holds the inversion, so source and reconstruction cannot be shown.")
    try:
        source = thumbnails.of_preview(artifact, "source")
        reconstruction = thumbnails.of_preview(artifact, "reconstruction") if is_inverted else None
    except CorruptArtifact:
        return Guide(missing="The stored inversion is damaged, so source and reconstruction cannot be shown.")
    return Guide(source, reconstruction)


@dataclass(frozen=True)
class Tiles:
    """Makes tiles of rows.

    Attributes:
        root: The output folder.
        thumbnails: Of the pictures.
        metrics: Of the results.
        manifest: What commands call the manifest.
        apart: What tells each result from its twins, in the order of the page.
        is_leftover: Whether a result is no longer in the manifest.
    """

    root: Path
    thumbnails: Thumbnails
    metrics: Metrics
    manifest: str
    apart: Sequence[str]
    is_leftover: Callable[[Row], bool]

    def of(self, rows: Sequence[Row], first: int) -> Iterator[Tile]:
        """The tiles of some rows, numbered from `first`, one after the other."""
        return (self._tile(row, number) for number, row in enumerate(rows, first))

    def _tile(self, row: Row, number: int) -> Tile:
        name = str(row.get("file_name"))
        picture = self._picture(row)
        settings = [Setting(key, _value(row, key)) for key in row if key not in SHOWN_ELSEWHERE]
        return Tile(
            number=number,
            prompt=str(row.get("prompt")),
            difference=self.apart[number - 1],
            method=str(row.get("method") or ""),
            href=_href(name) if picture else "",
            picture=picture,
            settings=sorted(settings, key=lambda setting: setting.is_long),
            entry=_entry(row),
            command=self._again(row),
            figures=self.metrics.of(row),
            quality=str(row.get("quality") or ""),
            attempt=int(row.get("quality_attempt") or 0),
            reason=str(row.get("quality_reason") or ""),
            is_leftover=self.is_leftover(row),
        )

    def _again(self, row: Row) -> str:
        """A video is made of many results, so its key is none of theirs."""
        if _video(row, self.thumbnails.store) is not None:
            return _command(self.manifest, "--source", str(row.get("source")), "--prompt", str(row.get("prompt")))
        return _command(self.manifest, "--key", str(row.get("key"))[:SHORT_KEY])

    def _picture(self, row: Row) -> Thumbnail | None:
        video = _video(row, self.thumbnails.store)
        if video is not None:
            return _played(video, self.thumbnails.store, "result")
        file = _file(row, self.root)
        return self.thumbnails.of_file(file) if file else None


def _command(manifest: str, *options: str) -> str:
    return shlex.join(["pnp-batch", "run", manifest, *options])


def _short(value: float) -> str:
    """A figure with four digits that count."""
    return f"{value:.4g}"


def _inside(root: Path, name: str) -> Path:
    """A file of the output folder.

    Raises:
        ItemError: The name leads out of the folder.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ItemError(f"{name} is outside {root}")
    return root / path


def _href(name: str) -> str:
    """A file of the output folder as a relative address."""
    return f"./{quote(name, errors='surrogateescape')}"


def _entry(row: Row) -> str:
    """JSON in one line, which YAML reads as well."""
    names = ("prompt", *Settings.model_fields)
    return "- " + json.dumps({name: row[name] for name in names if row.get(name) is not None}, ensure_ascii=False)


def _value(row: Row, key: str) -> str:
    """A value of a row in words."""
    if key == "inversion_converged" and row[key] is None:  # rows say it of a solver that found nothing only
        return "yes" if row.get("inverted_by") == "fixed-point" else "does not apply"
    return _worded(row[key])


def _worded(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_worded(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_worded, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None or value == "" else str(value)


def _failure(row: Row, root: Path, manifest: str) -> dict[str, str]:
    names = ("source", "prompt", "stage", "error", "traceback")
    values = {name: "" if row.get(name) is None else str(row[name]) for name in names}
    command = _command(manifest, "--source", values["source"], "--prompt", values["prompt"])
    return values | {"traceback": _traceback(root, values["traceback"]), "command": command}


def _traceback(root: Path, written: str) -> str:
    """The traceback itself, out of the file where it stands in one; else what was written."""
    try:
        text = _inside(root, written).read_text(encoding="utf-8", errors="replace") if "\n" not in written else written
    except (ItemError, OSError, ValueError):
        return written
    return text if len(text) <= MAX_TRACEBACK else f"...\n{text[-MAX_TRACEBACK:]}"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("pnp_batch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")


@cache
def _asset(name: str) -> Markup:
    """Our own style sheet or script, which goes into the page as it is."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))
