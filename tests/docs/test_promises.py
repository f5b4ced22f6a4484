"""The tests that docs/promises.md and SECURITY.md name as proof are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = (ROOT / "docs" / "promises.md").read_text()


def test_every_promise_names_its_proof() -> None:
    parts = re.split(r"^\*\*P(\d+)\. ", PROMISES, flags=re.MULTILINE)[1:]
    assert [int(number) for number in parts[::2]] == list(range(1, 11))
    assert all("- `tests/" in text for text in parts[1::2])


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PROMISES))))
def test_every_test_that_is_named_is_there(named: tuple[str, str]) -> None:
    tree = ast.parse((ROOT / named[0]).read_text())
    assert named[1] in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"`((?:tests|taskvec)/[\w/.]*?)(?:::\w+)?`", PROMISES + (ROOT / "SECURITY.md").read_text())
    assert len(named) > 40
    assert not [path for path in named if not (ROOT / path).exists()]
