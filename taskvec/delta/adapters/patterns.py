"""The keys of PEFT's `rank_pattern` and `alpha_pattern`: regular expressions from a file, matched in linear time.

Python's `re` can backtrack for ever on a hostile expression, so what it would have to try is followed here as a set of
positions. Understood are text, `.`, `\\d`-like escapes, `[…]`, `*`, `+`, `?`, `|` and groups that hold no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

_ATOM = r"(?:\\[dwDW]|\\[^0-9A-Za-z]|\[\^?(?:-(?!-)|[^\[\]\\^&~|-])+\]|[^\\()\[\]{}*+?|])"
_GROUP = rf"\((?:\?:)?((?:{_ATOM}|\|)*)\)"
_PIECE = re.compile(rf"(?:{_GROUP}|({_ATOM}))([*+?]?)")


class _Step(NamedTuple):
    """One of `choices`, each of fixed length, or nothing if `optional`, or several if `repeated`."""

    choices: tuple[re.Pattern[str], ...]
    optional: bool
    repeated: bool


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether `(.*\\.)?(pattern)$` matches the module name, as PEFT 0.21 asks (utils/other.py, get_pattern_key).

    Raises ValueError (or re.error) when the pattern is no regular expression, or one that is not understood here.
    """
    starts = {0, *(place + 1 for place, character in enumerate(module) if character == ".")}
    return any(len(module) in _follow(steps, module, starts) for steps in _parsed(pattern))


def matches_whole(pattern: str, module: str) -> bool:
    """Whether the pattern matches the whole name, as re.fullmatch would. Raises as `pattern_matches` does."""
    return any(len(module) in _follow(steps, module, {0}) for steps in _parsed(pattern))


def _follow(steps: Iterable[_Step], text: str, positions: set[int]) -> set[int]:
    for step in steps:
        reached = set(positions) if step.optional else set()
        frontier = positions
        while frontier:
            ends = {m.end() for at in frontier for choice in step.choices if (m := choice.match(text, at))}
            frontier = ends - reached if step.repeated else set()
            reached |= ends
        positions = reached
    return positions


@lru_cache(maxsize=10_000)
def _parsed(pattern: str) -> list[list[_Step]]:
    """The branches of the pattern. Neighbouring atoms become one step: together they have a fixed length too."""
    branches: list[list[_Step]] = [[]]
    text, at = "", 0
    while at < len(pattern):
        piece = _PIECE.match(pattern, at)
        if piece is None and pattern[at] != "|":
            raise ValueError(f"not understood from {pattern[at:]!r} on")
        group, atom, many = piece.groups() if piece else (None, None, "")
        if many and atom in ("^", "$"):
            raise ValueError(f"nothing to repeat before {many!r}")
        if atom is not None and not many:
            text += atom
        else:
            _add(branches[-1], [text] if text else [], "")
            text = ""
            if piece is None:
                branches.append([])
            else:
                _add(branches[-1], [atom] if atom is not None else (group or "").split("|"), many)
        at = piece.end() if piece else at + 1
    _add(branches[-1], [text] if text else [], "")
    return branches


def _add(branch: list[_Step], choices: list[str], many: str) -> None:
    if choices:
        compiled = tuple(re.compile(choice) for choice in choices)
        branch.append(_Step(compiled, optional=many in ("*", "?"), repeated=many in ("*", "+")))
