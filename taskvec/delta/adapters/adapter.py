"""An adapter as the run sees it, whatever file it came from: modules with their family's tensors, and new values; matched
to a base by names and shapes, and each made into a Δ by its family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint.checkpoint import Checkpoint, same_values
from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, MismatchError, NameMismatchError, ShapeMismatchError, listing, show
from ..source import FLOATS, Delta, DenseDelta, Formula, FormulaDelta, Resolved
from .names import Finder, map_names
from .stacks import Part, Stack, find_stacks, whole
from .tied import Ties

_LONGEST_NAME = 1000  # characters; the expressions that take names apart are not made for more
_WIDEST_ROW = 1 << 17  # elements; a wider row may be cut into several tiles (run/jobs.py)
# transformers.pytorch_utils.Conv1D in the GPT-2 family
_CONV1D_WEIGHTS = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".q_attn.weight")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Module:
    """What an adapter holds for one module of the model.

    Attributes:
        name: of the module, as the adapter's maker names it.
        family: which formula its tensors belong to.
        tensors: by the suffix their family knows them by.
        path: the adapter's file, for messages.
        config: the adapter's settings, as they are.
        scale: what the family's product is multiplied by.
        shared: tensors of the adapter that belong to no module.
        parameter: the tensor of the model that it changes.
    """

    name: str
    family: Family
    tensors: Mapping[str, StoredTensor]
    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    shared: Mapping[str, StoredTensor] = field(default_factory=dict)
    parameter: str = ""

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def __getitem__(self, suffix: str) -> StoredTensor:
        if suffix not in self.tensors:
            raise self.refuse(f"found {listing(t.name for t in self.tensors.values())}, but no {suffix}")
        return self.tensors[suffix]

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.tensors

    def refuse(self, reason: str, hint: str | None = None) -> AdapterError:
        return AdapterError(f"{show(self.path)}: module {show(self.name)}: {reason}", hint=hint)

    def expect(self, suffix: str, *shape: int | None) -> StoredTensor:
        """The tensor of that suffix. Raises AdapterError if its shape is another one (None: any size)."""
        tensor = self[suffix]
        fits = len(tensor.shape) == len(shape) and all(want in (None, has) for want, has in zip(shape, tensor.shape))
        if not fits:
            expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
            raise ShapeMismatchError(
                f"{show(self.path)}: tensor {show(tensor.name)}: found shape {list(tensor.shape)}, expected {expected}",
                hint="The adapter was trained on a model of another size",
            )
        return tensor


@dataclass(frozen=True)
class Weight:
    """The tensor that a module changes: `stored` of the edited model, `origin` of the model the adapter was trained on.

    `transposed`: it is stored [in, out], as GPT-2's Conv1D stores it. `shape` is always [out, in, …]. `part`: what it is of
    a parameter of three axes.
    """

    stored: StoredTensor
    origin: StoredTensor
    transposed: bool
    part: Part | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    def refuse(self, module: Module, found: object) -> ShapeMismatchError:
        """For factors whose product has another shape than the weight."""
        return ShapeMismatchError(
            f"{show(module.path)}: module {show(module.name)}: its Δ is {found}, expected {list(self.stored.shape)} as "
            f"{show(self.stored.name)} in {show(self.stored.path)}",
            hint="The adapter was trained on a model of another size",
        )

    def by(self, formula: Formula, *tensors: StoredTensor) -> FormulaDelta:
        """Δ by a formula for W as [out, in·…], however it is stored."""
        rows = self.stored.shape[0] if len(self.stored.shape) > 1 else 1
        if self.transposed or self.stored.elements > rows * _WIDEST_ROW:
            formula = Gathered(formula, self.transposed)
        return FormulaDelta(formula, tensors, self.origin)


@dataclass(frozen=True)
class Gathered(Formula):
    """`inner` on a weight that is stored as [in, out], or whose rows are too wide to be read as such: all of Δ at once."""

    inner: Formula
    transposed: bool

    uses_weight = False
    surveys_weight = True

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        stored = np.concatenate(list(blocks()))
        weight = stored.T if self.transposed else stored
        state = self.inner.prepare(tensors, lambda: [weight])
        change = self.inner.delta(state, slice(0, len(weight)), weight)
        return np.ascontiguousarray((change.T if self.transposed else change).astype(np.float32))

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        return state[rows]

    def scratch(self, rows: int, columns: int) -> int:
        return 40 * rows * columns + self.inner.scratch(columns, rows)


@dataclass(frozen=True)
class Family:
    """One kind of adapter: what its file may hold, and how a module's tensors become Δ.

    Attributes:
        name: as `peft_type` has it.
        tensors: the suffixes of a module's tensors. Which of them must be there, `weight` says by asking for them.
        weight: Δ of the module's weight.
        bias: Δ of the module's bias, None if it does not change; asked if the base has one, or `biased` is among the tensors.
        biased: suffixes that need the module to have a bias.
        shared: names of tensors that belong to no module.
        integers: suffixes of tensors that are whole numbers.
        fields: fields of the config that the formula uses, or that are known to mean nothing to it.
        refused: field -> what it stands for: refused when it is set.
        check: refuses what else the config asks for. Raises AdapterError.
        scale: s of a module; raises AdapterError when config and tensors disagree.
        rank: of a module, for a person; None where the word has no meaning.
        variants: what else the config says the adapter is, for a person.
        arrange: puts modules in order whose keys do not say what they change.
        prunes: whether training may leave a module with rank 0, and tensors of no element.
    """

    name: str
    tensors: tuple[str, ...]
    weight: Callable[[Module, Weight], Delta]
    bias: Callable[[Module, Weight], Delta | None] = lambda module, bias: None
    biased: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Any], None] = lambda folder: None
    scale: Callable[[Module, Any], float] = lambda module, folder: 1.0
    rank: Callable[[Module], int | None] = lambda module: None
    variants: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    arrange: Callable[[list[Module], Any], list[Module]] = lambda modules, folder: modules
    prunes: bool = False


@dataclass(frozen=True)
class Adapter:
    """`modules` and `values` (new values of whole tensors) of one adapter. `find` maps its names to a base's; `variants`
    say more than `family` does; `named_base` is what its config says it was trained on."""

    weights: Checkpoint
    family: str
    config_sha256: str
    modules: tuple[Module, ...]
    values: Mapping[str, StoredTensor]
    notes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    find: Finder = map_names
    origin: Checkpoint | None = None
    named_base: str | None = None

    @property
    def label(self) -> str:
        return self.weights.label

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.weights, self.origin) if self.origin else (self.weights,)

    def trained_on(self, origin: Checkpoint) -> Adapter:
        """The same adapter with the base it was trained on, against which its replaced tensors are differences."""
        origin.refuse_quantized()
        matched = replace(self, origin=origin)
        matched.resolve(origin, lambda name: True)
        return matched

    def summary(self) -> dict[str, Any]:
        """Modules by rank, scale and kind, and the names of replaced tensors."""
        ranks = Counter(str(rank) for module in self.modules if (rank := module.family.rank(module)) is not None)
        scales = Counter(f"{module.scale:.6g}" for module in self.modules)
        targets = Counter(module.parameter.removesuffix(".weight").rpartition(".")[2] for module in self.modules)
        return {
            "variants": list(self.variants),
            "modules": len(self.modules),
            "ranks": dict(sorted(ranks.items(), key=lambda item: int(item[0]))),
            "scales": dict(sorted(scales.items())),
            "targets": dict(targets),
            "replaced": sorted(self.values),
        }

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """Δ of every tensor of `base` the adapter changes.

        Raises NameMismatchError listing adapter tensors without a counterpart, ShapeMismatchError with both shapes,
        AdapterError for what it means to a base whose head is tied to its embeddings, where that is not certain.
        """
        try:
            matched = _Matched(self, base)
        except MismatchError as error:
            if self.named_base is None:
                raise
            hint = f"{error.hint}. " if error.hint else ""
            raise type(error)(error.message, hint=f"{hint}Its config names {show(self.named_base)} as its base") from error
        self._refuse_without_biases(base)
        found = Resolved(notes=list(self.notes))
        for name, delta in matched.deltas().items():
            target = matched.base[name]
            if not keep(name):
                continue
            if target.dtype not in FLOATS:
                raise ShapeMismatchError(
                    f"{show(target.path)}: tensor {show(name)}: found {target.dtype}, expected floats to merge an adapter "
                    "into"
                )
            found.deltas[name] = delta
        matched.ties.settle(found, self.weights.path, keep, matched.origin_ties)
        return found

    def _refuse_without_biases(self, base: Checkpoint) -> None:
        """bias=all stores every bias of the model: a file without any is not all of it, if the model has some."""
        every = any(module.config.get("bias") == "all" for module in self.modules)
        if every and not any(name.endswith("bias") for name in self.values):
            biases = [name for name in base.tensors if name.endswith(".bias")]
            if biases:
                raise AdapterError(
                    f"{show(self.weights.path)}: bias is all in its config, but it has none of the biases of "
                    f"{show(base.path)} ({listing(biases, 2)})",
                    hint="Save it again",
                )


class _Matched:
    """An adapter beside one base, and beside the model it was trained on."""

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._adapter = adapter
        self.ties = self.origin_ties = Ties(base)
        self.base = {**base.tensors, **self.ties.virtual}
        wanted = [name for module in adapter.modules for name in _wanted(module)] + list(adapter.values)
        self._stacks = find_stacks(base.tensors.values(), wanted)
        names = dict.fromkeys((*self.base, *self._stacks))
        self._targets = adapter.find(wanted, names, adapter.weights.path, base.path)
        self._origin_checkpoint = adapter.origin or base
        self._origin, self._origins, self._origin_stacks = self.base, self._targets, self._stacks
        if adapter.origin is not None:
            self.origin_ties = Ties(adapter.origin)
            self._origin = {**adapter.origin.tensors, **self.origin_ties.virtual}
            self._origin_stacks = find_stacks(adapter.origin.tensors.values(), wanted)
            names = dict.fromkeys((*self._origin, *self._origin_stacks))
            found = adapter.find(wanted, names, adapter.weights.path, adapter.origin.path)
            biases = {m.bias: found[m.parameter].removesuffix("weight") + "bias" for m in adapter.modules}
            self._origins = {**biases, **found}

    def deltas(self) -> dict[str, Delta]:
        """Base tensor name -> Δ."""
        found: list[tuple[str, Delta]] = []
        for module in self._adapter.modules:
            found += self._of_module(module)
        for name, value in self._adapter.values.items():
            if self._targets[name] in self._stacks:
                found += self._of_parts(name, value)
                continue
            target = self.base[self._targets[name]]
            if not self._is_copy(name, value, target):
                self._check_same_shape(value, target)
                found.append((target.name, DenseDelta(value, self._origin_of(name, target))))
                self.ties.replaced.add(target.name)
        twice = [name for name, times in Counter(name for name, _ in found).items() if times > 1]
        if twice:
            raise AdapterError(
                f"{show(self._adapter.weights.path)}: changes {listing(twice)} in two ways",
                hint="Merge it with the tool that made it, and subtract the merged model",
            )
        return dict(found)

    def _of_parts(self, name: str, value: StoredTensor) -> Iterable[tuple[str, Delta]]:
        """A new value of a parameter that base stores in several tensors."""
        stack = self._stacks[self._targets[name]]
        for (target, part), (origin, _) in zip(stack.parts, self._origin_stack(name, stack).parts):
            yield target.name, DenseDelta(part.of(value, target), origin)

    def _origin_stack(self, name: str, stack: Stack) -> Stack:
        origin = self._origin_stacks.get(self._origins[name])
        if origin is None or [tensor.shape for tensor, _ in origin.parts] != [tensor.shape for tensor, _ in stack.parts]:
            where = self._origin_checkpoint.path
            raise ShapeMismatchError(f"{show(where)}: {show(self._origins[name])}: stored otherwise than in the edited model")
        return origin

    def _of_module(self, module: Module) -> Iterable[tuple[str, Delta]]:
        stack = self._stacks.get(self._targets[module.parameter])
        if stack is not None:
            self._origin_stack(module.parameter, stack)
            for stored, part in stack.parts:
                yield stored.name, module.family.weight(module, Weight(stored, stored, transposed=False, part=part))
            return
        target = self.base[self._targets[module.parameter]]
        weight = self._weight(module, module.parameter, target)
        yield target.name, module.family.weight(module, weight)
        sibling = target.name.removesuffix("weight") + "bias"
        bias = self._targets.get(module.bias, sibling)
        if bias in self.base and target.name.endswith("weight"):
            delta = module.family.bias(module, self._weight(module, module.bias, self.base[bias]))
            if delta is not None:
                yield bias, delta

    def _weight(self, module: Module, name: str, target: StoredTensor) -> Weight:
        origin = self._origin_of(name, target)
        flag = bool(module.config.get("fan_in_fan_out"))
        turned = len(target.shape) == 2 and is_conv1d(self._origin_checkpoint, origin, flag)
        part = whole(origin, self._origin_checkpoint) if len(target.shape) == 3 else None
        return Weight(target, origin, turned, part)

    def _origin_of(self, name: str, target: StoredTensor) -> StoredTensor:
        """The tensor of the model the adapter was trained on that corresponds to base's `target`."""
        origin = self._origin.get(self._origins.get(name, target.name))
        if origin is None:
            where = self._origin_checkpoint.path
            raise NameMismatchError(f"{show(where)}: no tensor {show(target.name)}, which the adapter changes")
        self._check_same_shape(origin, target)
        return origin

    def _check_same_shape(self, found: StoredTensor, target: StoredTensor) -> None:
        if found.shape == target.shape:
            return
        resized = len(found.shape) == len(target.shape) == 2 and found.shape[1] == target.shape[1]
        raise ShapeMismatchError(
            f"{show(found.path)}: tensor {show(found.name)}: found shape {list(found.shape)}, expected "
            f"{list(target.shape)} as {show(target.name)} in {show(target.path)}",
            hint="Its vocabulary was resized; give the base the same size first" if resized else None,
        )

    def _is_copy(self, name: str, value: StoredTensor, target: StoredTensor) -> bool:
        """Whether `value` is only base's own tensor again: PEFT saves one beside the factors of a head or an embedding."""
        if not any(module.parameter == name for module in self._adapter.modules):
            return False
        self._check_same_shape(value, target)
        origin = self._origin_of(name, target)
        if {value.dtype, origin.dtype} <= set(FLOATS) and same_values(value, origin):
            return True
        raise AdapterError(
            f"{show(value.path)}: tensor {show(value.name)}: should be a copy of {show(origin.name)} of the model it was "
            f"trained on, but differs from the one in {show(origin.path)}",
            hint="Name the model it was trained on with --base",
        )


