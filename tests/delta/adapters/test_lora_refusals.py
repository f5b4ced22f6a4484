"""What plain LoRA does not cover is refused by name, with the file and what to do, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import taskvec as tv

from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import MODEL, Shapes, lora, write_adapter, write_base

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]
Q = lora("m.q", 6, 4)


def refusal(base: Path, adapter: Path, output: Path, **options: Any) -> tv.MismatchError:
    """The error, after checking what holds for every refusal: exit code 3, one line, no output nor trace of one."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(tv.MismatchError) as caught:
        tv.subtract(base, adapter, alpha=1, output=output, **options)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.iterdir()) == before
    return caught.value


def says(error: tv.TaskvecError, *parts: str) -> None:
    assert all(part in str(error) for part in parts), (str(error), parts)


# --- adapters as PEFT saves them --------------------------------------------------------------------------------------

PROMPTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("family", PROMPTS)
def test_an_adapter_of_the_inputs_is_refused_since_it_has_no_vector(family: str, bases: Bases, tmp_path: Path) -> None:
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", PROMPTS[family]())
    error = refusal(bases("llama"), adapter, tmp_path / "out")
    says(error, str(adapter / "adapter_config.json"), f"peft_type {family}", "no vector")


UNSUPPORTED = {
    "FOURIERFT": "seed", "WAVEFT": "seed", "BONE": "MISS", "VBLORA": "not read here", "XLORA": "no vector",
    "NEW_ONE": "unknown",
}  # fmt: skip


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_a_family_that_is_not_read_is_refused_by_its_name(family: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, peft_type=family)
    error = refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out")
    says(error, str(adapter / "adapter_config.json"), f"peft_type {family}", UNSUPPORTED[family])


def test_new_embeddings_tied_to_one_of_several_are_refused(tmp_path: Path) -> None:
    shapes: Shapes = {**MODEL, "encoder.embed_tokens.weight": (10, 4), "decoder.embed_tokens.weight": (10, 4)}
    base = write_base(tmp_path / "base", shapes, architectures=["BartForConditionalGeneration"])
    adapter = write_adapter(tmp_path / "adapter", {**Q, "encoder.embed_tokens.weight": (10, 4)})
    says(refusal(base, adapter, tmp_path / "out"), "embed_tokens", "ties its head", "several embeddings")


def test_a_stored_head_that_the_config_ties_may_be_left_out(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {**MODEL, "lm_head.weight": (9, 4)}, tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "adapter", {**Q, **lora("lm_head", 9, 4)})
    says(refusal(base, adapter, tmp_path / "out"), "lm_head", "ties", "--exclude '*lm_head*'")
    report = tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", exclude=["*lm_head*"], fsync=False)
    assert list(report.tensors) == ["m.q.weight"]


def test_a_copy_of_an_adapted_head_that_is_not_the_bases_is_refused(bases: Bases, tmp_path: Path) -> None:
    # PEFT puts lm_head.base_layer.weight beside its LoRA: if it is not base's own, this is not its base
    other = oracle.random_model(oracle.llama(), seed=77)
    adapter = oracle.train(other, tmp_path / "adapter", LoraConfig(r=2, target_modules=["lm_head"]))
    says(refusal(bases("llama"), adapter, tmp_path / "out"), str(adapter), "lm_head.base_layer.weight", "a copy", "--base")


# --- fields of the config ---------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[Any, str]] = {
    "layer_replication": ([[0, 2], [1, 3]], "share one weight"),
    "alora_invocation_tokens": ([7], "activated LoRA"),
    "use_qalora": (True, "QALoRA"),
    "kasa_config": ({"k": 1}, "KaSA"),
    "loftq_config": ({"loftq_bits": 4}, "LoftQ"),
    "corda_config": ({"x": 1}, "CorDA"),
    "megatron_config": ({"x": 1}, "Megatron"),
    "a_field_of_next_year": ({"x": 1}, "unknown field a_field_of_next_year"),
    "init_lora_weights": ("corda", "corda"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_config_field_that_changes_the_meaning_is_refused_by_name(field: str, tmp_path: Path) -> None:
    value, reason = FIELDS[field]
    adapter = write_adapter(tmp_path / "adapter", Q, **{field: value})
    error = refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out")
    assert isinstance(error, tv.AdapterError)
    says(error, str(adapter / "adapter_config.json"), field, reason)


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "loftq", "lora_ga", "new"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, init_lora_weights=init)
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), f"init_lora_weights is {init}", "PEFT")


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_taken(init: object, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, init_lora_weights=init)
    report = tv.subtract(write_base(tmp_path / "base"), adapter, alpha=1, output=tmp_path / "out", fsync=False)
    assert list(report.tensors) == ["m.q.weight"]


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", ["two", True, [2], 1e999])
def test_a_rank_or_alpha_that_is_no_number_is_refused(field: str, value: object, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, **{field: value})
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "adapter_config.json", f"{field} is ", "a number")


