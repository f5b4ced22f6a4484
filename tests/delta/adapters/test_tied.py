"""A head tied to the embeddings: what an adapter does to one of them, and to the flag in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import taskvec as tv

from . import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tied() -> LlamaForCausalLM:
    return oracle.llama(tie_word_embeddings=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = oracle.save_model(tied(), tmp_path / "base")
    assert HEAD not in oracle.weights_of(folder)
    return folder


def adapter_of(folder: Path, **fields: Any) -> Path:
    return oracle.train(tied(), folder, LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], **fields}))


def merged(base: Path, adapter: Path) -> oracle.Tensors:
    """PEFT's merge, every tensor of the model in memory: the head too, tied or not."""
    return oracle.merged_by_peft(tied(), base, adapter)


def in_memory(base: Path) -> oracle.Tensors:
    """What the model holds when the base is loaded: the head is the embeddings."""
    tensors = oracle.weights_of(base)
    return {HEAD: tensors[EMBEDDINGS], **tensors}


UNTIED: dict[str, dict[str, Any]] = {
    "a new head": dict(modules_to_save=["lm_head"]),
    "new embeddings": dict(modules_to_save=["embed_tokens"]),
    "both, each its own": dict(modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("max_shard_size", [None, "4KB"])
@pytest.mark.parametrize("case", UNTIED)
def test_new_values_untie_the_head(case: str, max_shard_size: str | None, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", **UNTIED[case])
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7, max_shard_size=max_shard_size)
    oracle.assert_is_base_minus(edited, in_memory(base), merged(base, adapter), 0.7, oracle.identity)
    assert not edited[HEAD].equal(edited[EMBEDDINGS])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert tv.verify(tmp_path / "out").ok


def test_an_output_that_was_untied_loads_untied(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    tv.add(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)
    with oracle.quietly():
        ours, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
        theirs = PeftModel.from_pretrained(tied().from_pretrained(base), adapter).merge_and_unload()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert ours.lm_head.weight.data_ptr() != ours.model.embed_tokens.weight.data_ptr()
    tokens = torch.tensor([[1, 2, 3, 5, 8]])
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_plan_says_that_the_head_is_untied(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    plan = (tv.Checkpoint.open(base) - tv.TaskVector.from_adapter(adapter)).plan()
    assert any("unties" in note and "tie_word_embeddings must be false" in note for note in plan.notes)


def test_embeddings_and_head_that_got_the_same_values_stay_tied(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert sum("embed_tokens" in name or "lm_head" in name for name in stored) == 2
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    expected = merged(base, adapter)
    assert expected[HEAD].equal(expected[EMBEDDINGS])
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), expected, 0.7, oracle.identity)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_lora_on_the_embeddings_leaves_the_head_tied_to_them(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged(base, adapter), 0.7, oracle.identity)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def store_the_head_too(base: Path, change: float = 0.0) -> None:
    tensors = oracle.weights_of(base)
    save_file({**tensors, HEAD: tensors[EMBEDDINGS] + change}, base / "model.safetensors", {"format": "pt"})


def test_a_tied_head_that_is_stored_a_second_time_changes_as_the_embeddings_do(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", target_modules=["embed_tokens"])
    expected = merged(base, adapter)
    store_the_head_too(base)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    oracle.assert_is_base_minus(edited, in_memory(base), expected, 0.7, oracle.identity)
    assert edited[HEAD].equal(edited[EMBEDDINGS])


def test_a_second_copy_that_differs_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", target_modules=["embed_tokens"])
    store_the_head_too(base, 1.0)
    with pytest.raises(tv.AdapterError, match=r"lm_head.weight.*tie_word_embeddings"):
        oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)


@pytest.mark.parametrize("stored", [False, True])
def test_a_new_head_of_a_base_that_stores_it_a_second_time_unties_it(stored: bool, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    expected = merged(base, adapter)
    if stored:
        store_the_head_too(base)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    oracle.assert_is_base_minus(edited, in_memory(base), expected, 1, oracle.identity)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


AMBIGUOUS: dict[str, dict[str, Any]] = {
    "lora on the head": dict(target_modules=["q_proj", "lm_head"]),
    "dora on the head": dict(target_modules=["q_proj", "lm_head"], use_dora=True),
    "lora on both": dict(target_modules=["embed_tokens", "lm_head"]),
    "lora on both, said to be tied": dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_product_for_a_tied_head_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", **AMBIGUOUS[case])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(tv.AdapterError, match=r"lm_head.*ties") as caught:
        oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    assert str(adapter) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_part_that_is_left_out_does_not_untie(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1, exclude=["lm_head*"])
    assert HEAD not in edited
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("headless", [False, True])
def test_the_head_of_a_gpt2_is_found_beside_its_prefix(headless: bool, tmp_path: Path) -> None:
    sizes = dict(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = oracle.random_model(GPT2LMHeadModel(GPT2Config(**sizes)))
    base = oracle.save_model(model, tmp_path / "base")
    if headless:  # as the hub's gpt2 is stored: h.0…, with the architecture of a whole model
        tensors = {name.removeprefix("transformer."): t for name, t in oracle.weights_of(base).items()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    fields = dict(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    adapter = oracle.train(GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path / "adapter", LoraConfig(**fields))
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.5)
    held = oracle.weights_of(base)
    before = {HEAD: held["wte.weight" if headless else "transformer.wte.weight"], **held}
    expected = oracle.merged_by_peft(model, base, adapter)
    names = (lambda name: name if name == HEAD else f"transformer.{name}") if headless else oracle.identity
    oracle.assert_is_base_minus(edited, before, expected, 0.5, names)


def test_a_resized_vocabulary_is_refused_with_both_sizes(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    oracle.rewrite_tensors(adapter, lambda held: {k: (torch.ones(43, 16) if "lm_head" in k else t) for k, t in held.items()})
    with pytest.raises(tv.ShapeMismatchError, match=r"\[43, 16\], expected \[40, 16\].*vocabulary"):
        oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)


def test_a_base_that_names_no_architecture_has_no_head(base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text("{}")
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(tv.NameMismatchError, match=r"1 of 3.*lm_head.weight"):
        oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)


# --- where it is not sure, or would lead astray ---------------------------------------------------------------------------


def test_two_terms_of_which_one_unties_the_head(base: Path, tmp_path: Path) -> None:
    """The other's change of the embeddings is one of the head too, which was the same tensor to it."""
    unties = tv.TaskVector.from_adapter(adapter_of(tmp_path / "a", modules_to_save=["lm_head"]))
    low_rank = tv.TaskVector.from_adapter(adapter_of(tmp_path / "b", target_modules=["embed_tokens"]))
    other = oracle.save_model(oracle.random_model(tied(), seed=8), tmp_path / "other")
    dense = tv.TaskVector.between(base, other)
    checkpoint = tv.Checkpoint.open(base)
    for second in (low_rank, dense):
        for both in (unties + second, second + unties):
            found = (checkpoint + both).state_dict()
            alone, apart = (checkpoint + second).state_dict(), (checkpoint + unties).state_dict()
            before = oracle.weights_of(base)[EMBEDDINGS]
            torch.testing.assert_close(found[EMBEDDINGS], alone[EMBEDDINGS], rtol=0, atol=1e-6)
            expected = apart[HEAD].double() + alone[EMBEDDINGS].double() - before.double()
            torch.testing.assert_close(found[HEAD].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fields", [dict(modules_to_save=["embed_tokens"]), dict(target_modules=["embed_tokens"])], ids=str)
def test_an_origin_that_is_tied_and_a_model_that_is_not_are_refused(fields: Any, base: Path, tmp_path: Path) -> None:
    model = oracle.save_model(oracle.llama(), tmp_path / "untied")
    adapter = adapter_of(tmp_path / "adapter", **fields)
    with pytest.raises(tv.AdapterError, match=r"ties its head.*the other does not.*--exclude"):
        tv.subtract(model, adapter, alpha=1, base=base, output=tmp_path / "out")


def test_without_a_flag_a_stored_head_that_equals_the_embeddings_is_tied_to_them(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", target_modules=["embed_tokens"])
    head = adapter_of(tmp_path / "head", target_modules=["lm_head"])
    expected = merged(base, adapter)
    store_the_head_too(base)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    oracle.assert_is_base_minus(edited, in_memory(base), expected, 0.7, oracle.identity)
    with pytest.raises(tv.AdapterError, match=r"lm_head.*ties"):
        oracle.edited_by_taskvec(base, head, tmp_path / "no", alpha=1)


def test_without_a_flag_a_head_of_its_own_is_free(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.llama(), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    adapter = oracle.train(oracle.llama(), tmp_path / "a", LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    untied = oracle.save_model(oracle.llama(), tmp_path / "untied")
    expected = oracle.merged_by_peft(oracle.llama(), untied, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), expected, 0.7, oracle.identity)


def test_new_embeddings_of_a_bare_file_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(tv.AdapterError, match=r"embed_tokens.*a config would say.*config.json"):
        oracle.edited_by_taskvec(base / "model.safetensors", adapter, tmp_path / "out", alpha=1)
    low_rank = adapter_of(tmp_path / "low rank", target_modules=["embed_tokens"])  # right whether it is tied or not
    assert oracle.edited_by_taskvec(base / "model.safetensors", low_rank, tmp_path / "out", alpha=1)


HEADS_UNKNOWN: dict[str, Any] = {
    "BertForMaskedLM": (BertForMaskedLM, BertConfig, "word_embeddings"),
    "BertLMHeadModel": (BertLMHeadModel, BertConfig, "word_embeddings"),
    "BartForConditionalGeneration": (BartForConditionalGeneration, BartConfig, "shared"),
}


@pytest.mark.parametrize("kind", HEADS_UNKNOWN)
def test_a_head_whose_name_on_disk_is_not_known_is_not_untied(kind: str, tmp_path: Path) -> None:
    make, config, target = HEADS_UNKNOWN[kind]
    sizes = dict(vocab_size=40, hidden_size=16, d_model=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    if config is BartConfig:
        sizes = dict(
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
        )
    settings = config(**sizes, is_decoder=kind == "BertLMHeadModel")
    base = oracle.save_model(make(settings), tmp_path / "base")
    fields = dict(r=2, target_modules=["query" if config is BertConfig else "q_proj"], modules_to_save=[target])
    adapter = oracle.train(make(settings), tmp_path / "adapter", LoraConfig(**fields))
    with pytest.raises(tv.MismatchError) as caught:
        oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    assert "not known here" in str(caught.value) or "not in" in str(caught.value) or "several" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_with_two_names_for_the_same_embedding_verifies(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", modules_to_save=["lm_head"])
    oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1, max_shard_size="4KB")
    assert tv.verify(tmp_path / "out", sample=99).ok
