"""Where the parts of a difference go in a LoRA: which tensors get factors, which new values, by which keys, and what
`adapter_config.json` has to say so that PEFT 0.21 finds exactly those modules. Names, shapes and dtypes only.

A weight [out, in] of a Linear:  Δ = B @ A             lora_A.weight: [r, in]      lora_B.weight: [out, r]
stored [in, out] by a Conv1D:    Δ = (B @ A)ᵀ          the same
an Embedding [V, D]:             Δ = (B @ A)ᵀ          lora_embedding_A: [r, V]    lora_embedding_B: [D, r]
new values of whole modules (norms) go to modules_to_save; those of a bias beside factors or an unchanged weight to `bias`

The scale alpha / r is 1 for every module, and r is the largest rank: an engine that knows no rank_pattern, as vLLM, which
takes r, lora_alpha and the shapes of the tensors, multiplies by the same 1. It refuses modules_to_save and biases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.header import StoredTensor
from ...delta.source import FLOATS

# ends of module names that are an nn.Embedding in transformers; a Linear of such a name has a bias, or is a head
_EMBEDDING = re.compile(
    r"((^|[._])embeddings?|(^|\.)(embed_tokens|embed_in|embed_positions|wte|wpe|shared|embed_tokens_per_layer"
    r"|relative_attention_bias))$"
)
_PLAIN = re.compile(r"[\w.-]+")  # of a module name that means itself in a regular expression


class Layer(NamedTuple):
    """A module whose weight, the base's tensor `name`, gets factors. `kind`: "linear", "conv1d" or "embedding"."""

    name: str
    module: str
    kind: str
    shape: tuple[int, ...]

    @property
    def turned(self) -> bool:
        """Whether its weight is the transpose of what `B @ A` is."""
        return self.kind != "linear"

    def keys(self, prefix: str) -> tuple[str, str]:
        """The keys of A and B in the adapter's file."""
        ends = ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        return f"{_key(prefix)}{self.module}.{ends[0]}", f"{_key(prefix)}{self.module}.{ends[1]}"

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A, [r, in], and of B, [out, r]."""
        rows, columns = self.shape
        return ((rank, rows), (columns, rank)) if self.turned else ((rank, columns), (rows, rank))


@dataclass(frozen=True)
class Layout:
    """What goes where. `values`: name in the adapter's file, without what all begin with -> the tuned tensor it is a copy of.
    `bias`: as PEFT's config has it. `refused`: name of a tensor that changed -> why a LoRA does not carry it."""

    layers: tuple[Layer, ...]
    values: Mapping[str, StoredTensor]
    modules_to_save: tuple[str, ...]
    bias: str
    refused: Mapping[str, str]


def lay_out(base: Checkpoint, changed: Mapping[str, StoredTensor], tuned_of: Callable[[str], StoredTensor]) -> Layout:
    """`changed`: base's name of every tensor that changed -> tuned's tensor; `tuned_of`: the same for any tensor."""
    modules, refused = _Modules(base), dict[str, str]()
    layers: list[Layer] = []
    for name in changed:
        tensor = base.tensors[name]
        if len(tensor.shape) == 2 and name.endswith(".weight"):
            layers.append(Layer(name, name.removesuffix(".weight"), _kind(base, tensor), tensor.shape))
        elif len(tensor.shape) > 1:
            refused[name] = f"{list(tensor.shape)}, a convolution" if len(tensor.shape) > 2 else "no weight of a module"
    adapted = {layer.module for layer in layers}
    whole: dict[str, None] = {}
    biases: dict[str, str] = {}
    for name in (name for name in changed if len(base.tensors[name].shape) < 2):
        module, _, leaf = name.rpartition(".")
        if module and module not in adapted and modules.is_norm(module):
            whole[module] = None
        elif leaf == "bias" and module:
            biases[name] = f"{module}.base_layer.bias" if module in adapted else name
        else:
            refused[name] = "a parameter beside other modules"
    saved = _saved(modules, list(whole), refused)
    values = {name: tuned_of(name) for module in saved for name in modules.held[module]}
    values.update({key: changed[name] for name, key in biases.items()})
    beside = all(name != key for name, key in biases.items())
    return Layout(tuple(layers), values, tuple(saved), "none" if not biases else "lora_only" if beside else "all", refused)


def value_key(name: str, prefix: str) -> str:
    """The key of a new value in the adapter's file."""
    return f"{_key(prefix)}{name}"


