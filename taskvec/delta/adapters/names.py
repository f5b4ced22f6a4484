"""Names in an adapter -> names in the base checkpoint: one place for all families.

An adapter names modules as they were in memory when it was trained. A checkpoint may have been saved with or without a
first component (`model.`, `transformer.`), and where transformers 5 renamed modules it keeps the names it had. ONE rule is
chosen for the whole adapter, and only if it maps every name: suffixes are never guessed tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple, Protocol

from ...errors import NameMismatchError, listing, show

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|(?:base_layer\.)+(?=[^.]+$))"
)
_HEADS = {"lm_head.weight", "lm_head.bias"}  # beside the body that a prefix names, in memory and on disk
_PREFIX = re.compile(r"^base_model\.(?:model\.)?")
_ANOTHER = "The adapter belongs to another model"
_JUDGED_BY = 300  # names; enough to tell which rule to blame for the rest
_MOST_JUDGED = 100_000  # names under rules; a base without common first components has a rule for each of its tensors

Steps = tuple[tuple[str, str], ...]
_VIT: Steps = (
    (r"\bq_proj\.", "attention.query."),
    (r"\bk_proj\.", "attention.key."),
    (r"\bv_proj\.", "attention.value."),
    (r"\battention\.o_proj\.", "attention.output.dense."),
)
_VIT_MLP: Steps = ((r"\bmlp\.fc1\.", "intermediate.dense."), (r"\bmlp\.fc2\.", "output.dense."))
_SWIN: Steps = (
    (r"\battention\.q_proj\.", "attention.self.query."),
    (r"\battention\.k_proj\.", "attention.self.key."),
    (r"\battention\.v_proj\.", "attention.self.value."),
    (r"\battention\.o_proj\.", "attention.output.dense."),
)
_LLAVA: Steps = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)


class Renaming(NamedTuple):
    """What some models are called in memory by transformers 5, and in their checkpoints: regular expressions and their
    replacements, one after the other. `source`: what they are filed under in conversion_mapping.py of transformers 5.23."""

    source: str
    steps: Steps


RENAMINGS = (
    Renaming("", ()),
    Renaming(
        "mixtral, minimax, minimax_m2, phimoe",
        ((r"\.mlp\.router\.weight$", ".mlp.gate.weight"), (r"\.mlp\.", ".block_sparse_moe.")),
    ),
    Renaming(
        "granitemoe, granitemoeshared, granitemoehybrid",
        (
            (r"(\.block_sparse_moe)\.experts\.gate_up_proj$", r"\1.input_linear.weight"),
            (r"(\.block_sparse_moe)\.experts\.down_proj$", r"\1.output_linear.weight"),
            (r"(\.block_sparse_moe)\.router\.weight$", r"\1.router.layer.weight"),
        ),
    ),
    Renaming("hy_v3", ((r"\.mlp\.gate\.weight$", ".mlp.router.gate.weight"), (r"\.shared_experts\.", ".shared_mlp."))),
    Renaming("laguna", ((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),)),
    Renaming("nemotron_h", ((r"^model\.", "backbone."),)),
    Renaming("GPTNeoXForCausalLM", ((r"^lm_head\.", "embed_out."),)),
    Renaming("ViTModel and those filed under it", ((r"\blayers\.", "encoder.layer."), *_VIT, *_VIT_MLP)),
    Renaming("Dinov2Model, Dinov2WithRegistersModel", _VIT),
    Renaming("swin", (*_SWIN, *_VIT_MLP)),
    Renaming(
        "SegformerModel",
        (
            (r"\bstages\.(\d+)\.patch_embeddings\.", r"encoder.patch_embeddings.\1."),
            (r"\bstages\.(\d+)\.blocks\.", r"encoder.block.\1."),
            (r"\bstages\.(\d+)\.layer_norm", r"encoder.layer_norm.\1"),
            *_SWIN,
            (r"\bsequence_reduction\.sequence_reduction\.", "self.sr."),
            (r"\bsequence_reduction\.layer_norm\.", "self.layer_norm."),
            (r"\bmlp\.fc([12])\.", r"mlp.dense\1."),
            (r"\blayernorm_before\.", "layer_norm_1."),
            (r"\blayernorm_after\.", "layer_norm_2."),
            (r"\bdecode_head\.linear_projections\.", "decode_head.linear_c."),
        ),
    ),
    Renaming(
        "Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration, paddleocr_vl",
        (
            (r"^model\.visual\.", "visual."),
            (r"^model\.projector\.", "mlp_AR."),
            (r"^model\.language_model\.", "model."),
        ),
    ),
    Renaming("llava, llava_next, video_llava, fuyu, mllama, qwen2_audio, granite_speech, vibevoice_asr", _LLAVA),
    Renaming("llava with CLIPVisionModel", ((r"^model\.(vision|image|video)_tower\.", r"\1_tower.vision_model."), *_LLAVA)),
    Renaming(
        "llava with aria_text",
        (
            (r"\.mlp\.experts\.gate_up_proj$", ".mlp.experts.fc1.weight"),
            (r"\.mlp\.experts\.down_proj$", ".mlp.experts.fc2.weight"),
            *_LLAVA,
        ),
    ),
    Renaming(
        "emu3",
        (
            (r"^model\.text_model\.", "text_model.model."),
            (r"^lm_head\.", "text_model.lm_head."),
            (r"^model\.", ""),
        ),
    ),
    Renaming("qwen3_5_text, qwen3_5_moe_text, gemma3n_text", ((r"^model\.", "model.language_model."),)),
    Renaming("legacy, saved twice", ((r"^model\.language_model\.", "model.language_model.model."),)),
    Renaming(
        "legacy",
        (
            (r"\bLayerNorm\.weight$", "LayerNorm.gamma"),
            (r"\bLayerNorm\.bias$", "LayerNorm.beta"),
            (r"\.parametrizations\.weight\.original0$", ".weight_g"),
            (r"\.parametrizations\.weight\.original1$", ".weight_v"),
        ),
    ),
)


def peft_name(key: str) -> str:
    """The name PEFT gives a tensor inside the model: wrapper infixes, `base_model.model.` and `.default` stripped.

    `base_layer.` goes before the model's own tensors only: before an adapter's it says which of several wrappers is meant.
    """
    name = _PREFIX.sub("", _WRAPPERS.sub("", key))
    name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return re.sub(r"\.default(?=\.weight$|\.bias$|$)", "", name)


class Finder(Protocol):
    """names in an adapter, names in a base, and the paths of both for messages -> name by name, the base's."""

    def __call__(self, names: Iterable[str], base: Collection[str], adapter: object, path: object) -> Mapping[str, str]: ...