def test_a_rank_other_than_the_tensors_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, r=8)
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "m.q.lora_A.weight", "rank 2", "expected 8")


def test_a_rank_pattern_other_than_the_tensors_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, rank_pattern={"q": 3})
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "m.q.lora_A.weight", "rank 2", "expected 3")


# --- tensors ----------------------------------------------------------------------------------------------------------

NAN, INF = torch.full((6, 2), torch.nan), torch.full((6, 2), torch.inf)
TENSORS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "A without B": ({"m.q.lora_A.weight": (2, 4)}, ("module m.q", "no lora_B.weight")),
    "B without A": ({"m.q.lora_B.weight": (6, 2)}, ("module m.q", "no lora_A.weight")),
    "a bias alone": ({"m.q.lora_B.bias": (6,)}, ("module m.q", "no lora_A.weight")),
    "ranks differ": ({"m.q.lora_A.weight": (2, 4), "m.q.lora_B.weight": (6, 3)}, ("[2, 4]", "[6, 3]", "ranks differ")),
    "no tensors": ({}, ("no tensor in the adapter",)),
    "convolution": ({"m.q.lora_A.weight": (2, 4, 3, 3), "m.q.lora_B.weight": (6, 2, 1, 1)}, ("[6, 4, 3, 3]", "[6, 4]")),
    "empty": ({"m.q.lora_A.weight": (0, 4), "m.q.lora_B.weight": (6, 0)}, ("empty", "[0, 4]", "ZeRO-3")),
    "integers": ({**Q, "m.q.lora_A.weight": torch.ones(2, 4, dtype=torch.int8)}, ("m.q.lora_A.weight", "found I8")),
    "NaN": ({**Q, "m.q.lora_B.weight": NAN}, ("m.q.lora_B.weight", "NaN or inf")),
    "inf": ({**Q, "m.q.lora_B.weight": INF}, ("m.q.lora_B.weight", "NaN or inf")),
    "NaN in a replaced tensor": ({**Q, "m.norm.weight": NAN[:4, 0].clone()}, ("m.norm.weight", "NaN or inf")),
    "NaN in a LoRA bias": ({**Q, "m.q.lora_B.bias": NAN[:, 0].clone()}, ("m.q.lora_B.bias", "NaN or inf")),
    "a new value of a LoRA'd bias": ({**Q, "m.q.lora_B.bias": (6,), "m.q.bias": (6,)}, ("m.q.bias", "in two ways")),
    "KaSA's diagonal": ({**Q, "m.q.lora_diag": (2,)}, ("lora_diag", "not a tensor of LORA")),
    "LoRA on an embedding": ({"m.q.lora_embedding_A": (2, 4), "m.q.lora_embedding_B": (6, 2)}, ("[4, 6]", "[6, 4]")),
    "unknown LoRA tensor": ({**Q, "m.q.lora_new.weight": (2,)}, ("m.q.lora_new.weight", "not a tensor of LORA")),
    "shape": (lora("m.q", 7, 4), ("module m.q", "[7, 4]", "[6, 4]", "another size")),
    "shape of a replaced tensor": ({"m.norm.weight": (5,)}, ("m.norm.weight", "[5]", "[4]")),
    "shape of a LoRA bias": ({**Q, "m.q.lora_B.bias": (4,)}, ("module m.q", "[4]", "[6]")),
    "unknown module": ({**Q, **lora("m.new", 6, 4)}, ("1 of 2", "m.new.weight", "Nothing is merged in part")),
    "another model": (lora("deep.0.q", 6, 4), ("1 of 1", "deep.0.q.weight", "another model")),
    "a LoRA bias without a bias": ({**lora("m.o", 4, 6), "m.o.lora_B.bias": (4,)}, ("m.o.bias",)),
    "two adapters": ({**Q, "m.q.lora_A.default.weight": (2, 4)}, ("m.q.lora_A.default.weight", "more than one adapter")),
    "another adapter's name": ({"m.q.lora_A.mine.weight": (2, 4)}, ("m.q.lora_A.mine.weight", "not a tensor of LORA")),
    "a whole weight and its LoRA": ({**Q, "m.q.weight": (6, 4)}, ("m.q.weight", "a copy")),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_make_no_plain_lora_are_refused_with_what_was_found(case: str, tmp_path: Path) -> None:
    tensors, parts = TENSORS[case]
    adapter = write_adapter(tmp_path / "adapter", tensors)
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), str(adapter), *parts)


