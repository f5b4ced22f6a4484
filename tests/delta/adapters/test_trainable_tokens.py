"""Trainable tokens, alone and beside a LoRA, against PEFT's merge, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import lora, write_adapter, write_base
from .layers import weights

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),  # it looks at LoRA only
]

ROWS = [7, 0, 39, 3]  # in no order, the first and the last among them


def tokens(**fields: Any) -> TrainableTokensConfig:
    return TrainableTokensConfig(**{"token_indices": ROWS, **fields})


def beside_lora(indices: Any = ROWS, **fields: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], trainable_token_indices=indices, **fields)


def llama(tied: bool = False) -> Any:
    return oracle.llama(tie_word_embeddings=tied)


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return torch.nonzero((before != after).any(dim=1)).flatten().tolist()


@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
def test_rows_are_replaced_as_peft_merges_them(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    config = tokens(token_indices=[5, 0, 7], target_modules=["embedding", "square_embedding"])
    names = weights("embedding", "square_embedding")
    layers.assert_edited_as_peft_merges(config, tmp_path, names, dtypes)
    before, after = oracle.weights_of(tmp_path / "base"), oracle.weights_of(tmp_path / "out")
    assert all(changed_rows(before[name], after[name]) == [0, 5, 7] for name in names)


UNTIED: dict[str, Any] = {
    "alone": tokens(),
    "alone, head too": tokens(target_modules=["embed_tokens", "lm_head"]),
    "beside LoRA": beside_lora(),
    "beside LoRA, by name": beside_lora({"embed_tokens": ROWS}),
    "beside LoRA, by the end of a name": beside_lora({"tokens": ROWS, "head": [1, 2]}),
    "beside LoRA, other rows of the head": beside_lora({"embed_tokens": ROWS, "lm_head": [2, 4]}),
    "beside LoRA, and a replaced norm": beside_lora(modules_to_save=["norm"]),
}


@pytest.mark.parametrize("case", UNTIED)
def test_an_untied_model_is_edited_as_peft_merges_it(case: str, bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    layers.assert_transformer_edited_as_peft_merges(llama, base, UNTIED[case], tmp_path)
    before, after = oracle.weights_of(base), oracle.weights_of(tmp_path / "out")
    assert changed_rows(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"]) == sorted(ROWS)


TIED: dict[str, Any] = {
    "alone": tokens(),
    "beside LoRA": beside_lora(),
    "beside LoRA, both by name": beside_lora({"embed_tokens": ROWS, "lm_head": ROWS}),
    "beside LoRA, tied for sure": beside_lora(ensure_weight_tying=True),
}


@pytest.mark.parametrize("twice", [False, True], ids=["one tensor", "stored twice"])
@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_stays_tied(case: str, twice: bool, tmp_path: Path) -> None:
    base = oracle.save_model(llama(True), tmp_path / "base")
    adapter = oracle.train(llama(True), tmp_path / "adapter", TIED[case])
    merged = oracle.merged_in_double(oracle.in_double(llama(True), base), adapter)
    if twice:
        stored = oracle.weights_of(base)
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, base / "model.safetensors", {"format": "pt"})
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)
    assert ("lm_head.weight" in edited) is twice
    if twice:
        assert edited["lm_head.weight"].equal(edited["model.embed_tokens.weight"])
    before = oracle.weights_of(base)["model.embed_tokens.weight"]
    assert changed_rows(before, edited["model.embed_tokens.weight"]) == sorted(ROWS)
    assert (tmp_path / "out" / "config.json").read_text().count('"tie_word_embeddings": true') == 1


NOT_TIED_ALIKE: dict[str, Any] = {
    "the head only": tokens(target_modules=["lm_head"]),
    "the head only, beside LoRA": beside_lora({"lm_head": ROWS}),
    "other rows of the head": beside_lora({"embed_tokens": ROWS, "lm_head": [2, 4]}),
}


@pytest.mark.parametrize("case", NOT_TIED_ALIKE)
def test_a_tied_head_that_would_change_otherwise_than_its_embeddings_is_refused(case: str, tmp_path: Path) -> None:
    base = oracle.save_model(llama(True), tmp_path / "base")
    adapter = oracle.train(llama(True), tmp_path / "adapter", NOT_TIED_ALIKE[case])
    with pytest.raises(tv.AdapterError, match=r"lm_head"):
        tv.subtract(base, adapter, alpha=1, output=tmp_path / "out")


def test_copies_for_a_tied_head_that_differ_are_refused(tmp_path: Path) -> None:
    base = oracle.save_model(llama(True), tmp_path / "base")
    adapter = oracle.train(llama(True), tmp_path / "adapter", tokens())
    head = "base_model.model.lm_head.trainable_tokens_delta"
    assert head in load_file(adapter / "adapter_model.safetensors")
    oracle.rewrite_tensors(adapter, lambda stored: {**stored, head: stored[head] + 1})
    with pytest.raises(tv.AdapterError, match="lm_head"):
        tv.subtract(base, adapter, alpha=1, output=tmp_path / "out")


def test_the_same_values_for_other_rows_of_a_tied_head_are_refused(tmp_path: Path) -> None:
    base = oracle.save_model(llama(True), tmp_path / "base")
    config = beside_lora({"embed_tokens": [1, 2], "lm_head": [2, 1]})
    adapter = oracle.train(llama(True), tmp_path / "adapter", config)
    head, embedding = (
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta" for name in ("lm_head", "model.embed_tokens")
    )
    oracle.rewrite_tensors(adapter, lambda stored: {**stored, head: stored[embedding].clone()})
    with pytest.raises(tv.AdapterError, match="lm_head"):
        tv.subtract(base, adapter, alpha=1, output=tmp_path / "out")


def test_rows_are_differences_to_the_model_they_were_trained_on(bases: Bases, tmp_path: Path) -> None:
    origin, name = bases("llama"), "model.embed_tokens.weight"
    model = oracle.save_model(oracle.random_model(oracle.llama(), seed=9), tmp_path / "model")
    adapter = oracle.train(llama(), tmp_path / "adapter", tokens())
    edited = oracle.edited_by_taskvec(model, adapter, tmp_path / "out", alpha=2, base=origin)[name]
    before, trained_on = oracle.weights_of(model)[name], oracle.weights_of(origin)[name]
    (values,) = load_file(adapter / "adapter_model.safetensors").values()
    expected = before.clone()
    expected[ROWS] -= 2 * (values - trained_on[ROWS])
    torch.testing.assert_close(edited, expected)


def test_a_table_of_many_tiles_is_edited_like_a_small_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"m.embed.weight": (20_000, 64)})
    indices = [19_999, 0, 4095, 4096, 12_345]
    adapter = write_adapter(
        tmp_path / "adapter", {"m.embed.trainable_tokens_delta": (5, 64)}, peft_type="TRAINABLE_TOKENS", r=0, lora_alpha=0,
        token_indices=indices,
    )  # fmt: skip
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False, jobs=2)
    before, after = (oracle.weights_of(tmp_path / name)["m.embed.weight"] for name in ("base", "out"))
    (values,) = load_file(adapter / "adapter_model.safetensors").values()
    expected = before.double()
    expected[indices] -= (values.double() - before[indices].double()).float().double()
    assert after.equal(expected.float())


def test_the_lora_beside_is_not_changed_by_it(bases: Bases, tmp_path: Path) -> None:
    adapter = oracle.train(llama(), tmp_path / "adapter", beside_lora())
    alone = shutil.copytree(adapter, tmp_path / "alone")
    oracle.rewrite_tensors(alone, lambda stored: {k: t for k, t in stored.items() if "lora_" in k})
    with pytest.raises(tv.AdapterError, match="trainable_token_indices is set, and the file has no such tensor"):
        oracle.edited_by_taskvec(bases("llama"), alone, tmp_path / "one", alpha=1)
    oracle.rewrite_config(alone, trainable_token_indices=None)
    both = oracle.edited_by_taskvec(bases("llama"), adapter, tmp_path / "both", alpha=1)
    one = oracle.edited_by_taskvec(bases("llama"), alone, tmp_path / "one", alpha=1)
    assert [name for name in both if not both[name].equal(one[name])] == ["model.embed_tokens.weight"]


def edit(tmp_path: Path, tensors: dict[str, Any], **config: Any) -> None:
    base = write_base(tmp_path / "base", {"m.embed.weight": (6, 4), "m.norm.weight": (4,)})
    adapter = write_adapter(tmp_path / "adapter", {f"m.{name}": shape for name, shape in tensors.items()}, **config)
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)


def alone(tmp_path: Path, indices: Any, shape: tuple[int, ...] = (2, 4), name: str = "embed") -> None:
    config = dict(peft_type="TRAINABLE_TOKENS", r=0, lora_alpha=0, token_indices=indices)
    edit(tmp_path, {f"{name}.trainable_tokens_delta": shape}, **config)


@pytest.mark.parametrize("indices", [[1, 6], [-1, 2], [2, 2]], ids=str)
def test_indices_that_name_no_row_or_one_twice_are_refused(indices: list[int], tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="different numbers from 0 to 5"):
        alone(tmp_path, indices)


@pytest.mark.parametrize("indices", [None, [], {"embed": [1, 2]}, "12", [1.0, 2.0], [True, False], [[1], [2]]], ids=str)
def test_indices_that_are_no_list_of_numbers_are_refused(indices: Any, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=r"m\.embed"):
        alone(tmp_path, indices)


@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (2, 5), (2,), (2, 4, 1), (8,)], ids=str)
def test_values_of_another_size_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.embed"):
        alone(tmp_path, [1, 2], shape)


def test_rows_of_a_tensor_that_has_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.norm"):
        alone(tmp_path, [1], (1,), "norm")


@pytest.mark.parametrize("indices", [None, {"other": [1, 2]}, {"embed": [1, 2], "m.embed": [2, 1]}, {"embed": "x"}], ids=str)
def test_rows_beside_a_lora_that_the_config_does_not_name_are_refused(indices: Any, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=r"m\.embed.*indices"):
        edit(tmp_path, {"embed.token_adapter.trainable_tokens_delta": (2, 4)}, trainable_token_indices=indices)


def test_a_lora_and_rows_of_one_module_are_refused(tmp_path: Path) -> None:
    tensors = {**lora("embed", 6, 4), "embed.token_adapter.trainable_tokens_delta": (2, 4)}
    with pytest.raises(tv.AdapterError, match="both"):
        edit(tmp_path, tensors, trainable_token_indices=[1, 2])
