"""An adapter that is one `.safetensors` file and no config: what its names and its metadata say, as an Adapter.

Every tensor is a factor of a module, or its `alpha`; anything else is refused by name. Which suffixes there are is below;
kohya.py has the formula of what PEFT does not know, diffusers.py the names and settings of that family of tools,
components.py the way from an adapter's names to a base's.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.files import InputFiles
from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, counted, listing, show
from ..source import FLOATS
from .adapter import Adapter, Family, Module, refuse_long_names
from .components import find, place
from .diffusers import METADATA, Settings, modern_name, settings_of
from .peft import check_config

_FAMILIES = {"lora": "kohya", "hada": "loha", "lokr": "lokr"}  # how a suffix begins -> the module beside this one
_OTHER_NAMES = {  # suffix -> what the family calls it
    "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector",
}  # fmt: skip
_SUFFIXES = (
    "alpha", "dora_scale", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight",
    "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_magnitude_vector.weight",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
_REFUSED = {  # in the name of a tensor -> what it is of
    "boft_": "BOFT", "oft_": "OFT", "glora": "GLoRA", ".diff": "a full difference", "bundle_emb": "a textual inversion",
}  # fmt: skip
_INTEGERS = {"I64": "<q", "I32": "<i", "I16": "<h"}
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", **_INTEGERS}
_MERGE_FIRST = "Merge it with the tool that made it, and subtract the merged model"


class SingleFile(Adapter):
    """As any adapter, but shown by the parts of a pipeline where its modules have no last name."""

    def summary(self) -> dict[str, Any]:
        found = super().summary()
        places = [place(module.name) for module in self.modules]
        if any(one.flattened for one in places):
            found["targets"] = dict(Counter(one.component or "model" for one in places))
        return found


@dataclass(frozen=True)
class _Found:
    """What the file holds for one module. `alpha`: its value; `family`: the name of the module beside this one."""

    family: str
    tensors: Mapping[str, StoredTensor]
    alpha: float | None


def open_single_file(source: str | os.PathLike[str]) -> SingleFile:
    """Reads the header, and the value of every `alpha`. Raises AdapterError naming what is not covered."""
    weights = Checkpoint.open(source)
    refuse_long_names(weights)
    found = {name: _found(name, tensors, weights) for name, tensors in _by_module(weights).items()}
    settings = _settings(weights, found)
    _refuse_without_scale(weights, found, settings)
    modules = tuple(_module(name, one, settings[place(name).component], weights) for name, one in found.items())
    families = sorted({module.family.name for module in modules})
    return SingleFile(
        weights=weights,
        family="+".join(families),
        config_sha256=_digest(modules),
        modules=modules,
        values={},
        notes=tuple(_notes(weights, found, settings)),
        variants=tuple(dict.fromkeys(name for module in modules for name in module.family.variants(module.config))),
        find=find,
    )


def _by_module(weights: Checkpoint) -> dict[str, dict[str, StoredTensor]]:
    """module -> suffix, as its family knows it -> tensor."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    for key, tensor in weights.tensors.items():
        name = modern_name(key)
        suffix = max((s for s in _SUFFIXES if name.endswith(f".{s}")), key=len, default=None)
        if suffix is None:
            raise AdapterError(
                f"{show(tensor.path)}: tensor {show(key)}: {_unknown(key)}, found in an adapter of "
                f"{counted(len(weights.tensors), 'tensor')}",
                hint=_MERGE_FIRST,
            )
        _check_tensor(tensor)
        parts = modules.setdefault(name.removesuffix(f".{suffix}"), {})
        suffix = _OTHER_NAMES.get(suffix, suffix)
        if suffix in parts:
            raise AdapterError(
                f"{show(tensor.path)}: {show(parts[suffix].name)} and {show(key)} are the same tensor of one module",
                hint="The file holds more than one adapter; save one of them alone",
            )
        parts[suffix] = tensor
    return modules


def _unknown(key: str) -> str:
    kind = next((f" ({_REFUSED[part]})" for part in _REFUSED if part in key), "")
    return f"no kind of adapter that is known{kind}"


def _check_tensor(tensor: StoredTensor) -> None:
    is_alpha = tensor.name.endswith(".alpha") and tensor.dtype in _INTEGERS
    if tensor.elements == 0 or (tensor.dtype not in FLOATS and not is_alpha):
        raise AdapterError(
            f"{show(tensor.path)}: tensor {show(tensor.name)}: found {tensor.dtype} {list(tensor.shape)}, expected floats"
        )