def config(base: Checkpoint, layout: Layout, ranks: Mapping[str, int], prefix: str) -> dict[str, Any]:
    """`adapter_config.json`: what PEFT has no default for. `ranks`: module -> r."""
    modules = [prefix + module for module in _Modules(base).held]
    named = {prefix + module: rank for module, rank in sorted(ranks.items())}
    largest = max(ranks.values())
    pattern = _pattern(named, largest)
    found: dict[str, Any] = {
        "base_model_name_or_path": base.label,
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "target_modules": _targets(named.keys(), modules),
    }
    if pattern:
        found |= {"rank_pattern": pattern, "alpha_pattern": pattern}
    if any(layer.kind == "conv1d" for layer in layout.layers):
        found["fan_in_fan_out"] = True
    if layout.bias != "none":
        found["bias"] = layout.bias
    if layout.modules_to_save:
        found["modules_to_save"] = _to_save({prefix + module for module in layout.modules_to_save}, modules)
    return found


def _kind(base: Checkpoint, tensor: StoredTensor) -> str:
    from ...delta.adapters.adapter import is_conv1d

    module = tensor.name.removesuffix(".weight")
    if is_conv1d(base, tensor, False):
        return "conv1d"
    return "embedding" if _EMBEDDING.search(module) and f"{module}.bias" not in base.tensors else "linear"


class _Modules:
    """Every module there must be, by the names of the tensors in them: module -> the names of its own tensors."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self.held: dict[str, list[str]] = {}
        self._inner: set[str] = set()  # those that hold others
        for name in base.tensors:
            own = module = name.rpartition(".")[0]
            while module:
                self.held.setdefault(module, [])
                module = module.rpartition(".")[0]
                self._inner.add(module)
            if own:
                self.held[own].append(name)

    def is_norm(self, module: str) -> bool:
        """Whether all it holds is vectors of its own, of floats."""
        tensors = [self._base.tensors[name] for name in self.held[module]]
        return module not in self._inner and all(len(t.shape) < 2 and t.dtype in FLOATS for t in tensors)


def _saved(modules: _Modules, asked: list[str], refused: dict[str, str]) -> list[str]:
    """The modules that PEFT saves when these are asked for: it takes every module whose name ends so, dot or no dot, adapts
    nothing in it, and wants all its tensors. Those that did not change keep their values."""
    found = [module for module in modules.held if module.endswith(tuple(asked))]
    others = [module for module in found if not modules.is_norm(module)]
    for name in (name for name in asked if any(module.endswith(name) for module in others)):
        refused.update(dict.fromkeys(modules.held[name], "PEFT would take modules for it whose names end so"))
    return found


def _ends(module: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`: what a list of PEFT's may call a module."""
    while module:
        yield module
        module = module.partition(".")[2]


def _targets(wanted: Collection[str], modules: list[str]) -> list[str] | str:
    """`target_modules` that choose these modules and no others: leaf names, full names, or an expression for both. PEFT
    takes every module that is called so or ends in a dot and that name."""
    for names in ({name.rpartition(".")[2] for name in wanted}, set(wanted)):
        if all(module in wanted or names.isdisjoint(_ends(module)) for module in modules):
            return sorted(names)
    return "|".join(re.escape(name) for name in wanted)


def _to_save(wanted: Collection[str], modules: list[str]) -> list[str]:
    """`modules_to_save`: leaf names if no other module's name ends so, dot or no dot, else full names."""
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    return leaves if all(module in wanted or not module.endswith(tuple(leaves)) for module in modules) else sorted(wanted)


def _pattern(ranks: Mapping[str, int], otherwise: int) -> dict[str, int]:
    """`rank_pattern` for modules of another rank: their full names, or expressions for these where PEFT could take one for
    another's: it matches `(.*\\.)?(key)$`, and every dot of a key any character."""
    others = {module: rank for module, rank in ranks.items() if rank != otherwise}
    dots: dict[int, set[tuple[int, ...]]] = {}  # length of a key -> where such keys have dots
    for key in others:
        dots.setdefault(len(key), set()).add(tuple(place for place, character in enumerate(key) if character == "."))
    for module in ranks:
        read = {_with_dots(end, places) for end in _ends(module) for places in dots.get(len(end), ())}
        if not _PLAIN.fullmatch(module) or any(key in others for key in read - {module}):
            return {f"^{re.escape(name)}": rank for name, rank in others.items()}
    return others


def _with_dots(text: str, places: tuple[int, ...]) -> str:
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def _key(prefix: str) -> str:
    return f"base_model.model.{prefix}"