def test_every_unmatched_module_of_a_deeper_model_is_counted_and_the_first_are_named(tmp_path: Path) -> None:
    deeper = {name: shape for i in range(8) for name, shape in lora(f"m.{i}.q", 6, 4).items()}
    error = refusal(write_base(tmp_path / "base"), write_adapter(tmp_path / "adapter", {**Q, **deeper}), tmp_path / "out")
    says(error, "8 of 9", "m.0.q.weight", "m.4.q.weight", "and 3 more")


def test_no_rule_for_names_is_mixed_with_another(tmp_path: Path) -> None:
    # q fits as it is, o only with a prefix: nothing is guessed tensor by tensor
    adapter = write_adapter(tmp_path / "adapter", {**Q, **lora("o", 4, 6)})
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "1 of 2", "o.weight")


def test_a_classifier_that_the_base_does_not_have_is_refused(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.bert().bert, tmp_path / "base")
    fields = dict(target_modules=["query"], modules_to_save=["classifier"])
    adapter = oracle.train(oracle.bert(), tmp_path / "adapter", LoraConfig(r=2, **fields))
    says(refusal(base, adapter, tmp_path / "out"), "classifier.weight", "classifier.bias")


def test_an_integer_weight_of_the_base_takes_no_adapter(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    save_file({"m.q.weight": torch.ones(6, 4, dtype=torch.int8)}, base / "model.safetensors")
    says(refusal(base, write_adapter(tmp_path / "adapter", Q), tmp_path / "out"), "m.q.weight", "found I8")


@pytest.mark.parametrize("sign", ["config", "tensors"])
def test_a_quantised_base_is_refused(sign: str, tmp_path: Path) -> None:
    quantised: Shapes = {**MODEL, "m.q.weight.absmax": (3,)} if sign == "tensors" else MODEL
    base = write_base(tmp_path / "base", quantised)
    if sign == "config":
        (base / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}}))
    error = refusal(base, write_adapter(tmp_path / "adapter", Q), tmp_path / "out")
    assert isinstance(error, tv.QuantizedError)
    says(error, str(base), "unquantised")


def test_a_square_weight_with_no_name_of_its_own_is_no_trap(tmp_path: Path) -> None:
    # a bare nn.Linear, saved alone: its tensor is called "weight"
    base = write_base(tmp_path / "base", {"weight": (4, 4)})
    report = tv.subtract(base, write_adapter(tmp_path / "a", lora("x", 4, 4)), alpha=1, output=tmp_path / "out", fsync=False)
    assert list(report.tensors) == ["weight"]


# --- an adapter that is not whole -----------------------------------------------------------------------------------------

INCOMPLETE: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": (dict(modules_to_save=["classifier"]), "modules_to_save names classifier"),
    "trainable tokens": (dict(trainable_token_indices=[1, 2]), "trainable_token_indices is set"),
    "lora bias": (dict(lora_bias=True), "lora_bias is set for m.q"),
    "bare parameters": (dict(target_parameters=["experts.down_proj"]), "names experts.down_proj"),
    "all biases": (dict(bias="all"), "bias is all"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_what_the_config_says_was_trained_must_be_in_the_file(case: str, tmp_path: Path) -> None:
    config, reason = INCOMPLETE[case]
    adapter = write_adapter(tmp_path / "adapter", Q, **config)
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), str(adapter), reason)