def map_names(names: Iterable[str], base: Collection[str], adapter: object, path: object) -> Mapping[str, str]:
    """adapter tensor name -> base tensor name, by the first rule that maps all of them.

    A rule is a change of the first component (as it is, dropped, one of base's added) and one of RENAMINGS, the first of
    which is none. Raises NameMismatchError listing what the best rule leaves unmatched, or where two components fit.
    """
    wanted = list(dict.fromkeys(names))
    heads = {name for name in _HEADS if name in base}
    rules = list(_rules(base))
    for _, group in groupby(rules, key=lambda rule: rule.rank):
        fitting = [rule for rule in group if all(rule(name, heads) in base for name in wanted)]
        found = {tuple(rule(name, heads) for name in wanted): rule for rule in fitting}
        if len(found) > 1:
            prefixes = " or ".join(show(rule.prefix) for rule in found.values())
            raise NameMismatchError(
                f"{show(adapter)}: {show(wanted[0])} and the others could be of {prefixes} in {show(path)}",
                hint="Name the tensors in the file as the base does",
            )
        if found:
            return dict(zip(wanted, next(iter(found))))
    raise _unmatched(wanted, base, rules, heads, adapter, path)


def names_on_disk(names: Iterable[str], base: Collection[str]) -> Mapping[str, str]:
    """names in memory -> names in a checkpoint of that model, by the rule that finds most of them. What it does not find is
    left out: a model may have more than its checkpoint, or less. A rule that finds only a few finds them by accident: then
    none is found."""
    wanted = list(dict.fromkeys(names))
    heads = {name for name in _HEADS if name in base}
    rules = list(_rules(base))
    judged = wanted[:: -(-len(wanted) // _judged_by(rules)) or 1]
    rule = max(rules, key=lambda rule: len({rule(name, heads) for name in judged}.intersection(base)))
    found = {name: target for name in wanted if (target := rule(name, heads)) in base}
    return found if 2 * len(found) > min(len(wanted), len(base)) else {}


def _judged_by(rules: Collection[_Rule]) -> int:
    return max(1, min(_JUDGED_BY, _MOST_JUDGED // len(rules)))


class _Rule(NamedTuple):
    """A change of the first component ("" none, "-" dropped, else added) and then a renaming. Rules of one `rank` are
    equally good."""

    rank: tuple[int, int]
    prefix: str
    steps: Steps

    def __call__(self, name: str, heads: Collection[str]) -> str:
        if name in heads:
            return name
        if self.prefix:
            name = name.partition(".")[2] if self.prefix == "-" else f"{self.prefix}.{name}"
        for pattern, replacement in self.steps:
            name = re.sub(pattern, replacement, name)
        return name


def _rules(base: Collection[str]) -> Iterator[_Rule]:
    components = dict.fromkeys(name.partition(".")[0] for name in base)
    for place, renaming in enumerate(RENAMINGS):
        yield _Rule((place, 0), "", renaming.steps)
        yield _Rule((place, 1), "-", renaming.steps)
        yield from (_Rule((place, 2), component, renaming.steps) for component in components)


def _unmatched(
    wanted: list[str], base: Collection[str], rules: list[_Rule], heads: Collection[str], adapter: object, path: object
) -> NameMismatchError:
    judged = wanted[: _judged_by(rules)]
    best = max(rules, key=lambda rule: sum(rule(name, heads) in base for name in judged))
    unmatched = [name for name in wanted if best(name, heads) not in base]
    hint = "Nothing is merged in part; is this its base?" if len(unmatched) < len(wanted) else _ANOTHER
    if any(best(name, heads).removesuffix("weight") + "in_proj_weight" in base for name in unmatched):
        hint = "PEFT applies its LoRA of an nn.MultiheadAttention twice (peft#3774); merge it with the PEFT that trained it"
    return NameMismatchError(
        f"{show(adapter)}: {len(unmatched)} of {len(wanted)} adapted tensors are not in {show(path)}: {listing(unmatched)}",
        hint=hint,
    )
