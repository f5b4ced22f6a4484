"""A PEFT folder -> an Adapter: the config is checked field by field, every key of the file is given to a module of the
family or is a new value, and nothing is left over.

Key of a family's tensor: `base_model.model.<module>.<suffix>`; of a new value (bias, modules_to_save): the tensor's own
name after `base_model.model.` (PEFT 0.21, utils/save_and_load.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint.checkpoint import same_bytes
from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, listing, show
from ..source import FLOATS
from .adapter import Adapter, Family, Module, refuse_long_names
from .config import MERGE_FIRST, AdapterFolder
from .names import peft_name

_WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "init_weights",
    "fan_in_fan_out", "runtime_config", "module_dropout",
}  # fmt: skip
# in the names of what PEFT adds to a module; a tensor of a model is called otherwise
_OF_AN_ADAPTER = re.compile(
    r"(^|\.)(lora|hada|lokr|ia3|oft|boft|vera|hra|hira|randlora|shira|miss|bone|c3a|delora|road|fourierft|waveft|vblora)_"
    r"|\.(ln_tuning_layers|trainable_tokens_delta|token_adapter)\b"
)


def open_peft(folder: AdapterFolder, family: Family) -> Adapter:
    """Raises AdapterError naming what the family does not cover, half pairs and unknown tensors included."""
    check_config(folder, family)
    refuse_long_names(folder.weights)
    modules: dict[str, dict[str, StoredTensor]] = {}
    shared: dict[str, StoredTensor] = {}
    values: dict[str, StoredTensor] = {}
    suffixes = sorted(family.tensors, key=len, reverse=True)
    for key, tensor in folder.weights.tensors.items():
        name = peft_name(key)
        if ".original_module." in name:  # what a new value takes the place of, which some versions save beside it
            continue
        suffix = next((s for s in suffixes if name.endswith(f".{s}")), None)
        pruned = family.prunes and suffix is not None and len(tensor.shape) > 1
        _check_tensor(folder, tensor, may_be_empty=pruned, whole_numbers=suffix in family.integers)
        if suffix is not None:
            _put(folder, modules.setdefault(name.removesuffix(f".{suffix}"), {}), suffix, tensor)
        elif name in family.shared:
            _put(folder, shared, name, tensor)
        elif _OF_AN_ADAPTER.search(name):
            raise AdapterError(
                f"{show(folder.weights.path)}: tensor {show(tensor.name)}: not a tensor of {family.name} as it is known here",
                hint=MERGE_FIRST,
            )
        elif not _is_again(values.get(name), tensor):
            _put(folder, values, name, tensor)
    if not modules and not values:
        raise AdapterError(f"{show(folder.weights.path)}: no tensor in the adapter")
    _check_complete(folder, modules, values)
    return Adapter(
        weights=folder.weights,
        family=folder.family,
        config_sha256=folder.config_sha256,
        modules=_modules(folder, family, modules, shared),
        values=values,
        notes=tuple(_notes(folder, values)),
        variants=tuple(family.variants(folder.config)),
        named_base=folder.named_base,
    )


def _modules(
    folder: AdapterFolder, family: Family, found: dict[str, dict[str, StoredTensor]], shared: dict[str, StoredTensor]
) -> tuple[Module, ...]:
    made = [
        Module(name, family, tensors, folder.weights.path, folder.config, shared=shared, parameter=f"{name}.weight")
        for name, tensors in found.items()
    ]
    arranged = family.arrange(made, folder)
    return tuple(replace(module, scale=module.family.scale(module, folder)) for module in arranged)


def check_config(folder: AdapterFolder, family: Family) -> None:
    known = _WITHOUT_EFFECT | set(family.fields)
    for key, value in folder.config.items():
        if key in known or not value:
            continue
        if key in family.refused:
            raise folder.refuse(f"{key} is set: {family.refused[key]}", MERGE_FIRST)
        raise folder.refuse(f"unknown field {show(key)} = {show(value)}: it may change what the adapter means", MERGE_FIRST)
    family.check(folder)


def _is_again(known: StoredTensor | None, tensor: StoredTensor) -> bool:
    """Whether it is a new value that the file has twice, as PEFT 0.21 saves biases of modules_to_save with bias=all."""
    return known is not None and known[1:3] == tensor[1:3] and same_bytes(known, tensor)


def _check_complete(folder: AdapterFolder, modules: Mapping[str, Collection[str]], values: Collection[str]) -> None:
    """Raises AdapterError for what the config says is trained and the file does not hold: PEFT would leave it at random."""
    config, names = folder.config, [f".{name}" for name in values]
    saved = config.get("modules_to_save") or []
    if isinstance(saved, list) and saved and not any(f".{part}." in name for part in saved for name in names):
        raise _lacking(folder, f"modules_to_save names {listing(map(str, saved))}")
    if config.get("trainable_token_indices") and not any(
        "trainable_tokens_delta" in s for held in modules.values() for s in held
    ):
        raise _lacking(folder, "trainable_token_indices is set")
    bare = [name for name, held in modules.items() if "lora_B.weight" in held and "lora_B.bias" not in held]
    if config.get("lora_bias") and bare:
        raise _lacking(folder, f"lora_bias is set for {listing(bare)}")


def _lacking(folder: AdapterFolder, what: str) -> AdapterError:
    return AdapterError(
        f"{show(folder.weights.path)}: {what}, and the file has no such tensor: it is not all of the adapter",
        hint="Fetch or save it again",
    )


def _check_tensor(folder: AdapterFolder, tensor: StoredTensor, *, may_be_empty: bool, whole_numbers: bool) -> None:
    where = f"{show(folder.weights.path)}: tensor {show(tensor.name)}"
    if tensor.dtype not in FLOATS and not whole_numbers:
        raise AdapterError(f"{where}: found {tensor.dtype}, expected floats")
    if tensor.elements == 0 and not may_be_empty:
        raise AdapterError(
            f"{where}: empty, shape {list(tensor.shape)}",
            hint="It was saved from a sharded (ZeRO-3) run; gather it first",
        )


def _put(folder: AdapterFolder, found: dict[str, StoredTensor], key: str, tensor: StoredTensor) -> None:
    if key in found:
        raise AdapterError(
            f"{show(folder.weights.path)}: {show(found[key].name)} and {show(tensor.name)} are the same tensor of the model",
            hint="The file holds more than one adapter; save one of them alone",
        )
    found[key] = tensor


def _notes(folder: AdapterFolder, values: dict[str, Any]) -> list[str]:
    notes = []
    if folder.config.get("bias") == "lora_only" and not any(name.endswith(".bias") for name in values):
        notes.append(f"{show(folder.label)} has bias=lora_only but no biases: PEFT before 0.21 lost them on saving")
    if folder.quantized_base:
        notes.append(
            f"{show(folder.label)} was trained on {show(folder.quantized_base)}, a quantised base: it also learned that "
            "base's rounding error"
        )
    return notes
