"""Inputs that look wrong and are legal: they must work. Values are few and exact, so that every result is known by heart.

In every float tensor base is 2 and old is 5; 2 − (5 − 2) = −1. Whatever else a tensor is made of stays as base has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ..checkpoint.craft import BITS, framed, header_of

BASE, OLD, EDITED = 0, 1, 2
NUMBERS = {  # dtype -> the bytes of 2, 5 and −1, written down from the formats (IEEE 754; OCP 8-bit floating point)
    "F64": ("0000000000000040", "0000000000001440", "000000000000f0bf"),
    "F32": ("00000040", "0000a040", "000080bf"),
    "F16": ("0040", "0045", "00bc"),
    "BF16": ("0040", "a040", "80bf"),
    "F8_E4M3": ("40", "4a", "b8"),
    "F8_E5M2": ("40", "45", "bc"),
}
Shapes = dict[str, tuple[str, list[int]]]  # name -> dtype, shape


class Tricky(NamedTuple):
    """The tensors of both models, and how a file of them is written: its header as JSON, and what is put after that."""

    tensors: Shapes
    written: Callable[[str], str] = lambda text: text
    order: Callable[[Iterable[str]], Iterable[str]] = list  # of the tensors in the data
    metadata: dict[str, str] | None = None

    def file(self, which: int) -> bytes:
        data = {name: content(dtype, shape, which) for name, (dtype, shape) in self.tensors.items()}
        placed = {name: (*self.tensors[name], len(data[name])) for name in self.order(data)}
        header = header_of(placed, self.metadata)
        if set(data) != set(placed) or list(data) != list(placed):
            header = {name: header[name] for name in (*(["__metadata__"] if self.metadata else []), *data)}
        return framed(self.written(json.dumps(header)), b"".join(data[name] for name in placed))


def content(dtype: str, shape: list[int], which: int) -> bytes:
    """The bytes of a tensor in base, in old, or as they have to be in the result."""
    elements = math.prod(shape)
    if dtype in NUMBERS:
        return bytes.fromhex(NUMBERS[dtype][which]) * elements
    return bytes(at % 2 for at in range(elements * BITS[dtype] // 8))  # the same in all: what may be a truth value


def called(*names: str) -> Tricky:
    return Tricky({name: ("F32", [2]) for name in names})


_ONE: Shapes = {"w": ("F32", [2, 3])}
LEGAL: dict[str, Tricky] = {
    "no dimension": Tricky({"s": ("F32", []), "w": ("BF16", [])}),
    "no element": Tricky({"e": ("F16", [0, 3]), "w": ("F32", [1]), "z": ("F64", [0])}),
    "only tensors without elements": Tricky({"e": ("F16", [0, 3]), "w": ("F32", [0])}),
    "no element, and a dimension near the largest": Tricky({"e": ("F32", [0, 2**62]), "w": ("F32", [1])}),
    "thirty dimensions": Tricky({"w": ("F32", [1] * 29 + [3])}),
    "a thousand dimensions": Tricky({"w": ("I32", [1] * 1000), "x": ("F32", [2])}),
    "a thousand dimensions of floats": Tricky({"w": ("F32", [1] * 999 + [3])}),
    "every dtype of the format": Tricky({f"t.{dtype}": (dtype, [8]) for dtype in BITS}),
    "sub-byte tensors": Tricky({"f4": ("F4", [3, 2]), "f6": ("F6_E2M3", [4]), "f6b": ("F6_E3M2", [2, 2]), "w": ("F32", [1])}),
    "a float at an odd place": Tricky({"a": ("U8", [1]), "b": ("F64", [3]), "c": ("BOOL", [1]), "d": ("BF16", [5])}),
    "a header of odd length": Tricky(_ONE, lambda text: text + " " * (1 - len(text) % 2)),
    "data in another order than the names": Tricky(
        {name: ("F32", [place + 1]) for place, name in enumerate("abcdef")}, order=lambda names: sorted(names, reverse=True)
    ),
    "blanks after the header": Tricky(_ONE, lambda text: text + " " * 5000),
    "blanks within the header": Tricky(_ONE, lambda text: json.dumps(json.loads(text), indent=7).replace(" ", "\t \n\r")),
    "a header just under the limit": Tricky(_ONE, lambda text: text.ljust(99_999_999)),
    "a header of escapes": Tricky(
        {"w": ("F32", [2])}, lambda text: text.replace('"w"', '"\\u0077"').replace("dtype", "\\u0064type")
    ),
    "a megabyte of metadata": Tricky(_ONE, metadata={"k" * 1000: "v" * 10**6}),
    "metadata that draw": Tricky(_ONE, metadata={"\x1b[2J": "\u202e\x07\n[/red]", "": ""}),
    "ten thousand tensors": Tricky({f"h.{n}.w": ("F16", [1]) for n in range(10_000)}),
    "an empty name": called(""),
    "a name of a blank": called(" ", "  "),
    "names of a NUL": called("\0", "a\0b"),
    "names with slashes": called("a/b/c", "/etc/passwd", "../../up", "C:\\w", "\\\\host\\w"),
    "names of dots": called(".", "..", "a..b", ".a."),
    "names that draw": called("\x1b[2J", "\x1b]0;title\x07", "a\rb", "\x9b31m", "\b\b\b"),
    "names read backwards": called("w\u202egnp", "\u2066w\u2069", "שלום", "العربية.وزن"),
    "names of rich markup": called("[bold]w[/bold]", "[/red]", ":smile:", "[link=file:///etc/passwd]w[/link]"),
    "names of several lines": called("w\nx", "w\r\nx", "w\u2028x\u2029", "a\x0bb\x0c"),
    "names of other scripts": called("重み.0", "вес", "वज़न", "🤗", "👩\u200d💻", "\U0010ffff"),
    "names that differ in their case": called("W", "w"),
    "names that differ in their composition": called("é", "e\u0301"),
    "names that differ in what is not seen": called("w", "w\u200b", "w\u00ad", "w\ufe0f"),
    "a name like a float, a truth, an option": called("nan", "true", "null", "-1", "--output", "0"),
    "names of the metadata, almost": called("__metadata__ ", " __metadata__", "__METADATA__"),
    "names of fields": called("dtype", "shape", "data_offsets"),
    "quotes and backslashes": called('"', "'", "\\", "\\n", '\\"', "{}", "[", "$HOME", "`id`", "%s", "{0}"),
    "a name of a hundred thousand characters": called("w" * 10**5, "h." * 50_000 + "weight"),
    "a name of a million escapes": called("\x1b" * 10**6),
    "a name of a pattern": called("*", "?", "[a-z]", "a*", "[!"),
}
