"""Python files of a model folder: which of them a loader would run, told by the configs that name them and by what those
files import. They are read as text, never imported; what is copied is copied as bytes.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import CheckpointError, listing, show
from .checkpoint import Checkpoint
from .files import absent, read_bytes
from .folder import SideFile, side_files

_LARGEST_CONFIG = 16 << 20  # bytes
_LARGEST_MODULE = 4 << 20
_OTHER_REPOSITORY = "--"  # in org/name--module.Class
_LOOKS_RELATIVE = re.compile(r"^\s*(?:from|import)\s+\.([\w.]+)", re.MULTILINE)  # what transformers takes for an import
_FOUND_BY_NAME = "custom_generate/"  # a folder whose code transformers looks for without a config that says so


@dataclass(frozen=True)
class ModelCode:
    """Code of the base. `files` come along, `left` do not (`--no-code`); `broken` is what does not load without them."""

    files: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.left:
            without = f"; without it {listing(self.broken)} cannot be loaded from the output" if self.broken else ""
            return f"left out: {listing(self.left)}{without}"
        return f"that came with the base: {listing(self.files)}; loaders run it with trust_remote_code" if self.files else ""


class _Reference(NamedTuple):
    """A class that a config names: for `what` (AutoModel, a module of a pipeline), in one of the files `places`."""

    config: str
    what: str
    places: tuple[str, ...]
    repository: str = ""
    optional: bool = False  # it may be of an installed library


def along(
    base: Checkpoint | None, out_dtype: str | None, changes: Mapping[str, Any], keep: bool
) -> tuple[list[SideFile], ModelCode, list[str]]:
    """Which side files of a base come along, what code is among them, and notes. `keep`: whether code may come along; the
    rest as in `side_files`.

    Raises CheckpointError for a config that names code outside of its folder.
    """
    if base is None:
        return [], ModelCode(), []
    side, notes = side_files(base, out_dtype, changes)
    chosen, code, more = _choose(side, keep)
    return chosen, code, notes + more


def _choose(side: Iterable[SideFile], keep: bool) -> tuple[list[SideFile], ModelCode, list[str]]:
    held = {file.name: file.source for file in side}
    python = [name for name in held if name.lower().endswith(".py")]
    references = list(_references(held, bool(python)))
    notes = list(_notes(references, held))
    if not keep:
        local = (reference for reference in references if any(place in held for place in reference.places))
        broken = tuple(dict.fromkeys(reference.what for reference in local))
        return [file for file in side if file.name not in python], ModelCode((), tuple(python), broken), notes
    named = _needed(references, held, python)
    unnamed = [name for name in python if name not in named]
    if unnamed:
        notes.append(f"not copied, being code that no config of the model names: {listing(unnamed)}")
    return [file for file in side if file.name not in unnamed], ModelCode(tuple(named)), notes


def _notes(references: Iterable[_Reference], held: Collection[str]) -> Iterator[str]:
    for config, what, places, repository, optional in dict.fromkeys(references):
        if repository:
            yield f"{show(config)}: {show(what)} is code of {show(repository)}, not copied: loaders fetch it from there"
        elif places and not optional and not any(place in held for place in places):
            yield f"{show(config)}: {show(what)} is in {show(places[0])}, which the base does not have"


def _needed(references: Iterable[_Reference], held: dict[str, Path], python: Collection[str]) -> list[str]:
    """The files that are named, and what they import of the folder, and so on; in the order of the names."""
    waiting = [place for reference in references for place in reference.places if place in held]
    waiting += [name for name in python if name.startswith(_FOUND_BY_NAME)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other in _imported(name, held[name], python) if other not in found]
    return [name for name in python if name in found]


def _imported(name: str, source: Path, python: Collection[str]) -> Iterator[str]:
    """The Python files of the folder that one of them imports, wherever in it; all beside it if it is no Python to us."""
    here = PurePosixPath(name).parent
    try:
        text = read_bytes(source, _LARGEST_MODULE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser thinks of the model's strings is not for our user
            tree = ast.parse(text)
    except (CheckpointError, SyntaxError, ValueError, RecursionError, MemoryError):
        yield from (other for other in python if PurePosixPath(other).parent == here)
        return
    modules = [module for node in ast.walk(tree) for module in _modules(node, here)]
    modules += [str(here / module) for module in _LOOKS_RELATIVE.findall(text.decode("utf-8", "replace"))]  # in strings too
    for module in modules:
        parts = PurePosixPath(module)
        inits = (str(folder / "__init__.py") for folder in (parts, *parts.parents))
        yield from (other for other in (f"{module}.py", *inits) if other in python)


def _modules(node: ast.AST, here: PurePosixPath) -> Iterator[str]:
    """What an import statement may mean, as paths below the folder without their ending."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from (str(place / alias.name.replace(".", "/")) for place in (here, PurePosixPath()))
    elif isinstance(node, ast.ImportFrom):
        above = [here, *here.parents]
        places = above[node.level - 1 : node.level] if node.level else [here, PurePosixPath()]
        for place in places:
            module = place / (node.module or "").replace(".", "/")
            yield from (str(module), *(str(module / alias.name) for alias in node.names))


