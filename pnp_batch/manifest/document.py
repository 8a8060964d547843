"""The YAML document: read with care, and kept as nodes, so that every problem has its line."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pnp_batch.errors import ManifestError, Problem
from pnp_batch.manifest.keys import GENERATE_ALIASES, INPUT_ALIASES, QUALITY_ALIASES, TOP_ALIASES

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # a PyYAML built without libyaml
    from yaml import SafeLoader  # type: ignore[assignment]

Loc = tuple[int | str, ...]

MAX_ALIASED = 1_000_000  # values that aliases may add: a few lines of YAML can otherwise stand for gigabytes
MAX_DEPTH = 100  # PyYAML composes nested values by recursion in C, so thousands of brackets crash the process


def read_text(path: Path) -> str:
    """The text of a file; what is wrong with it is a problem of the manifest."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ManifestError([Problem(str(path), None, "", f"no such file{near_file(path)}")]) from None
    except IsADirectoryError:
        raise ManifestError([Problem(str(path), None, "", "is a folder; name the YAML file")]) from None
    except UnicodeDecodeError as error:
        raise ManifestError([Problem(str(path), None, "", f"is not UTF-8 text: {error}")]) from None
    except (OSError, ValueError) as error:
        raise ManifestError([Problem(str(path), None, "", f"cannot be read: {error}")]) from None


def near_file(path: Path) -> str:
    """`; did you mean ...?` with the file beside a missing one that has the nearest name, or nothing."""
    try:
        names = os.listdir(path.absolute().parent)  # noqa: PTH208 - names are all that is needed
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Loader(SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; PyYAML lets whatever goes wrong in reading one (`!!bool maybe`, 2001-99-99) escape as it is."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            kind = node.tag.rpartition(":")[2]
            message = f"this cannot be read as a YAML {kind}; put it in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from error


def parse_yaml(path: Path, text: str) -> tuple[yaml.Node, Any]:
    """Composes and constructs the document; the node tree is kept for line numbers."""
    try:
        _check_depth(path, text)
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            raise ManifestError([Problem(str(path), 1, "", "the file is empty")])
        if problems := list(_tree_problems(path, root)):
            raise ManifestError(problems)
        return root, loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise ManifestError([Problem(str(path), line, "", f"not valid YAML: {error.problem or error}")]) from None
    except yaml.reader.ReaderError as error:
        line = text.partition(chr(error.character))[0].count("\n") + 1
        message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise ManifestError([Problem(str(path), line, "", message)]) from None


def _check_depth(path: Path, text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else None
            raise ManifestError([Problem(str(path), line, "", f"nested deeper than {MAX_DEPTH} levels")])


def _tree_problems(path: Path, root: yaml.Node) -> Iterator[Problem]:
    nodes = list(_nodes(root))
    if _expanded_size(root) > len(nodes) + MAX_ALIASED:
        yield Problem(str(path), 1, "", f"aliases stand for more than {MAX_ALIASED:,} values, or one contains itself")
    for node in nodes:
        if isinstance(node, yaml.MappingNode):
            yield from _duplicate_keys(path, node)


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, however often it is aliased."""
    stack, seen = [root], {id(root)}
    while stack:
        node = stack.pop()
        yield node
        new = [child for child in _children(node) if id(child) not in seen]
        seen.update(map(id, new))
        stack.extend(new)


def _expanded_size(root: yaml.Node) -> float:
    """Number of values the document stands for once aliases are expanded; infinite for one that contains itself."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # met again before it is known: it contains itself
            sizes[id(node)] = 1 + sum(map(size, _children(node)))
        return sizes[id(node)]

    return size(root)


def _children(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return (part for entry in node.value for part in entry)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _duplicate_keys(path: Path, node: yaml.MappingNode) -> Iterator[Problem]:
    """YAML lets the last of two equal keys win silently; a person never means that."""
    seen = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen and key.value != "<<":
            yield Problem(str(path), key.start_mark.line + 1, key.value, "this key is given twice")
        seen.add(key.value)


def _same_key(written: str, wanted: int | str) -> bool:
    if written == wanted or (written == "prompts" and wanted == "prompts_file"):
        return True
    tables = (TOP_ALIASES, INPUT_ALIASES, GENERATE_ALIASES, QUALITY_ALIASES)
    return any(table.get(written) == wanted for table in tables)


def node_at(root: yaml.Node | None, loc: Loc) -> tuple[int | None, int]:
    """Walks the node tree along `loc` as far as it goes: the 1-based line reached, and how many steps were taken."""
    node, line = root, root.start_mark.line + 1 if root is not None else None
    for depth, part in enumerate(loc):
        if isinstance(node, yaml.MappingNode) and (found := _entry(node, part)):
            node, line = found[1], found[0].start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif part != 0 or isinstance(node, yaml.SequenceNode):  # one prompt may stand for a list of one
            return line, depth
    return line, len(loc)


def _entry(node: yaml.MappingNode, part: int | str) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and value of a mapping that `part` means. Merged entries (`<<`) come before its own, which win."""
    entries = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    exact = [entry for entry in entries if entry[0].value == str(part)]
    return next(reversed(exact or [entry for entry in entries if _same_key(entry[0].value, part)]), None)


def problem_at(path: Path, root: yaml.Node | None, loc: Loc, message: str) -> Problem:
    """A problem with the value at `loc`, with its line."""
    return Problem(str(path), node_at(root, loc)[0], ".".join(map(str, loc)), message)
