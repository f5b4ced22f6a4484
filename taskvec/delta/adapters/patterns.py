"""The keys of PEFT's `rank_pattern` and `alpha_pattern`: regular expressions from a file, matched in bounded time.

Python's `re` can backtrack for ever on a hostile expression, so what it would have to try is followed here as a set of
positions. Understood are text, `.`, `\\d`-like escapes, `[…]`, `*`, `+`, `?`, `|` and groups that hold no others. Keys
that are plain names, of which an adapter may have one per module, are looked up and not tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

from ...errors import show

_ATOM = r"(?:\\[dwDW]|\\[^0-9A-Za-z]|\[\^?(?:-(?!-)|[^\[\]\\^&~|-])+\]|[^\\()\[\]{}*+?|])"
_GROUP = rf"\((?:\?:)?((?:{_ATOM}|\|)*)\)"
_PIECE = re.compile(rf"(?:{_GROUP}|({_ATOM}))([*+?]?)")
_CHOICE = re.compile(rf"{_ATOM}*")
_PLAIN = re.compile(r"(\^?)((?:[\w/-]|\.|\\[^0-9A-Za-z\s])*)\$?")  # a name; its dots stand for any character
_ANY = "\n"  # in a plain key, in place of a dot; no module name has it

_LONGEST_PATTERN = 1000  # characters; a module name has about 50
_MOST_CHARACTERS = 20_000  # of all keys that are not plain names
_MOST_WORK = 20_000_000  # tries to go on from one place, of all keys on all modules: some seconds
_MOST_PER_MODULE = 20_000  # as above, of one key on one module


class _Step(NamedTuple):
    """One of `choices`, each of fixed length, or nothing if `optional`, or several if `repeated`.

    `run`: of a repeated step that is one character long, as many as there are at once. `cost`: of trying it at one place.
    """

    choices: tuple[re.Pattern[str], ...]
    optional: bool
    repeated: bool
    run: re.Pattern[str] | None
    cost: int


class TooMuchWorkError(ValueError):
    """It cannot be found out in bounded time."""


class Patterns:
    """The keys of one field, in the order of the file.

    Raises TooMuchWorkError when they are too long together to be tried on every module.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = list(keys)
        self._plain: tuple[dict[str, int], dict[str, int]] = {}, {}  # anywhere, or from the beginning: text -> place
        self._dots: tuple[dict[int, set[tuple[int, ...]]], ...] = {}, {}  # length -> where plain keys have any character
        self._others = [place for place, key in enumerate(self._keys) if not self._is_plain(place, key)]
        self._known: dict[str, str | None] = {}
        self._work = 0
        characters = sum(len(self._keys[place]) for place in self._others)
        if characters > _MOST_CHARACTERS:
            raise TooMuchWorkError(f"{characters:,} characters of regular expressions, expected at most {_MOST_CHARACTERS:,}")

    def first(self, module: str) -> str | None:
        """The first key for which `(.*\\.)?(key)$` matches the module name, as PEFT 0.21 asks (utils/other.py,
        get_pattern_key).

        Raises ValueError when that depends on a key that is no regular expression, or one that is not understood here;
        TooMuchWorkError when finding out takes too long.
        """
        if module not in self._known:
            if "\n" in module:
                raise ValueError("a module name with a line break")
            self._known[module] = self._first(module)
        return self._known[module]

    def _first(self, module: str) -> str | None:
        starts = [0, *(place + 1 for place, character in enumerate(module) if character == ".")]
        found = self._first_plain(module, starts)
        for place in self._others:
            if place > found:
                break
            if self._is_match(self._keys[place], module, set(starts)):
                return self._keys[place]
        return self._keys[found] if found < len(self._keys) else None

    def _is_match(self, key: str, module: str, starts: set[int]) -> bool:
        try:
            return _matches(key, module, starts, self._spend)
        except TooMuchWorkError:
            raise
        except (ValueError, re.error) as error:
            raise ValueError(f"pattern {show(key)} is not understood ({show(error)})") from error

    def _first_plain(self, module: str, starts: list[int]) -> int:
        """Its place, or one past the last."""
        found = len(self._keys)
        for table, dots, places in ((self._plain[0], self._dots[0], starts), (self._plain[1], self._dots[1], [0])):
            for start in places:
                end = module[start:]
                known = dots.get(len(end), ())
                self._spend(len(known) * (1 + len(end) // 16))
                found = min([found, *(table.get(_with_any(end, where), found) for where in known)])
        return found

    def _is_plain(self, place: int, key: str) -> bool:
        parsed = _PLAIN.fullmatch(key) if len(key) <= _LONGEST_PATTERN else None
        if parsed is None:
            return False
        anchored = bool(parsed[1])
        text = re.sub(r"\\(.)|\.", lambda part: part[1] or _ANY, parsed[2])
        self._plain[anchored].setdefault(text, place)
        where = tuple(at for at, character in enumerate(text) if character == _ANY)
        self._dots[anchored].setdefault(len(text), set()).add(where)
        return True

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > _MOST_WORK:
            raise TooMuchWorkError(f"trying {len(self._keys):,} patterns on every module takes too long")


def matches_whole(pattern: str, module: str) -> bool:
    """Whether the pattern matches the whole name, as re.fullmatch would. Raises ValueError or
    re.error when it is not understood, or takes too long."""
    return _matches(pattern, module, {0}, lambda work: None)


def _matches(pattern: str, module: str, starts: set[int], spend: Callable[[int], None]) -> bool:
    """Whether it matches from one of `starts` to the end."""
    left = _MOST_PER_MODULE

    def spend_here(work: int) -> None:
        nonlocal left
        left -= work
        if left < 0:
            raise TooMuchWorkError(f"matching a module name of {len(module):,} characters takes too long")
        spend(work)

    return any(len(module) in _follow(steps, module, starts, spend_here) for steps in _parsed(pattern))


def _follow(steps: Iterable[_Step], text: str, positions: set[int], spend: Callable[[int], None]) -> set[int]:
    for step in steps:
        reached = set(positions) if step.optional else set()
        if not positions:
            break
        spend(len(positions) * step.cost)
        if step.run is not None:
            reached |= _runs(step.run, text, positions)
            spend(len(reached) // 16)
        else:
            reached |= _choices(step, text, positions, reached, spend)
        positions = reached
    return positions


def _runs(run: re.Pattern[str], text: str, positions: set[int]) -> set[int]:
    reached: set[int] = set()
    last = -1
    for at in sorted(positions):
        if at > last:  # else it lies in the run before, which goes no further from here
            found = run.match(text, at)
            last = found.end() if found else at
            reached.update(range(at + 1, last + 1))
    return reached


def _choices(step: _Step, text: str, positions: set[int], reached: set[int], spend: Callable[[int], None]) -> set[int]:
    found: set[int] = set()
    frontier = positions
    while frontier:
        ends = {m.end() for at in frontier for choice in step.choices if (m := choice.match(text, at))}
        frontier = ends - found - reached if step.repeated else set()
        found |= ends
        spend(len(frontier) * step.cost)
    return found


@lru_cache(maxsize=10_000)
def _parsed(pattern: str) -> list[list[_Step]]:
    """The branches of the pattern. Neighbouring atoms become one step: together they have a fixed length too."""
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"{len(pattern)} characters, expected at most {_LONGEST_PATTERN}")
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
                _add(branches[-1], [atom] if atom is not None else _alternatives(group or ""), many)
        at = piece.end() if piece else at + 1
    _add(branches[-1], [text] if text else [], "")
    return branches


def _alternatives(group: str) -> list[str]:
    """What lies between the bars of a group; an escaped bar is text."""
    found, at = [], 0
    while True:
        choice = _CHOICE.match(group, at)
        assert choice is not None  # it matches nothing, too
        found.append(choice[0])
        at = choice.end() + 1
        if at > len(group):
            return found


def _add(branch: list[_Step], choices: list[str], many: str) -> None:
    if choices:
        compiled = tuple(re.compile(choice) for choice in choices)
        single = len(choices) == 1 and many in ("*", "+") and _PIECE.fullmatch(choices[0])
        run = re.compile(f"{choices[0]}*") if single and choices[0] not in ("^", "$") else None
        cost = sum(1 + len(choice) // 32 for choice in choices)
        branch.append(_Step(compiled, many in ("*", "?"), many in ("*", "+"), run, cost))


def _with_any(text: str, where: tuple[int, ...]) -> str:
    characters = list(text)
    for place in where:
        characters[place] = _ANY
    return "".join(characters)