def _references(held: dict[str, Path], any_code: bool) -> Iterator[_Reference]:
    for name, source in held.items():
        folder, _, last = name.rpartition("/")
        if not any_code and last != "config.json" and absent(source) is not None:
            continue  # not worth a request: there is nothing that it could name
        if last == "config.json" or last.endswith("_config.json"):
            for what, value in _auto_maps(_read(source)):
                yield from _classes(name, folder, what, value)
        elif name == "modules.json":  # sentence-transformers
            for module in _listed(_read(source)):
                yield from _classes(name, str(module.get("path") or ""), str(module.get("type")), module.get("type"), True)
        elif name == "model_index.json":  # diffusers: [module, class]
            for what, value in _items(_read(source)):
                if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
                    yield from _classes(name, what, what, f"{value[0]}.", True)


def _read(source: Path) -> Any:
    """What a config says; nothing, if it cannot be read: then loaders find nothing in it either."""
    try:
        return json.loads(read_bytes(source, _LARGEST_CONFIG).decode("utf-8"))
    except (CheckpointError, ValueError, RecursionError):
        return None


def _items(content: Any) -> list[tuple[str, Any]]:
    return list(content.items()) if isinstance(content, dict) else []


def _listed(content: Any) -> list[dict[str, Any]]:
    return [item for item in content if isinstance(item, dict)] if isinstance(content, list) else []


def _auto_maps(content: Any) -> Iterator[tuple[str, Any]]:
    """What every `auto_map` says, also of the configs nested in it; that of an old tokenizer is a list."""
    for key, value in _items(content):
        if key == "auto_map":
            yield from _items(value) if isinstance(value, dict) else [("AutoTokenizer", value)]
        else:
            yield from _auto_maps(value)


def _classes(config: str, folder: str, what: str, value: Any, optional: bool = False) -> Iterator[_Reference]:
    """`module.Class`, or several (slow and fast, by backend). `optional`: the module may be one of an installed library."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _classes(config, folder, what, item, optional)
        return
    if not isinstance(value, str):
        return
    repository, other, _ = value.rpartition(_OTHER_REPOSITORY)
    if other:
        yield _Reference(config, what, (), repository)
        return
    if not _is_inside(value):
        raise CheckpointError(
            f"{show(config)}: auto_map: {show(what)} is {show(value)}, which leads out of the model folder",
            hint="Name code of the folder: module.Class",
        )
    module = value.rpartition(".")[0]
    if module:
        path = f"{module.replace('.', '/')}.py"
        yield _Reference(config, what, (f"{folder}/{path}", path) if folder else (path,), optional=optional)


def _is_inside(name: str) -> bool:
    path = PureWindowsPath(name)  # the stricter reading on every system
    return not path.drive and not path.root and ".." not in path.parts and "\0" not in name
