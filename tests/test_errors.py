from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec import errors
from taskvec.errors import TaskvecError, UsageError, listing, show

CLASSES = {name: getattr(errors, name) for name in errors.__all__}
DRAWN = re.compile(r"^([│ ]*(?:[├└]── )?)(\w+Error)\b(?: \(also (\w+)\))?(?:\s+exit (\d+))?")


def drawing() -> dict[str, tuple[str | None, int | None, str | None]]:
    """The tree drawn at the top of errors.py: name -> parent, exit code where one is written, second parent."""
    found: dict[str, tuple[str | None, int | None, str | None]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = DRAWN.match(line)
        if match:
            indent, name, second, code = match.groups()
            del above[len(indent) // 4 :]
            found[name] = (above[-1] if above else None, int(code) if code else None, second)
            above.append(name)
    return found


def test_the_tree_that_is_drawn_is_the_tree() -> None:
    assert set(drawing()) == set(CLASSES)
    for name, (parent, _, second) in drawing().items():
        bases = [base.__name__ for base in CLASSES[name].__bases__]
        assert bases == [parent or "Exception", *([second] if second else [])]


def test_every_exit_code_is_the_one_that_is_drawn_or_inherited() -> None:
    drawn = drawing()
    for name, (parent, code, _) in drawn.items():
        expected = code if code is not None else drawn[parent or name][1]
        assert CLASSES[name].exit_code == expected
    assert {code for _, code, _ in drawn.values()} == {1, 2, 3, None}


def test_the_exit_codes_are_those_the_manual_promises() -> None:
    assert (errors.EXIT_OK, errors.EXIT_ERROR, errors.EXIT_USAGE, errors.EXIT_MISMATCH) == (0, 1, 2, 3)
    assert (errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED) == (128 + 2, 128 + 15)  # SIGINT, SIGTERM
    assert errors.EXIT_HUNG_UP == 128 + 1  # SIGHUP


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_says_what_happened_and_then_what_to_do(name: str) -> None:
    plain, hinted = CLASSES[name]("x: found 3"), CLASSES[name]("x: found 3", hint="Allow it with --force")
    assert str(plain) == "x: found 3"
    assert str(hinted) == "x: found 3. Allow it with --force"
    assert (hinted.message, hinted.hint, plain.hint) == ("x: found 3", "Allow it with --force", None)
    assert isinstance(hinted, TaskvecError)


def test_a_usage_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="alpha"):
        raise UsageError("alpha is nan")


# names from files, on a terminal


@pytest.mark.parametrize("name", ["model.layers.0.weight", "é 層 🤗", "[red]:smile:", "a\\b", "שלום", "", "a b", 3, None])
def test_an_ordinary_name_is_shown_as_it_is(name: object) -> None:
    assert show(name) == str(name)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", r"a\nb"), ("a\r\tb", r"a\r\tb"), ("\x1b[31m", r"\x1b[31m"), ("\x9b31m", r"\x9b31m"), ("\0", r"\x00"),
     ("\x7f", r"\x7f"), ("a\u202eb", r"a\u202eb"), ("a\u2066b", r"a\u2066b"), ("\u200b", r"\u200b"), ("\u2028", r"\u2028"),
     ("\ufeff", r"\ufeff"), ("\u00a0", r"\xa0"), ("\ud800", r"\ud800"), ("\U000e0041", r"\U000e0041"), ("\x85", r"\x85")],
)  # fmt: skip
def test_what_would_steer_a_terminal_is_shown_escaped(name: str, shown: str) -> None:
    assert show(name) == shown


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_whatever_is_shown_is_one_printable_line_that_can_be_encoded(name: str) -> None:
    shown = show(name)
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for c in shown)
    assert len(shown.splitlines()) <= 1
    assert len(shown) <= 201
    shown.encode()


def test_a_long_name_is_cut_with_a_mark() -> None:
    assert show("x" * 200) == "x" * 200
    assert show("x" * 201) == "x" * 100 + "…" + "x" * 100
    assert show("x" * 10_000_000, 5) == "xx…xxx"
    assert show("/very" * 100 + "/model.safetensors", 40).endswith("/model.safetensors")
    assert len(show("\n" * 500, 10)) == 11


def test_a_listing_names_the_first_and_counts_the_others() -> None:
    assert listing([]) == ""
    assert listing(["a", "b"]) == "a, b"
    assert listing(iter("abcde")) == "a, b, c, d, e"
    assert listing("abcdefg") == "a, b, c, d, e and 2 more"
    assert listing(["a\n", "b", "c"], 1) == r"a\n and 2 more"
