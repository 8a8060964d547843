"""Leftovers: results in an output folder that its manifest does not ask for any more, since a prompt or a picture left it.

A row of `metadata.jsonl` is known by what it says it was made with, since its key holds the pixels of every picture, which would
all have to be read, and the dtype, and a result of another dtype is asked for no less. Only where that does not fit, the key is
looked for: the manifest may call the picture by another path now, and earlier versions said less in their rows. The result of a
picture that was since replaced under its name is no leftover.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from pnp_batch.failures import FAILED
from pnp_batch.inputs import PRODUCTS
from pnp_batch.manifest import Settings
from pnp_batch.plan import Job, Plan
from pnp_batch.stages import videos
from pnp_batch.stages.outputs import SHORT_KEY, Outputs
from pnp_batch.stages.translate import settings_of
from pnp_batch.stages.work import Context, Item, items_of
from pnp_batch.store.keys import canonical_json

Row = Mapping[str, Any]

# What a row says it was made with; of a video also what decides its frames and its file.
OF_VIDEO = ("start", "stride", "container", "crf", "side_by_side")
TELLING = ("source", "prompt", "fingerprint", "generate", "frames", *Settings.model_fields, *OF_VIDEO)


@dataclass(frozen=True)
class Wanted:
    """What a manifest asks for, whatever of it is there.

    Attributes:
        results: What `_identity` gives for the row of each result; None where everything is to stay.
        untold: Names of pictures and videos that cannot be read, so that it cannot be told what their rows would say.
        askers: The plans, each with its worker's context.
    """

    results: Set[int] | None
    untold: Set[str] = frozenset()
    askers: Sequence[tuple[Plan, Context]] = ()
    _keys: dict[str, Set[int]] = field(default_factory=dict)  # hashes of results' keys by dtype, once a row needs them

    def lacks(self, row: Row) -> bool:
        """Whether a row is a leftover; a row that this program did not write is none."""
        if self.results is None or not _is_own(row) or row["source"] in self.untold or _identity(row) in self.results:
            return False
        return row["file_name"] in self._told or hash(row["key"]) not in self._keys_in(row["dtype"])

    def leftovers(self, outputs: Outputs) -> int:
        """How many rows of an output folder are leftovers."""
        return 0 if self.results is None else sum(map(self.lacks, outputs.rows()))

    def __or__(self, other: Wanted) -> Wanted:
        """What either of two manifests asks for."""
        if self.results is None or other.results is None:
            return EVERYTHING
        return Wanted(self.results | other.results, self.untold | other.untold, (*self.askers, *other.askers))

    @cached_property
    def _told(self) -> Set[str]:
        """Files with a row that says what is asked for: what other rows say of them is not asked for, too."""
        rows = (row for _, context in self.askers[:1] for row in context.outputs.rows())
        return {row["file_name"] for row in rows if _is_own(row) and _identity(row) in (self.results or ())}

    def _keys_in(self, dtype: str) -> Set[int]:
        if dtype not in self._keys:
            askers = ((plan, replace(context, dtype=dtype)) for plan, context in self.askers)
            self._keys[dtype] = {hash(key) for plan, context in askers for key in _keys(plan, context)}
        return self._keys[dtype]


EVERYTHING = Wanted(None)


def wanted(plan: Plan, context: Context) -> Wanted:
    """What the manifest of a plan asks for, whatever part of it the plan is limited to.

    Raises:
        ManifestError: Something became wrong since the manifest was checked.
    """
    if os.path.realpath(plan.manifest.path) == os.path.realpath(plan.manifest.output / FAILED):
        return EVERYTHING  # it holds just what failed of another manifest
    results: set[int] = set()
    untold: set[str] = set()
    plan = replace(plan, limit=None, only=None)
    for job in plan.jobs():
        if job.size is None:
            untold.add(job.source.name)
        elif job.place == 0:  # of a video, any frame tells
            retries = () if job.window else plan.retries(job.source, job.translations)
            results.update(_identity(row) for each in (job, *retries) for row in _rows(each, context))
    return Wanted(results, untold, [(plan, context)])


def remove(outputs: Outputs, wanted: Wanted) -> None:
    """Removes leftovers: files first, so that what is left of them when this is interrupted is known by its row."""
    names = {row["file_name"] for row in outputs.rows() if wanted.lacks(row)}
    names.difference_update(row.get("file_name") for row in outputs.rows() if not wanted.lacks(row))
    for name in names:
        outputs.remove(name)
    outputs.remove_rows(wanted.lacks)


def _rows(job: Job, context: Context) -> list[Row]:
    """The rows of a job's results, as far as they are compared."""
    common: dict[str, Any] = {"source": job.source.name, "fingerprint": context.fingerprint}
    if job.window is not None:
        spec = job.window.clip.spec
        common |= {name: getattr(spec, name) for name in OF_VIDEO} | {"frames": len(job.window.clip.numbers)}
    return [common | {"prompt": unit.translation.prompt} | settings_of(unit) for unit in Item(job, context).units]


def _keys(plan: Plan, context: Context) -> Iterator[str]:
    """The keys of a plan's results, as far as they can be told without decoding a picture."""
    for package in plan.packages():
        items = items_of(package.jobs, context)
        if package.jobs[0].window is not None:
            yield from videos.keys_of(context, items)
            continue
        retries = (Item(each, context) for job in package.jobs for each in plan.retries(job.source, job.translations))
        yield from (unit.key for item in (*items, *retries) if item.knows_key() for unit in item.units)


def _identity(row: Row) -> int:
    told = {name: row[name] for name in TELLING if row.get(name) is not None}
    if told.get("inversion_method") == "ddim":
        told.pop("inversion_tolerance", None)  # it means nothing there, and is in no key either
    return hash(canonical_json(told))


def _is_own(row: Row) -> bool:
    """Whether this program wrote a row and the file that it names; others may keep rows of their own in the same file."""
    name, key = PurePosixPath(str(row.get("file_name"))), str(row.get("key"))
    is_below = name.parts[:1] in {(product,) for product in PRODUCTS} and ".." not in name.parts
    is_named_so = re.search(rf"--.+-{re.escape(key[:SHORT_KEY])}(\.\w+)?$", name.name) is not None
    return is_below and is_named_so and re.fullmatch("[0-9a-f]{64}", key) is not None
