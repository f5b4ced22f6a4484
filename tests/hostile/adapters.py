"""Adapters that may not be merged: what they are, and what the one line about them says."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from ..checkpoint.craft import framed, header_of
from .good import Make, adapter, file, files, link, one, pipe, sparse, together

_A, _B = "base_model.model.model.h.0.q.lora_A.weight", "base_model.model.model.h.0.q.lora_B.weight"
_FACTORS = {_A: [2, 24], _B: [8, 2]}
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LONG = "h." * 400 + "q"  # a module name of 801 characters
_LONG = {f"base_model.model.{LONG}.lora_A.weight": [2, 24], f"base_model.model.{LONG}.lora_B.weight": [8, 2]}


class Bad(NamedTuple):
    """How it is made, what is said beside the name `bad`, the exit code, and what is named on the command line."""

    make: Make
    words: tuple[str, ...]
    code: int = 3
    name: str = "bad"


def config(*words: str, **changes: Any) -> Bad:
    """A good adapter but for these fields."""
    return Bad(adapter(**changes), (_CONFIG, *words))


def raw(content: bytes | str, *words: str) -> Bad:
    """A good adapter, its config written as it stands."""
    return Bad(adapter(content), (_CONFIG, *words), 1)


def holding(tensors: dict[str, list[int]], *words: str, dtype: str = "F32", **changes: Any) -> Bad:
    """An adapter of these tensors."""
    return Bad(adapter(None, tensors, dtype, **changes), words)


def pattern(*keys: str, tensors: dict[str, list[int]] | None = None, words: tuple[str, ...] = ("alpha_pattern",)) -> Bad:
    """An adapter whose alpha depends on these regular expressions."""
    return Bad(adapter(None, tensors, alpha_pattern=dict.fromkeys(keys, 1)), (_CONFIG, *words))


def ia3(named: object, *words: str) -> Bad:
    """(IA)³ on a square matrix, where only a pattern tells rows from columns."""
    square = {"base_model.model.square.ia3_l": [1, 1]}
    base = file(framed(header_of({"square.weight": ("F32", [1, 1], 4)}), bytes(4)), "square.safetensors")
    made = adapter({"peft_type": "IA3", "feedforward_modules": named}, square)
    return Bad(together(base, made), words)


def kohya(alpha: tuple[str, list[int], bytes], *words: str) -> Bad:
    """An adapter in one file, whose scale is a tensor."""
    shapes: dict[str, tuple[str, list[int], int]] = {
        "lora_unet_q.lora_down.weight": ("F32", [2, 4], 32),
        "lora_unet_q.lora_up.weight": ("F32", [6, 2], 48),
        "lora_unet_q.alpha": (alpha[0], alpha[1], len(alpha[2])),
    }
    content = framed(header_of(shapes), bytes(80) + alpha[2])
    return Bad(file(content), ("bad.safetensors", "tensor lora_unet_q.alpha", *words), name="bad.safetensors")


def described(settings: str, *words: str) -> Bad:
    """An adapter in one file with its settings in the metadata."""
    shapes = {f"unet.h.0.q.lora_{x}.weight": ("F32", shape, 4 * math.prod(shape)) for x, shape in zip("AB", ([2, 4], [6, 2]))}
    content = framed(header_of(shapes, {"lora_adapter_metadata": settings}), bytes(80))
    return Bad(file(content), ("bad.safetensors", "lora_adapter_metadata", *words), name="bad.safetensors")


_UNCLEAR = "is not understood"
ADAPTERS: dict[str, Bad] = {
    # what the config is
    "a config that is cut off": raw('{"peft_type": "LO', "not JSON"),
    "an empty config": raw(" ", "not JSON"),
    "a config that is a list": raw("[]", "list", "expected an object"),
    "a config in UTF-16": raw("{}".encode("utf-16"), "not JSON"),
    "a config of lists in each other": raw("[" * 10**6, "not JSON", "deep"),
    "a config that is deep, and closed": raw('{"peft_type":"LORA","r":' + "[" * 900 + "]" * 900 + "}", "not JSON", "deep"),
    "a config that is deep where nobody looks": raw('{"peft_type":"LORA","x":' * 120 + "1" + "}" * 120, "not JSON", "deep"),
    "a config with a number of 5000 digits": raw('{"peft_type":"LORA","r":%s}' % ("9" * 5000), "not JSON"),
    "a config of a gigabyte": Bad(
        together(adapter(), sparse(f"bad/{_CONFIG}", 1 << 30)), (_CONFIG, "1073741824 bytes", "at most"), 1
    ),
    "a config that is a pipe": Bad(together(adapter(), pipe(f"bad/{_CONFIG}")), (_CONFIG, "not a regular file"), 1),
    "a config that is a device": Bad(
        together(adapter(), link(f"bad/{_CONFIG}", "/dev/zero")), (_CONFIG, "not a regular file"), 1
    ),
    "weights that are a pipe": Bad(together(adapter(), pipe(f"bad/{_WEIGHTS}")), (_WEIGHTS, "not a regular file"), 1),
    "weights that are a device": Bad(
        together(adapter(), link(f"bad/{_WEIGHTS}", "/dev/zero")), (_WEIGHTS, "not a regular file"), 1
    ),
    "weights without a config": Bad(files({_WEIGHTS: one(1)}), (_WEIGHTS, f"without {_CONFIG}", "Fetch")),
    "a config without weights": Bad(files({_CONFIG: "{}"}), (f"no {_WEIGHTS}",)),
    "a config beside a pickle": Bad(
        files({_CONFIG: "{}", "adapter_model.bin": b"\x80\x04N."}), ("adapter_model.bin", "never opens pickles")
    ),
    # what the config says
    "no kind": Bad(adapter({"r": 2}), (_CONFIG, "no peft_type"), 1),
    "a kind that is a list": Bad(adapter({"peft_type": ["LORA"]}), (_CONFIG, "no peft_type"), 1),
    "an unknown kind": config("EVIL", "read are LORA", peft_type="evil"),
    "a kind that draws": config("peft_type \\x1b[2J\\u202e", peft_type="\x1b[2j\u202e"),
    "a kind that is a module to import": config("peft_type", "OS.SYSTEM", peft_type="os.system"),
    "a kind that leads elsewhere": config("peft_type", "../../EVIL", peft_type="../../evil"),
    "rank 0": Bad(adapter(r=0), (_A, "found rank 2, expected 0 as in the config")),
    "a negative rank": Bad(adapter(r=-2), (_A, "found rank 2, expected -2")),
    "a rank of text": config("r is 2, expected a number", r="2"),
    "a rank of null": config("r is None", r=None),
    "a rank of true": config("r is True", r=True),
    "a rank of a list": config("r is [2]", r=[2]),
    "a rank that is not the factors'": Bad(adapter(r=3), (_A, "found rank 2, expected 3")),
    "a rank of 400 digits": config("expected a number", r=10**400),
    "alpha NaN": config("lora_alpha is nan, expected a number", lora_alpha=math.nan),
    "alpha infinite": config("lora_alpha is -inf, expected a number", lora_alpha=-math.inf),
    "alpha of text": config("lora_alpha is 4; import os", lora_alpha="4; import os"),
    "a field of the future": config("unknown field quantum = True", quantum=True),
    "a field that draws": config("unknown field \\x1b[2J = \\u202e", **{"\x1b[2J": "\u202e"}),
    "a field of a million characters": config("unknown field xxx", "…", **{"x" * 10**6: "y" * 10**6}),
    "routed experts": config("arrow_config", "per token", arrow_config={"top_k": 1}),
    "modules to save that are not there": Bad(
        adapter(modules_to_save=["lm_head"]), ("modules_to_save names lm_head", "no such tensor", "Fetch")
    ),
    "a pattern that is a list": config("alpha_pattern is list", alpha_pattern=["q"]),
    "a pattern for no number": config("alpha_pattern[q] is [], expected a number", alpha_pattern={"q": []}),
    # expressions that `re` would try for ever
    "nested repetition": pattern("(a*)*b", words=("alpha_pattern", "(a*)*b", _UNCLEAR, "Write out")),
    "nested repetition, spelled out": pattern("(h|h.)*((h.)+)+x", words=("alpha_pattern", _UNCLEAR, "Write out")),
    "a back reference": pattern(r"(h)\1", words=("alpha_pattern", _UNCLEAR)),
    "a look behind": pattern("(?<=h)q", words=("alpha_pattern", _UNCLEAR)),
    "a huge count": pattern("h{1000000000}", words=("alpha_pattern", _UNCLEAR)),
    "no expression": pattern("[h", words=("alpha_pattern", _UNCLEAR)),
    "an inline flag": pattern("(?i)Q", words=("alpha_pattern", _UNCLEAR)),
    "an expression of a million characters": pattern("h?" * 500_000, words=("alpha_pattern", "1,000,000 characters")),
    "a hundred thousand expressions": pattern(*(f"h*{n}" for n in range(10**5)), words=("alpha_pattern", "characters")),
    "an expression that draws": pattern("\x1b[2J(", words=("alpha_pattern", "\\x1b[2J(", _UNCLEAR)),
    "an expression for a long name": pattern(
        "(h|h.|h.h)*" * 80 + "x", tensors=_LONG, words=("alpha_pattern", "takes too long", "Write out")
    ),
    "a hundred repetitions on a long name": pattern(
        ".*" * 400 + "x", tensors=_LONG, words=("alpha_pattern", "takes too long")
    ),
    "an expression that is not understood in rank_pattern": config("rank_pattern", _UNCLEAR, rank_pattern={"(q+)+": 2}),
    "an expression for (IA)³": ia3("(s*)*x", "feedforward_modules", "(s*)*x", _UNCLEAR),
    "no name for (IA)³": ia3(1, "feedforward_modules is 1"),
    # what the weights are
    "factors that do not meet": holding({_A: [2, 24], _B: [8, 3]}, "module model.h.0.q", "[2, 24]", "[8, 3]", "ranks differ"),
    "factors of another model": holding(
        {_A: [2, 16], _B: [12, 2]}, "model.h.0.q", "Δ is [12, 16]", "expected [8, 24]", "another size"
    ),
    "factors in one dimension": holding({_A: [48], _B: [16]}, "[48]"),
    "factors of seven dimensions": holding(
        {_A: [2, 24, 1, 1, 1, 1, 1], _B: [8, 2, 1, 1, 1, 1, 1]}, "Δ is [8, 24, 1, 1, 1, 1, 1]"
    ),
    "empty factors": holding({_A: [0, 24], _B: [8, 0]}, _A, "empty", "gather it"),
    "whole numbers for factors": holding(_FACTORS, _A, "I8", "expected floats", dtype="I8"),
    "half a pair": holding({_A: [2, 24]}, "model.h.0.q", "lora_A"),
    "the other half": holding({_B: [8, 2]}, "model.h.0.q", "lora_B"),
    "a third factor": holding({**_FACTORS, _A.replace("lora_A", "lora_C"): [2, 2]}, "lora_C.weight", "not a tensor of LORA"),
    "no tensor": holding({}, "no tensor in the adapter"),
    "two adapters in one": holding(
        {**_FACTORS, _A.replace("base_model.model.", ""): [2, 24]}, _A, "the same tensor of the model"
    ),
    "a module the model lacks": holding({n.replace("h.0.q", "h.7.q"): s for n, s in _FACTORS.items()}, "model.h.7.q", "base"),
    "some modules the model lacks": holding(
        {**_FACTORS, **{n.replace("h.0.q", "h.7.q"): s for n, s in _FACTORS.items()}}, "model.h.7.q"
    ),
    "a module that draws": holding({n.replace("h.0.q", "\x1b[2J\u202e"): s for n, s in _FACTORS.items()}, "\\x1b[2J\\u202e"),
    "a module of a million characters": holding(
        {n.replace("h.0.q", "h." * 500_000): s for n, s in _FACTORS.items()}, _WEIGHTS, "characters", "at most 1,000"
    ),
    # adapters in one file
    "an alpha of NaN": kohya(("F32", [], struct.pack("<f", math.nan)), "found nan", "one finite number"),
    "an alpha of infinity": kohya(("F64", [], struct.pack("<d", math.inf)), "found inf", "one finite number"),
    "an alpha of 0": kohya(("I32", [], bytes(4)), "found 0", "not 0"),
    "an alpha of two numbers": kohya(("F32", [2], bytes(8)), "found F32 [2]", "one finite number"),
    "an alpha of nothing": kohya(("F32", [0], b""), "F32 [0]"),
    "an alpha of a truth": kohya(("BOOL", [], b"\1"), "BOOL []"),
    "settings that are no JSON": described("{", "not JSON"),
    "settings in each other": described("[" * 10**5, "not JSON"),
    "settings that are a list": described("[]", "list", "expected an object"),
    "settings of another kind": described('{"unet.peft_type":"EVIL","unet.r":2,"unet.lora_alpha":4}', "EVIL"),
    "settings of no number": described('{"unet.r":2,"unet.lora_alpha":NaN}', "nan, expected a number"),
}
