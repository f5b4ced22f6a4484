"""Changes that keep an input what it is: JSON stays JSON, the length before a header stays right, data cover the tensors.

Bytes changed at random hardly ever get past a JSON parser; these do, and then meet what is behind it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

from ..checkpoint.craft import BITS

_NUMBERS = [0, 1, 2, 3, 4, 8, 127, 255, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1, -8]
_ODD: list[Any] = [None, True, False, 1.0, 0.5, -0.0, 1e300, 5e-324, float("nan"), float("inf"), [], {}, "", [[]], {"a": {}}]
_TEXTS = [
    "a", "m.q", "q", "weight", "__metadata__", "dtype", "shape", "data_offsets", "../x.safetensors", "/x.safetensors",
    "C:\\x.safetensors", "model-00001-of-00002.safetensors", "\x1b[2J", "\u202e", "[red]", "\ud800", "\0", "a\nb", "é",
    "(a*)*b", ".*", "(a|aa)+", "^q$", "[", "\\", r"\d+", "|", "pissa", "LORA", "IA3", "rank_pattern", "r", "lora_alpha",
    *BITS,
]  # fmt: skip


def mutated(target: str, content: bytes, seed: int) -> bytes | None:
    """`content` after up to three changes; None where it is not of the form that this target takes."""
    draw = random.Random(seed)
    if target == "pattern":
        return _pattern(content, draw)
    raw = content[8 : 8 + int.from_bytes(content[:8], "little")] if target == "header" else content
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    for _ in range(draw.randint(0, 3)):
        found = _edited(found, draw)
    if target == "header" and isinstance(found, dict) and draw.random() < 0.5:
        found = _tiled(found, draw)
    text = _text(found, draw)
    return _file(found, text, content, draw) if target == "header" else text


def _pattern(content: bytes, draw: random.Random) -> bytes:
    text, _, module = content.decode("utf-8", "replace").partition("\0")
    pieces = [
        "a",
        ".",
        "\\.",
        "*",
        "+",
        "?",
        "|",
        "(",
        ")",
        "[ab]",
        "[^.]",
        "\\d",
        "^",
        "$",
        "_",
        "q",
        "\\|",
        "-",
        "(a|ab)",
        "(b|)",
    ]
    for _ in range(draw.randint(1, 3)):
        at = draw.randint(0, len(text))
        text = text[:at] + draw.choice(pieces) + text[at + draw.randint(0, 2) :]
    if draw.random() < 0.5:
        module = "".join(draw.choices(draw.choice(["ab", "ab._0q"]), k=draw.choice([0, 1, 2, 3, 10])))
    return f"{text}\0{module}".encode()


def _edited(found: Any, draw: random.Random) -> Any:
    """`found` with one change somewhere in it."""
    if isinstance(found, dict) and found and draw.random() < 0.8:
        key = draw.choice(list(found))
        return {**found, key: _edited(found[key], draw)} if draw.random() < 0.7 else _edited_keys(found, key, draw)
    if isinstance(found, list) and found and draw.random() < 0.8:
        at = draw.randrange(len(found))
        kinds: list[Callable[[], list[Any]]] = [
            lambda: [*found[:at], _edited(found[at], draw), *found[at + 1 :]],
            lambda: found[:at] + found[at + 1 :],
            lambda: [*found, found[at]],
        ]
        return draw.choice(kinds)()
    if isinstance(found, int) and draw.random() < 0.6:
        return found + draw.choice([-8, -4, -1, 1, 4, 8])
    return draw.choice([draw.choice(_NUMBERS), draw.choice(_TEXTS), draw.choice(_ODD)])


def _edited_keys(found: dict[str, Any], key: str, draw: random.Random) -> dict[str, Any]:
    rest = {name: value for name, value in found.items() if name != key}
    kinds = [
        rest,
        {**found, draw.choice(_TEXTS): found[key]},
        {**rest, draw.choice(_TEXTS): found[key]},
        {**rest, key: found[key]},
    ]
    return draw.choice(kinds)


def _text(found: Any, draw: random.Random) -> bytes:
    text = json.dumps(found, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, None, 1]))
    if draw.random() < 0.1 and text.startswith("{") and len(text) > 2:  # a key twice
        text = "{" + text[1:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _tiled(found: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """With offsets that are right for the dtypes and shapes, where those are some; the tensors in any order."""
    placed, at = dict(found), 0
    for name in draw.sample(list(found), len(found)):
        nbytes = _bytes_of(found[name])
        if nbytes is not None and at + nbytes <= 4096:
            placed[name] = {**found[name], "data_offsets": [at, at + nbytes]}
            at += nbytes
    return placed


def _bytes_of(entry: Any) -> int | None:
    if not isinstance(entry, dict) or entry.get("dtype") not in list(BITS) or not isinstance(entry.get("shape"), list):
        return None
    if any(type(size) is not int or not 0 <= size <= 2**64 for size in entry["shape"]):
        return None
    bits: int = BITS[entry["dtype"]] * math.prod(entry["shape"])
    return None if bits % 8 else bits // 8


def _file(found: Any, raw: bytes, content: bytes, draw: random.Random) -> bytes:
    data = content[8 + int.from_bytes(content[:8], "little") :][:4096]
    entries = found.values() if isinstance(found, dict) else []
    ends = [
        e["data_offsets"][-1]
        for e in entries
        if isinstance(e, dict) and isinstance(e.get("data_offsets"), list) and e["data_offsets"]
    ]
    end = max((end for end in ends if isinstance(end, int)), default=0)
    if 0 <= end <= 4096 and draw.random() < 0.8:
        data = data[:end].ljust(end, b"\0")
    length = len(raw) if draw.random() < 0.95 else draw.choice([0, 1, len(raw) - 1, len(raw) + 1, 2**63, 2**64 - 1])
    return max(length, 0).to_bytes(8, "little") + raw + data