def refuse_long_names(weights: Checkpoint) -> None:
    for tensor in weights.tensors.values():
        if len(tensor.name) > _LONGEST_NAME:
            raise AdapterError(
                f"{show(tensor.path)}: tensor {show(tensor.name, 60)}: a name of {len(tensor.name):,} characters, "
                f"expected at most {_LONGEST_NAME:,} in an adapter"
            )


def _wanted(module: Module) -> list[str]:
    biased = any(suffix in module for suffix in module.family.biased)
    return [module.parameter, module.bias] if biased else [module.parameter]


def is_conv1d(base: Checkpoint, target: StoredTensor, flag: bool) -> bool:
    """Whether a weight is stored [in, out]. PEFT's fan_in_fan_out flag alone cannot be trusted: one flag is saved for
    layers of both kinds. The base's own tensors of the same leaf name tell, by their biases; then its config.
    """
    if not f".{target.name}".endswith(_CONV1D_WEIGHTS):
        return False
    for name, tensor in base.tensors.items():
        if len(tensor.shape) != 2 or tensor.shape[0] == tensor.shape[1] or not name.endswith(".weight"):
            continue
        bias = base.tensors.get(name.removesuffix("weight") + "bias")
        if f".{name}".endswith(_CONV1D_WEIGHTS) and bias is not None:
            return bias.shape == tensor.shape[1:]
    return base.config.get("model_type") in _CONV1D_MODELS or flag
