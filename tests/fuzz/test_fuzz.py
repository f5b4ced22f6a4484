"""A bounded run of every fuzz target: the same inputs every time, and by coverage where atheris is installed."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taskvec.checkpoint import header, locate
from taskvec.delta.adapters import patterns

from ..hostile.conftest import within
from .mutator import mutated
from .seeds import seeds
from .targets import TARGETS, Finding

RUNS = {"header": 3000, "index": 1500, "adapter_config": 1500, "single_file": 800, "pattern": 8000}
SECONDS = 120  # of one bounded run, on a machine that may be busy


def inputs(target: str, runs: int) -> Iterator[bytes]:
    """The seeds, and changes of them and of what came of them."""
    draw = random.Random(target)
    first = seeds(target)
    yield from first
    later = list(first)
    for number in range(runs):
        content = draw.choice(first if number % 2 else later)
        changed = mutated(target, content, draw.getrandbits(32)) if number % 4 else None
        if changed is not None and len(changed) < 8192:
            later.append(changed)
        yield _flipped(content, draw) if changed is None else changed


def _flipped(content: bytes, draw: random.Random) -> bytes:
    """With a few bytes changed, taken out or put in."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, len(changed))
        changed[at : at + draw.randint(0, 2)] = draw.randbytes(draw.randint(0, 2))
    return bytes(changed)


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_breaks_a_promise(target: str) -> None:
    with within(SECONDS):
        for content in inputs(target, RUNS[target]):
            TARGETS[target](content)


@pytest.mark.parametrize("target", ["header", "index", "adapter_config", "single_file"])
def test_the_inputs_are_not_all_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run above would say nothing about what is accepted."""
    accepted = refused = 0
    for content in inputs(target, 400):
        before = _Refusals.count
        with monkeypatch.context() as patched:
            patched.setattr("tests.fuzz.targets._line", _Refusals.of)
            TARGETS[target](content)
        refused += _Refusals.count > before
        accepted += _Refusals.count == before
    assert accepted >= 25 and refused >= 25, (accepted, refused)


class _Refusals:
    """Counts what is refused."""

    count = 0

    @classmethod
    def of(cls, error: Exception) -> str:
        cls.count += 1
        return f"{error} is larger than any machine"  # one of the words that excuse a refusal of the header's target


# target -> what is broken on purpose, and by what: each has to be found
BROKEN: dict[str, tuple[str, Any, str, Any]] = {
    "overlaps and holes": ("header", header, "_check_tiling", lambda *_: None),
    "names that occur twice": ("header", header, "_unique", dict),
    "numbers that are none": ("header", header, "_all_whole", lambda numbers: isinstance(numbers, list)),
    "shards elsewhere": ("index", locate, "_is_plain_name", lambda name: True),
    "an expression that matches too much": ("pattern", patterns, "_runs", lambda run, text, at: set(range(len(text) + 1))),
    "an expression that matches too little": ("pattern", patterns, "_runs", lambda run, text, at: set()),
    "bars in a group": ("pattern", patterns, "_alternatives", lambda group: [group]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_on_purpose_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, module, name, broken = BROKEN[what]
    monkeypatch.setattr(module, name, broken)
    patterns._parsed.cache_clear()
    try:
        with within(SECONDS), pytest.raises((Finding, ArithmeticError, AttributeError, TypeError, ValueError)):
            for content in inputs(target, RUNS[target]):
                TARGETS[target](content)
    finally:
        patterns._parsed.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python or machine")
@pytest.mark.parametrize("target", TARGETS)
def test_coverage_leads_to_no_finding_either(target: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.fuzz.run", target, f"-runs={RUNS[target]}", "-seed=1", "-verbosity=0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [*command, f"-artifact_prefix={tmp_path}/"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
