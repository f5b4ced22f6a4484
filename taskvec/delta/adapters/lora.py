"""LoRA on linear layers (Hu et al. 2021, eq. 3; tensor names and scales as PEFT 0.21 writes them).

W' = W + s · B @ A        A: [r, in]  B: [out, r]  W: [out, in], or [in, out] where the base is a Conv1D (GPT-2)
b' = b + s · lora_B.bias                           only where the adapter has one (lora_bias)
s  = alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023); alpha and r after alpha_ and rank_pattern
every other tensor of the adapter (biases, modules_to_save) holds the new value itself: Δ = value − origin
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from ...checkpoint.checkpoint import Checkpoint, same_bytes
from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, NameMismatchError, ShapeMismatchError, listing, show
from ..source import FLOATS, Delta, DenseDelta, LowRankDelta, Resolved, ScaledDelta
from .config import AdapterFolder
from .names import map_names, peft_name

_WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size", "eva_config", "runtime_config",
}  # fmt: skip
_USED = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "modules_to_save",
    "lora_bias", "init_lora_weights",
}  # fmt: skip
_REFUSED = {
    "use_dora": "DoRA", "layer_replication": "layer replication", "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA", "arrow_config": "Arrow routing", "kasa_config": "KaSA", "use_bdlora": "BD-LoRA",
    "target_parameters": "LoRA on bare parameters (fused experts)", "trainable_token_indices": "trainable tokens",
    "ensure_weight_tying": "tied LoRA copies", "loftq_config": "LoftQ", "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA", "velora_config": "VeLoRA", "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron-parallel layers",
}  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_UNSUPPORTED_TENSORS = {
    ".lora_embedding_A": "LoRA on embeddings", ".lora_embedding_B": "LoRA on embeddings",
    ".lora_magnitude_vector": "DoRA", ".lora_magnitude_vector.weight": "DoRA", ".lora_diag": "KaSA",
    ".token_adapter.trainable_tokens_delta": "trainable tokens", ".trainable_tokens_delta": "trainable tokens",
}  # fmt: skip
_MERGE_FIRST = "Merge it with PEFT (merge_and_unload, save_pretrained) and subtract the merged model"
# transformers.pytorch_utils.Conv1D in the GPT-2 family
_CONV1D_WEIGHTS = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".q_attn.weight")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight", "lm_head.weight",
)  # fmt: skip
_HEADS = ("lm_head.weight", "embed_out.weight", "predictions.decoder.weight")
_WITH_HEAD = ("CausalLM", "LMHead", "MaskedLM", "PreTraining", "ConditionalGeneration")  # in names of model classes


class Pair(NamedTuple):
    """The two factors of one module, A: [r, in] and B: [out, r], and B's bias if it has one."""

    a: StoredTensor
    b: StoredTensor
    bias: StoredTensor | None


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA folder. `pairs` and `values` are keyed by the name PEFT gives the module or tensor in the model."""

    folder: AdapterFolder
    pairs: Mapping[str, Pair]
    values: Mapping[str, StoredTensor]
    origin: Checkpoint | None = None

    @classmethod
    def open(cls, folder: AdapterFolder) -> LoraAdapter:
        """Raises AdapterError for what plain LoRA does not cover, by name; half pairs and unknown tensors included."""
        _check_config(folder)
        factors: dict[str, dict[str, StoredTensor]] = {}
        values: dict[str, StoredTensor] = {}
        for key, tensor in folder.weights.tensors.items():
            name = peft_name(key)
            _check_tensor(folder, name, tensor)
            for suffix in (".lora_A.weight", ".lora_B.weight", ".lora_B.bias"):
                if name.endswith(suffix):
                    _put(folder, factors.setdefault(name.removesuffix(suffix), {}), suffix, tensor)
                    break
            else:
                _put(folder, values, name, tensor)
        if not factors and not values:
            raise AdapterError(f"{show(folder.weights.path)}: no tensor in the adapter")
        return cls(folder, {module: _pair(folder, module, found) for module, found in factors.items()}, values)

    @property
    def label(self) -> str:
        return self.folder.label

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.folder.weights, self.origin) if self.origin else (self.folder.weights,)

    @property
    def config_sha256(self) -> str:
        return self.folder.config_sha256

    def trained_on(self, origin: Checkpoint) -> LoraAdapter:
        """The same adapter with the base it was trained on, against which its replaced tensors are differences."""
        matched = replace(self, origin=origin)
        matched.resolve(origin, lambda name: True)
        return matched

    def scale(self, module: str) -> float:
        """s of one module: alpha / r or alpha / sqrt(r). r is that of the tensors, checked against the config."""
        config, stored = self.folder.config, self.pairs[module].a.shape[0]
        rank = self.folder.pattern_value("rank_pattern", module, "r", stored)
        if rank != stored:
            raise AdapterError(
                f"{show(self.folder.weights.path)}: tensor {show(self.pairs[module].a.name)}: found rank {stored}, "
                f"expected {rank:g} as in the config"
            )
        alpha = self.folder.pattern_value("alpha_pattern", module, "lora_alpha", 8)
        return alpha / math.sqrt(stored) if config.get("use_rslora") else alpha / stored

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """Δ of every tensor of `base` the adapter changes.

        Raises NameMismatchError listing adapter tensors without a counterpart, ShapeMismatchError with both shapes.
        """
        factored = [f"{module}.weight" for module in self.pairs]
        factored += [f"{module}.bias" for module, pair in self.pairs.items() if pair.bias]
        wanted = factored + list(self.values)
        _refuse_tied_head(self, wanted, base)
        targets = map_names(wanted, base.tensors, self.folder.path, base.path)
        values = {n: v for n, v in self.values.items() if not self._is_copy(n, v, base.tensors[targets[n]])}
        _refuse_twice(self, [targets[name] for name in (*factored, *values)])
        found = Resolved()
        for module, pair in self.pairs.items():
            target = base.tensors[targets[f"{module}.weight"]]
            _put_delta(self, base, found, target, self._low_rank(base, module, pair, target), keep)
            if pair.bias:
                target = base.tensors[targets[f"{module}.bias"]]
                _check_value(self, pair.bias, target)
                _put_delta(self, base, found, target, ScaledDelta(pair.bias, self.scale(module)), keep)
        for name, value in values.items():
            self._add_value(base, found, value, base.tensors[targets[name]], keep)
        if self.folder.config.get("bias") == "lora_only" and not any(name.endswith(".bias") for name in self.values):
            found.notes.append(f"{show(self.label)} has bias=lora_only but no biases: PEFT before 0.21 lost them on saving")
        if self.folder.quantized_base:
            found.notes.append(
                f"{show(self.label)} was trained on {show(self.folder.quantized_base)}, a quantised base: it also learned "
                "that base's rounding error"
            )
        return found

    def _is_copy(self, name: str, value: StoredTensor, target: StoredTensor) -> bool:
        """Whether `value` is only base's own tensor again: PEFT saves one beside the factors of a head or an embedding."""
        alike = name.removesuffix(".weight") in self.pairs and (value.dtype, value.shape) == (target.dtype, target.shape)
        return alike and same_bytes(value, target)

    def _low_rank(self, base: Checkpoint, module: str, pair: Pair, target: StoredTensor) -> LowRankDelta:
        inside, outside = pair.a.shape[1], pair.b.shape[0]
        straight, turned = target.shape == (outside, inside), target.shape == (inside, outside)
        if not (straight or turned):
            raise ShapeMismatchError(
                f"{show(self.folder.weights.path)}: tensor {show(pair.a.name)}: B@A is {[outside, inside]}, expected "
                f"{list(target.shape)} as {show(target.name)} in {show(base.path)}",
                hint="The adapter was trained on a model of another size",
            )
        if straight and turned:
            turned = _is_conv1d(base, target, bool(self.folder.config.get("fan_in_fan_out")))
        return LowRankDelta(pair.b, pair.a, self.scale(module), transposed=turned)

    def _add_value(
        self, base: Checkpoint, found: Resolved, value: StoredTensor, target: StoredTensor, keep: Callable[[str], bool]
    ) -> None:
        _check_value(self, value, target)
        if target.name.endswith(_EMBEDDINGS) and _ties_head(base) and keep(target.name):
            raise AdapterError(
                f"{show(self.folder.weights.path)}: tensor {show(value.name)}: replaces an embedding that {show(base.path)} "
                "ties to its head: the head would have to be untied",
                hint=_MERGE_FIRST,
            )
        origin = self.origin.tensors.get(target.name) if self.origin else target
        if origin is None:
            raise NameMismatchError(f"{show(self.origin.path if self.origin else '')}: no tensor {show(target.name)}")
        _check_value(self, value, origin)
        _put_delta(self, base, found, target, DenseDelta(value, origin), keep)


