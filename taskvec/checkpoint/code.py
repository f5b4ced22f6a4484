"""Python files of a model folder: which of them a loader would run, told by the configs that name them and by what those
files import. They are read as text, never imported; what is copied is copied as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from ..errors import CheckpointError, listing, show
from .checkpoint import Checkpoint
from .files import absent, read_bytes
from .folder import DEEPEST_FOLDERS, SideFile, side_files
from .locate import parse_json

_LARGEST_CONFIG = 16 << 20  # bytes
_LARGEST_MODULE = 4 << 20
_OTHER_REPOSITORY = "--"  # in org/name--module.Class
# An import where a statement may begin, in a string too: transformers goes by the text as well. No part of it can match
# what the next one can, so that its time is linear.
_IMPORT = re.compile(
    r"(?:^|[;:])[ \t]*(?:from\b[ \t]*(?=[.\w])(\.*)((?:\w[\w.]*)?)[ \t]*\bimport\b[ \t]*(\([^)]*|[^\n]*)|import\b([^\n]*))",
    re.MULTILINE,
)
_NAME = re.compile(r"(\bas[ \t]+)?(\w[\w.]*)")
_NO_STATEMENT = re.compile(r"\\\r?\n|#[^\n]*")  # a line that goes on, a comment
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
    """The Python files of the folder that one of them imports, wherever in it; all beside it if it is too large to read."""
    here = _above(name)
    try:
        text = read_bytes(source, _LARGEST_MODULE).decode("utf-8", "replace")
    except CheckpointError:
        yield from (other for other in python if _above(other) == here)
        return
    files, folders = frozenset(python), frozenset(folder for other in python for folder in _folders_of(other))
    for place, module, names in _statements(text, _folders_of(name)):
        for path in _paths(place, module, names, folders):
            yield from (file for file in (f"{path}.py", f"{path}/__init__.py") if file in files)


def _statements(text: str, above: list[str]) -> Iterator[tuple[str, str, str]]:
    """Every import as (folder that it starts from, dotted module, names that may be modules in it). `above`: the folders
    that the file is in, from its own up to that of the model, which is empty."""
    for found in _IMPORT.finditer(_NO_STATEMENT.sub(" ", text)):
        dots, module, names, plain = found.groups()
        level = len(dots or "")
        places = above[level - 1 : level] if level else list(dict.fromkeys((above[0], above[-1])))
        if plain is None:
            yield from ((place, module, names) for place in places)
        else:
            plains = (name[2] for name in _NAME.finditer(plain) if not name[1])
            yield from ((place, name, "") for name in plains for place in places)


def _paths(place: str, module: str, names: str, folders: Collection[str]) -> Iterator[str]:
    """What an import may mean, as paths without their ending, no further than the folders go."""
    at = place
    for part in module.split(".", DEEPEST_FOLDERS)[:DEEPEST_FOLDERS] if module else ():
        if at not in folders:
            return
        at = f"{at}/{part}" if at else part
        yield at
    if at in folders:
        yield from (f"{at}/{name[2]}" if at else name[2] for name in _NAME.finditer(names) if not name[1])


def _above(name: str) -> str:
    return name.rpartition("/")[0]


def _folders_of(name: str) -> list[str]:
    """The folders that a file is in: its own first, that of the model, which is empty, last."""
    found = [_above(name)]
    while found[-1]:
        found.append(_above(found[-1]))
    return found


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
        return parse_json(read_bytes(source, _LARGEST_CONFIG).decode("utf-8"))
    except (CheckpointError, ValueError):
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
            f"{show(config)}: {show(what)} is {show(value)}, which leads out of the model folder",
            hint="Name code of the folder: module.Class",
        )
    module = value.rpartition(".")[0]
    if module:
        path = f"{module.replace('.', '/')}.py"
        yield _Reference(config, what, (f"{folder}/{path}", path) if folder else (path,), optional=optional)


def _is_inside(name: str) -> bool:
    path = PureWindowsPath(name)  # the stricter reading on every system
    return not path.drive and not path.root and ".." not in path.parts and "\0" not in name