def _found(name: str, tensors: dict[str, StoredTensor], weights: Checkpoint) -> _Found:
    factors = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "alpha"}
    kinds = sorted({suffix[:4] for suffix in factors})
    if len(kinds) != 1:
        raise AdapterError(
            f"{show(weights.path)}: module {show(name)}: found {listing(t.name for t in tensors.values())}, expected the "
            "factors of one LoRA, LoHa or LoKr",
            hint=_MERGE_FIRST,
        )
    return _Found(_FAMILIES[kinds[0]], factors, _value(tensors["alpha"]) if "alpha" in tensors else None)


def _value(stored: StoredTensor) -> float:
    """The number a scalar holds."""
    raw = bytearray(stored.nbytes)
    kind = _NUMBERS.get("F32" if stored.dtype == "BF16" else stored.dtype)
    if stored.elements == 1 and kind is not None:
        files = InputFiles({})
        try:
            files.read(stored.path, memoryview(raw), stored.offset, stored.name)
        finally:
            files.close()
        (value,) = struct.unpack(kind, b"\0\0" + raw if stored.dtype == "BF16" else raw)
        if value and math.isfinite(value):
            return float(value)
        found = f"{value}"
    else:
        found = f"{stored.dtype} {list(stored.shape)}"
    raise AdapterError(
        f"{show(stored.path)}: tensor {show(stored.name)}: found {found}, expected one finite number that is not 0"
    )


def _settings(weights: Checkpoint, found: Mapping[str, _Found]) -> dict[str, Settings | None]:
    """component -> its settings in the metadata; refused if the file says alpha in two ways."""
    settings = settings_of(weights, dict.fromkeys(place(name).component for name in found))
    both = [name for name, one in found.items() if one.alpha is not None and settings[place(name).component]]
    if both:
        raise AdapterError(
            f"{show(weights.path)}: {listing(both)} {'has' if len(both) == 1 else 'have'} an alpha, and so has {METADATA} in "
            "its metadata: which one counts is not said",
            hint="Save it again without one of the two",
        )
    return settings


def _refuse_without_scale(weights: Checkpoint, found: Mapping[str, _Found], settings: Mapping[str, Settings | None]) -> None:
    """PEFT's own file, parted from its config: the one format whose scale is elsewhere."""
    raw = any(key.startswith("base_model.") for key in weights.tensors)
    if raw and any(one.alpha is None and settings[place(name).component] is None for name, one in found.items()):
        raise AdapterError(
            f"{show(weights.path)}: an adapter of PEFT ({listing(weights.tensors, 2)}) without its adapter_config.json, "
            "which has the scale",
            hint="Put that file beside it, name this one adapter_model.safetensors, and name their folder",
        )


def _module(name: str, one: _Found, settings: Settings | None, weights: Checkpoint) -> Module:
    family: Family = importlib.import_module(f".{one.family}", __package__).FAMILY
    path, config = weights.shards[0].path, settings.config if settings else {"use_dora": _is_decomposed(one.tensors)}
    module = Module(name, family, one.tensors, path, config, parameter=f"{name}.weight")
    rank = family.rank(module)
    if settings is None:
        return replace(module, scale=1.0 if one.alpha is None or rank is None else one.alpha / rank)
    stated = settings.config.get("peft_type", family.name)
    if stated != family.name:
        raise settings.refuse(f"peft_type is {show(stated)}, but module {show(name)} has factors of {family.name}")
    check_config(settings, family)
    return replace(module, scale=family.scale(replace(module, name=place(name).rest), settings))


def _is_decomposed(tensors: Iterable[str]) -> bool:
    return any(suffix.startswith("lora_magnitude_vector") for suffix in tensors)


def _digest(modules: Iterable[Module]) -> str:
    """Pins what the factors alone do not say."""
    said = sorted((module.name, module.scale, sorted(module.config.items())) for module in modules)
    return hashlib.sha256(repr(said).encode("utf-8", "backslashreplace")).hexdigest()


def _notes(weights: Checkpoint, found: Mapping[str, _Found], settings: Mapping[str, Settings | None]) -> list[str]:
    bare = [name for name, one in found.items() if one.alpha is None and settings[place(name).component] is None]
    if not bare:
        return []
    which = "its factors" if len(bare) == len(found) else f"{counted(len(bare), 'module')} ({listing(bare, 2)})"
    return [f"{show(weights.label)} says no alpha for {which}: the product is taken as it is (s = 1), as diffusers does"]