def test_biases_that_a_classifier_saves_twice_are_taken_once(bases: Bases, tmp_path: Path) -> None:
    base = bases("bert")
    fields = dict(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"])
    adapter = oracle.train(oracle.bert(), tmp_path / "adapter", LoraConfig(**fields))
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    assert sum("classifier" in key and key.endswith("bias") for key in keys) > 1
    held = load_file(adapter / "adapter_model.safetensors")
    value = held["base_model.model.classifier.bias"]
    again = {
        key: value.clone() for key in keys if key.endswith("classifier.modules_to_save.bias")
    }  # one parameter in training
    save_file({**held, **again}, adapter / "adapter_model.safetensors", {"format": "pt"})
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    before = oracle.weights_of(base)["classifier.bias"]
    torch.testing.assert_close(edited["classifier.bias"], before - 0.7 * (value - before))
    other = dict.fromkeys(again, value + 1)
    save_file({**held, **other}, adapter / "adapter_model.safetensors", {"format": "pt"})
    says(refusal(base, adapter, tmp_path / "no"), "classifier", "the same tensor")


# --- what the second reading found ----------------------------------------------------------------------------------------


def test_a_quantised_origin_is_refused(tmp_path: Path) -> None:
    origin = write_base(tmp_path / "origin", {**MODEL, "m.q.weight_scale_inv": (1,)})
    adapter = write_adapter(tmp_path / "adapter", Q)
    with pytest.raises(tv.QuantizedError, match="origin"):
        tv.subtract(write_base(tmp_path / "base"), adapter, alpha=1, base=origin, output=tmp_path / "out")


def test_an_origin_may_have_another_prefix(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    origin = write_base(tmp_path / "origin", {name.removeprefix("m."): shape for name, shape in MODEL.items()})
    adapter = write_adapter(tmp_path / "adapter", {**Q, "m.q.lora_B.bias": (6,), "m.norm.weight": (4,)})
    report = tv.subtract(base, adapter, alpha=1, base=origin, output=tmp_path / "out", fsync=False)
    assert list(report.tensors) == ["m.norm.weight", "m.q.bias", "m.q.weight"]
    held, value = oracle.weights_of(base), load_file(adapter / "adapter_model.safetensors")["base_model.model.m.norm.weight"]
    expected = held["m.norm.weight"] - (value - oracle.weights_of(origin)["norm.weight"])
    torch.testing.assert_close(oracle.weights_of(tmp_path / "out")["m.norm.weight"], expected)


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_a_whole_number_beyond_any_float_is_refused(field: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, **{field: 10**400})
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "adapter_config.json", field)


def test_whole_numbers_are_no_new_values(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", {**Q, "m.norm.weight": torch.ones(4, dtype=torch.int32)})
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "m.norm.weight", "found I32")


BDLORA = {
    "a number for a list": {"target_modules_bd_a": 5},
    "a truth for a number": {"nblocks": True},
    "an unknown field": {"zz": 1},
}


@pytest.mark.parametrize("case", BDLORA)
def test_settings_of_blocks_that_are_not_understood_are_refused(case: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", Q, use_bdlora=BDLORA[case])
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "use_bdlora", "expected")


def test_reflections_without_a_direction_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    vectors = torch.ones(4, 2)
    vectors[:, 1] = 0
    base = write_base(tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "adapter", {"m.q.hra_u": vectors, "m.o.hra_u": torch.ones(6, 2)}, peft_type="HRA", lora_alpha=None
    )
    says(refusal(base, adapter, tmp_path / "out"), "hra_u", "column 1")
    with pytest.raises(tv.AdapterError, match="column 1"):
        (tv.Checkpoint.open(base) - tv.TaskVector.from_adapter(adapter)).plan()


def test_a_series_without_end_is_refused(tmp_path: Path) -> None:
    fields = dict(
        peft_type="OFT", oft_block_size=2, r=0, lora_alpha=None, peft_version="0.21.2", num_cayley_neumann_terms=10**18
    )
    adapter = write_adapter(tmp_path / "adapter", {"m.q.oft_R.weight": (2, 1)}, **fields)
    says(refusal(write_base(tmp_path / "base"), adapter, tmp_path / "out"), "num_cayley_neumann_terms", "1 to 1000")