def _check_config(folder: AdapterFolder) -> None:
    for key, value in folder.config.items():
        if key in _WITHOUT_EFFECT or key in _USED or not value:
            continue
        if key in _REFUSED:
            raise folder.refuse(f"{key} is set: {_REFUSED[key]} is not plain LoRA", _MERGE_FIRST)
        raise folder.refuse(f"unknown field {show(key)} = {show(value)}: it may change what the adapter means", _MERGE_FIRST)
    init = folder.config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise folder.refuse(
            f"init_lora_weights is {show(init)}, which changes the base when the adapter is made: s·B@A is not its Δ",
            "Save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT",
        )


def _check_tensor(folder: AdapterFolder, name: str, tensor: StoredTensor) -> None:
    where = f"{show(folder.weights.path)}: tensor {show(tensor.name)}"
    for suffix, family in _UNSUPPORTED_TENSORS.items():
        if name.endswith(suffix):
            raise AdapterError(f"{where}: {family} is not plain LoRA on linear layers", hint=_MERGE_FIRST)
    if tensor.dtype not in FLOATS:
        raise AdapterError(f"{where}: found {tensor.dtype}, expected floats")
    if tensor.elements == 0:
        raise AdapterError(
            f"{where}: empty, shape {list(tensor.shape)}",
            hint="It was saved from a sharded (ZeRO-3) run; gather it first",
        )
    if "lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_B.bias")):
        raise AdapterError(f"{where}: not a tensor of plain LoRA", hint=_MERGE_FIRST)


