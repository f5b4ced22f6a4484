"""Where the inputs that a record names lie now. A fine-tune has the names, sizes and headers of its base, so that a place may
look like several of them: every way to give each input a place of its own is found, the likeliest first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import exists
from ..checkpoint.locate import ADAPTER_WEIGHTS, locate_peft
from ..checkpoint.repository import cached
from ..errors import CheckpointError, TaskvecError, show

_MOST_WAYS = 24  # four inputs that look alike, in any order
_MOST_STEPS = 10_000
_OF_A_TERM = ("tuned", "stored", "adapter", "origin")
_PINNED = {"from_output", "revision"}  # an input with one of these is known by more than its name

Places = dict[str, Path]  # input, by `key`, -> where it lies
_Look = frozenset[tuple[str, int, str]]


class Ways(NamedTuple):
    """`sure`: if none of them gives the output, it is the output that is wrong, or an input was changed."""

    ways: list[Places]
    sure: bool


def key(role: str, recorded: dict[str, Any]) -> str:
    """The same for what is surely one input. Where only a name is known, a tuned model may have that of its base."""
    known = bool(_PINNED & recorded.keys())
    return json.dumps([recorded, "" if known else "base" if role == "origin" else role], sort_keys=True)


def inputs(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every input of a record, with what it is in it."""
    yield "base", content["base"]
    for term in content["vector"]:
        yield from ((role, term[role]) for role in _OF_A_TERM if role in term)
        yield from (("masks", view["masks"]) for view in term.get("through", []) if "masks" in view)


def relocate(checkpoint: Checkpoint, content: dict[str, Any], against: list[Path]) -> Ways:
    """Raises CheckpointError when an input is not found, or is another one by now."""
    home = checkpoint.path.resolve()
    named = {key(role, recorded): recorded for role, recorded in inputs(content)}
    looks: dict[Path, _Look | None] = {}
    candidates = [_candidates(recorded, home, against, looks) for recorded in named.values()]
    ways, all_of_them = _ways(list(named.values()), candidates)
    if not ways:
        lost = next((r for r, found in zip(named.values(), candidates) if not any(map(_is_named(r), found))), content["base"])
        raise not_found(lost, home)
    places = [dict(zip(named, way)) for way in ways]
    by_name = all(_is_named(recorded)(place) for recorded, place in zip(named.values(), ways[0]))
    return Ways(places, (all_of_them or by_name) and not _is_nothing(content, places[0]))


def not_found(recorded: dict[str, Any], home: Path) -> CheckpointError:
    return CheckpointError(
        f"input {show(recorded['name'])} of {show(home.name)} was not found, or is another one by now",
        hint="Say where it is with --against PATH",
    )


def _is_nothing(content: dict[str, Any], places: Places) -> bool:
    """Whether a tuned model and what it was trained from are one place, without the record saying so."""
    terms = [(key("tuned", t["tuned"]), key("origin", t["origin"])) for t in content["vector"] if "tuned" in t]
    return any(places[tuned] == places[origin] and tuned != origin for tuned, origin in terms)


def _is_named(recorded: dict[str, Any]) -> Any:
    return lambda place: place.name == Path(str(recorded["name"])).name


def _candidates(recorded: dict[str, Any], home: Path, against: list[Path], looks: dict[Path, _Look | None]) -> list[Path]:
    """The places that have its files, sizes and headers; those of its name first."""
    name = str(recorded["name"])
    places = [*against]
    if "from_output" in recorded:
        places.append(Path(os.path.normpath(home / recorded["from_output"])))
    if Path(name).name == name:
        places += [home.parent / name, Path(name)]
    if "revision" in recorded:
        places.append(cached(str(recorded["repository"]), str(recorded["revision"])) / str(recorded["path"]))
    expected = frozenset((f["name"], f["bytes"], f["header_sha256"]) for f in recorded.get("files", ()))
    distinct = {os.path.abspath(place): place for place in reversed(places) if place.resolve() != home}
    found = [place for place in reversed(distinct.values()) if exists(place) and _look(place, looks) == expected]
    return sorted(found, key=lambda place: not _is_named(recorded)(place))


def _look(place: Path, looks: dict[Path, _Look | None]) -> _Look | None:
    if place not in looks:
        try:
            folder = locate_peft(place)
            opened = Checkpoint.open(place if folder is None else folder / ADAPTER_WEIGHTS)
            looks[place] = frozenset((s.path.name, s.identity.size, s.header_sha256) for s in opened.shards)
        except TaskvecError:
            looks[place] = None
    return looks[place]


def _ways(recorded: list[dict[str, Any]], candidates: list[list[Path]]) -> tuple[list[tuple[Path, ...]], bool]:
    """Places for all of them, such that two that the record tells apart have two; and whether these are all the ways."""
    waiting: list[tuple[Path, ...]] = [()]
    found: list[tuple[Path, ...]] = []
    for _ in range(_MOST_STEPS):
        if not waiting or len(found) > _MOST_WAYS:
            break
        chosen = waiting.pop()
        if len(chosen) == len(recorded):
            found.append(chosen)
            continue
        own = recorded[len(chosen)]
        taken = {os.path.abspath(place) for place, other in zip(chosen, recorded) if other != own}
        free = [place for place in candidates[len(chosen)] if os.path.abspath(place) not in taken]
        waiting += [(*chosen, place) for place in reversed(free)]
    return found[:_MOST_WAYS], not waiting and len(found) <= _MOST_WAYS


__all__ = ["Places", "Ways", "inputs", "key", "not_found", "relocate"]
