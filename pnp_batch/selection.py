"""Picking single results out of a plan: by source, prompt or key, as the report's re-run commands do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from pnp_batch.errors import ItemError, ManifestError, Problem
from pnp_batch.names import meant
from pnp_batch.plan import Plan, unit_id
from pnp_batch.runner import Worker
from pnp_batch.stages.work import Item, Unit

Match = Callable[[Unit], bool]


def selected(
    plan: Plan, worker: Worker, source: str | None = None, prompt: str | None = None, key: str | None = None
) -> frozenset[str]:
    """Ids of the results that are meant.

    Args:
        plan: Where to look.
        worker: Tells keys, which reads every picture once whose digest is not known yet.
        source: Name of a guidance image, as in `metadata.jsonl`, or the end of its path.
        prompt: A whole prompt.
        key: Beginning of a result's key, such as the end of its file name.

    Raises:
        ManifestError: There is none, or the source may be any of several.
    """
    if key is not None and not re.fullmatch("[0-9a-fA-F]{4,64}", key):
        what = f"the beginning of a key is four or more of the digits 0-9 and a-f, not '{key}'"
        raise ManifestError([Problem("command line", None, "--key", what)])
    matches: dict[str, Match] = {}
    if source is not None:
        source = meant(source, {job.source.name for job in plan.jobs()}, "--source") or source
        matches["--source"] = lambda unit: unit.item.job.source.name == source
    if prompt is not None:
        matches["--prompt"] = lambda unit: unit.translation.prompt == prompt
    if key is not None:
        matches["--key"] = lambda unit: _has_key(unit, key.lower())
    units = (unit for job in plan.jobs() for unit in Item(job, worker.context).units)
    found = frozenset(
        unit_id(unit.item.job.source, unit.translation) for unit in units if all(m(unit) for m in matches.values())
    )
    if not found:
        raise ManifestError(list(_nothing(plan, source, prompt, key)))
    return found


def _has_key(unit: Unit, prefix: str) -> bool:
    """Whether the result at its own settings, or the one that the quality gate settled on, is called so."""
    try:
        return unit.key.startswith(prefix) or ((result := unit.result()) is not None and result.key.startswith(prefix))
    except ItemError:
        return False  # the picture cannot be read, so nothing of it has a key


def _nothing(plan: Plan, source: str | None, prompt: str | None, key: str | None) -> Iterable[Problem]:
    wanted = {"--source": source, "--prompt": prompt, "--key": key}
    given = {option: value for option, value in wanted.items() if value is not None}
    known = {
        "--source": {job.source.name for job in plan.jobs()},
        "--prompt": {translation.prompt for job in plan.jobs() for translation in job.translations},
    }
    for option, value in given.items():
        names = known.get(option)
        if names is not None and value not in names:
            near = difflib.get_close_matches(value, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield Problem("command line", None, option, f"this manifest has no '{value}'{hint}")
            return
    about = " and ".join(f"{option} '{value}'" for option, value in given.items())
    yield Problem("command line", None, "", f"no result of this manifest has {about}")
