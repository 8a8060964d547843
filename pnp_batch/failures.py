"""What failed: `failures.jsonl`, a traceback file for each, and `failed.yaml`, a manifest of just those items."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pnp_batch.errors import disk_errors_named
from pnp_batch.inputs import Source, Translation
from pnp_batch.manifest import METHODS_OF, Manifest, QualitySpec, Settings
from pnp_batch.plan import Package, unit_id
from pnp_batch.stages.outputs import append_line, line_of
from pnp_batch.stages.work import Outcome
from pnp_batch.store.files import write_atomic

Row = Mapping[str, Any]

FAILED = "failed.yaml"


class FailureList:
    """The failed results of an output folder. A failure stays listed until its result is there or it fails anew."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.root = manifest.output
        self.path = self.root / "failures.jsonl"
        self.rows: dict[str, Row] = {row["id"]: row for row in _read(self.path) if "id" in row}
        self._fresh: set[str] = set()

    def settle(self, package: Package, outcomes: Iterable[Outcome]) -> list[Row]:
        """Takes note of how results of a package ended; gives the rows of the failed ones."""
        units = {unit_id(job.source, each): (job.source, each) for job in package.jobs for each in job.translations}
        failed = []
        for outcome in outcomes:
            source, translation = units[outcome.id]
            if outcome.error is None and not outcome.done:
                continue  # a later stage is to come, or a later window of a video, and it may have failed there before
            self.rows.pop(outcome.id, None)
            if outcome.error is not None:
                if outcome.id in self._fresh:
                    continue  # said already
                self.rows[outcome.id] = row = self._row(source, translation, outcome)
                self._fresh.add(outcome.id)
                append_line(self.path, row)  # at once, for `status` and for a run that is killed
                failed.append(row)
        return failed

    def finish(self, whole_plan: bool) -> None:
        """Writes both files anew, or removes them where nothing failed.

        Args:
            whole_plan: Whether the run went through everything the manifest names; then what it did not meet is history.
        """
        if whole_plan:
            self.rows = {name: row for name, row in self.rows.items() if name in self._fresh}
        for old in {*self.root.glob("tracebacks/*.txt")} - {self.root / row["traceback"] for row in self.rows.values()}:
            old.unlink(missing_ok=True)
        if not self.rows:
            self.path.unlink(missing_ok=True)
            (self.root / FAILED).unlink(missing_ok=True)
            return
        with disk_errors_named(str(self.path)):
            write_atomic(self.path, b"".join(map(line_of, self.rows.values())))
            write_atomic(self.root / FAILED, self._as_manifest())

    def _row(self, source: Source, translation: Translation, outcome: Outcome) -> Row:
        place = Path("tracebacks") / f"{outcome.id[:16]}.txt"
        with disk_errors_named(str(self.root / place)):
            write_atomic(self.root / place, outcome.traceback.encode(errors="backslashreplace"))
        return {
            "source": source.name,
            "prompt": translation.prompt,
            "stage": outcome.stage,
            "error": outcome.error,
            "traceback": place.as_posix(),
            "id": outcome.id,
            "input": _as_input(source, translation, self.manifest.defaults),
        }

    def _as_manifest(self) -> str:
        """Paths stay as the manifest has them, since a picture is called by its path: its rows are to stay one row."""
        manifest, run = self.manifest, self.manifest.run.model_dump(mode="json", exclude_unset=True)
        model = {name: getattr(manifest, name) for name in ("model", "revision", "variant", "config")}
        content = {
            "version": 1,
            "base_dir": os.path.relpath(manifest.base, self.root),
            **{name: value for name, value in model.items() if value is not None},
            "output_dir": manifest.output_dir,
            "defaults": _plain(self._defaults_in_use()),
            "inputs": _merged([row["input"] for row in self.rows.values()]),
            **({"run": run} if run else {}),
        }
        if manifest.quality:
            content["evaluation"] = _plain(manifest.evaluation.given())
            content["quality"] = _given(manifest.quality)
        return yaml.safe_dump(content, sort_keys=False)

    def _defaults_in_use(self) -> dict[str, Any]:
        """The manifest's defaults without those that mean nothing to what failed: a manifest with them would be refused."""
        own = self.manifest.defaults.method
        methods = {prompt.get("method", own) for row in self.rows.values() for prompt in row["input"]["prompts"]}
        given = self.manifest.defaults.given()
        return {name: value for name, value in given.items() if methods & {*METHODS_OF.get(name, methods)}}


def _read(path: Path) -> list[Row]:
    """All whole rows; the last row of an item wins."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(
            ValueError
        ):  # a kill may tear a line, also within a letter; its item fails anew or is done by now
            rows.append(json.loads(line.decode()))
    return rows


def _as_input(source: Source, translation: Translation, defaults: Settings) -> dict[str, Any]:
    """A manifest input for one failed result, with its name in the manifest and the same output names."""
    changed = {
        k: getattr(translation.settings, k)
        for k in translation.settings.meaningful()
        if _differs(k, translation.settings, defaults)
    }
    prompts = [_plain({"prompt": translation.prompt, **changed})]
    if source.generate:
        return {"generate": source.generate.given(), "prompts": prompts}
    assert source.path is not None
    if source.video is not None:
        return {"video": source.name, **source.video.given(), "missing": "fail", "prompts": prompts}
    tree = source.stem.with_name(source.path.name)
    root = PurePosixPath(source.name).parents[len(tree.parts) - 1]
    return {"images": [str(tree)], "root": str(root), "missing": "fail", "prompts": prompts}


def _differs(key: str, settings: Settings, defaults: Settings) -> bool:
    return bool(getattr(settings, key) != getattr(defaults, key))


def _merged(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Inputs of one source become one input with several prompts."""
    merged: dict[str, dict[str, Any]] = {}
    for each in inputs:
        name = json.dumps({k: v for k, v in each.items() if k != "prompts"}, sort_keys=True)
        merged.setdefault(name, {**each, "prompts": []})["prompts"].extend(each["prompts"])
    return list(merged.values())


def _given(quality: QualitySpec) -> dict[str, Any]:
    return quality.given() | {"retry": [_plain(each.given()) for each in quality.retry]}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tuples as lists: YAML's safe dumper knows no tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