def _put(folder: AdapterFolder, found: dict[str, StoredTensor], key: str, tensor: StoredTensor) -> None:
    if key in found:
        raise AdapterError(
            f"{show(folder.weights.path)}: {show(found[key].name)} and {show(tensor.name)} are the same tensor of the model",
            hint="The file holds more than one adapter; save one of them alone",
        )
    found[key] = tensor


def _pair(folder: AdapterFolder, module: str, found: dict[str, StoredTensor]) -> Pair:
    where = f"{show(folder.weights.path)}: module {show(module)}"
    missing = [name for name in (".lora_A.weight", ".lora_B.weight") if name not in found]
    if missing:
        raise AdapterError(f"{where}: found {listing(t.name for t in found.values())}, but no {missing[0][1:]}")
    pair = Pair(found[".lora_A.weight"], found[".lora_B.weight"], found.get(".lora_B.bias"))
    if len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        raise AdapterError(f"{where}: A is {list(pair.a.shape)}: LoRA on convolutions is not supported", hint=_MERGE_FIRST)
    if pair.a.shape[0] != pair.b.shape[1]:
        raise AdapterError(f"{where}: A is {list(pair.a.shape)}, B is {list(pair.b.shape)}: their ranks differ")
    return pair


def _refuse_twice(adapter: LoraAdapter, targets: Iterable[str]) -> None:
    twice = [target for target, times in Counter(targets).items() if times > 1]
    if twice:
        raise AdapterError(
            f"{show(adapter.folder.weights.path)}: changes {listing(twice)} in two ways, as LoRA and as a whole",
            hint=_MERGE_FIRST,
        )


def _refuse_tied_head(adapter: LoraAdapter, wanted: Iterable[str], base: Checkpoint) -> None:
    heads = [name for name in dict.fromkeys(wanted) if name.endswith(_HEADS)]
    if heads and _ties_head(base) and not any(name.endswith(_HEADS) for name in base.tensors):
        raise AdapterError(
            f"{show(adapter.folder.weights.path)}: changes {listing(heads)}, which {show(base.path)} does not store: its "
            "head is tied to its embeddings",
            hint=_MERGE_FIRST,
        )


def _put_delta(
    adapter: LoraAdapter,
    base: Checkpoint,
    found: Resolved,
    target: StoredTensor,
    delta: Delta,
    keep: Callable[[str], bool],
) -> None:
    if not keep(target.name):
        return
    if target.dtype not in FLOATS:
        raise ShapeMismatchError(
            f"{show(target.path)}: tensor {show(target.name)}: found {target.dtype}, expected floats to merge an adapter into"
        )
    if target.name.endswith("lm_head.weight") and base.config.get("tie_word_embeddings"):
        raise AdapterError(
            f"{show(adapter.folder.weights.path)}: changes lm_head, which {show(base.path)} ties to its embeddings: "
            "whether the embeddings change too is not in the file",
            hint=f"{_MERGE_FIRST}, or leave it out with --exclude '*lm_head*'",
        )
    found.deltas[target.name] = delta


def _check_value(adapter: LoraAdapter, value: StoredTensor, target: StoredTensor) -> None:
    if value.shape != target.shape:
        raise ShapeMismatchError(
            f"{show(adapter.folder.weights.path)}: tensor {show(value.name)}: found shape {list(value.shape)}, expected "
            f"{list(target.shape)} as {show(target.name)} in {show(target.path)}"
        )


def _ties_head(base: Checkpoint) -> bool:
    has_head = any(kind in str(a) for a in base.config.get("architectures") or [] for kind in _WITH_HEAD)
    stored = any(name.endswith(_HEADS) for name in base.tensors)
    return has_head and (not stored or bool(base.config.get("tie_word_embeddings")))


def _is_conv1d(base: Checkpoint, target: StoredTensor, flag: bool) -> bool:
    """Whether a square weight is stored [in, out]. PEFT's fan_in_fan_out flag alone cannot be trusted: one flag is
    saved for layers of both kinds. The base's own tensors of the same leaf name tell, by their biases; then its config.
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
