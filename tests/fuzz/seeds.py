"""What fuzzing starts from: small inputs of each target that reach its far end, and some that are refused late."""

from __future__ import annotations

import json
from typing import Any

from ..checkpoint.craft import BITS, entry, framed, header_of


def _headers() -> list[bytes]:
    every = {f"t{bits}.{name}": (name, [8], bits) for name, bits in BITS.items()}
    shapes: dict[str, tuple[str, list[int], int]] = {"s": ("F32", [], 4), "e": ("F16", [0, 3], 0), "m": ("BF16", [2, 3], 12)}
    return [
        framed("{}"),
        framed(header_of(every, {"format": "pt"}), bytes(sum(BITS.values()))),
        framed(header_of(shapes), bytes(16)),
        framed('{"__metadata__":{"k":"\\u00e9\\ud83e\\udd17"},"\\u0000":' + json.dumps(entry()) + "}  ", bytes(4)),
        framed({"b": entry(begin=4, end=8), "a": entry(begin=0, end=4)}, bytes(8)),
        framed({"a": entry(begin=0, end=4), "b": entry(begin=2, end=6)}, bytes(6)),
        framed({"a": entry(shape=[2**63, 2])}, bytes(4)),
    ]


def _indexes() -> list[bytes]:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    whole = {"a": first, "b": first, "c": second}
    maps: list[Any] = [whole, {**whole, "d": "../outside.safetensors"}, {"a": first, "b": first}, {"a": second}, [], "x"]
    return [json.dumps({"metadata": {"total_size": 20}, "weight_map": found}).encode() for found in maps]


_FIELDS: list[dict[str, Any]] = [
    {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q", "o"], "bias": "none"},
    {"peft_type": "LORA", "r": 8, "rank_pattern": {"q": 2, r"m\.[o-q]$": 2}, "alpha_pattern": {"^m.q": 1, ".*o|x": 0.5}},
    {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "org/name-bnb-4bit", "init_lora_weights": "pissa"},
    {
        "peft_type": "LORA",
        "target_parameters": ["q"],
        "modules_to_save": ["o"],
        "layers_pattern": "(a*)*b",
        "lora_bias": True,
    },
    {"peft_type": "ADALORA", "init_r": 2, "rank_pattern": {"m.q.lora_E": [True, True]}, "lora_alpha": 4},
    {"peft_type": "LOHA", "r": 2, "alpha": 1, "alpha_pattern": {"q": 3}, "rank_dropout": 0.0},
    {"peft_type": "IA3", "feedforward_modules": ".*(q|o)", "target_modules": "m.(q|o)"},
    {"peft_type": "TRAINABLE_TOKENS", "token_indices": [0, 3]},
    {"peft_type": "HRA", "r": 2, "apply_GS": False, "init_weights": True},
    {"peft_type": "VERA", "r": 2, "projection_prng_key": 0, "save_projection": True},
]


def _patterns() -> list[bytes]:
    patterns = [
        "q_proj",
        r"layers\.\d+\.(?:q|k)_proj$",
        "^a.*[^.]+b?",
        "(a|b|\\|)*c|d",
        r"\w+\.\W",
        "[a-c]+.b",
        "(a|ab)",
        "(b|)a",
        "",
    ]
    return [f"{pattern}\0a.b.q_proj".encode() for pattern in patterns]


def seeds(target: str) -> list[bytes]:
    """The inputs of one target, always the same."""
    configs = [json.dumps(fields).encode() for fields in _FIELDS]
    by_component = [{f"unet.{key}": value for key, value in fields.items()} for fields in _FIELDS[:4]]
    return {
        "header": _headers,
        "index": _indexes,
        "adapter_config": lambda: configs,
        "single_file": lambda: [*(json.dumps(fields).encode() for fields in by_component), b"{}"],
        "pattern": _patterns,
    }[target]()
