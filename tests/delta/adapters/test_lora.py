"""LoRA against PEFT: for every kind of adapter PEFT saves, edited = base − α(merged − base)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import taskvec as tv

from . import peft_oracle as oracle
from .conftest import FAMILIES, Bases
from .handmade import lora, write_adapter, write_base

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", dict(r=4, lora_alpha=7, target_modules=ATTENTION + MLP)),
    "rank one": ("llama", dict(r=1, lora_alpha=3, target_modules=["q_proj"])),
    "rslora": ("llama", dict(r=4, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj"])),
    "rank pattern": (
        "llama",
        dict(r=4, lora_alpha=7, target_modules=ATTENTION, rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 6}),
    ),
    "alpha pattern": (
        "llama",
        dict(r=4, lora_alpha=7, target_modules=ATTENTION, alpha_pattern={"v_proj": 1, "layers.0.self_attn.k_proj": 30}),
    ),
    "overlapping patterns": (
        "llama",
        dict(
            r=4,
            lora_alpha=7,
            target_modules=ATTENTION + MLP,
            use_rslora=True,
            rank_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 2, "v_proj|k_proj": 5},
            alpha_pattern={"layers.0.self_attn.q_proj": 20, r"layers\.\d+\.mlp\.(up|down)_proj": 11, "q_proj": 2},
        ),
    ),
    "a key that is no suffix": ("llama", dict(r=4, lora_alpha=7, target_modules=MLP, alpha_pattern={"mlp": 100})),
    "a layers' biases": ("bert", dict(r=2, lora_alpha=5, target_modules=["query", "dense"], bias="lora_only")),
    "all biases": ("bert", dict(r=2, lora_alpha=5, target_modules=["query"], bias="all")),
    "lora bias": ("bert", dict(r=2, lora_alpha=5, target_modules=["query", "value"], lora_bias=True)),
    "modules to save": ("bert", dict(r=2, lora_alpha=5, target_modules=["query"], modules_to_save=["classifier"])),
    "a whole embedding": ("llama", dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"])),
    "an adapted head, with its copy of base's": ("llama", dict(r=2, target_modules=["lm_head", "q_proj"])),
    "conv1d": ("gpt2", dict(r=4, lora_alpha=7, target_modules=GPT2, fan_in_fan_out=True)),
    "conv1d lora bias": ("gpt2", dict(r=4, lora_alpha=7, target_modules=GPT2, fan_in_fan_out=True, lora_bias=True)),
    "conv1d all biases": ("gpt2", dict(r=4, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")),
}


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**fields)


@pytest.mark.parametrize("case", CASES)
def test_an_edit_is_the_base_minus_alpha_times_what_peft_would_add(case: str, bases: Bases, tmp_path: Path) -> None:
    family, fields = CASES[case]
    base, model = bases(family), FAMILIES[family]
    adapter = oracle.train(model(), tmp_path / "adapter", config(**fields))
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_by_peft(model(), base, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_any_mix_of_dtypes_is_computed_in_float32_and_rounded_once(
    base_dtype: str, adapter_dtype: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", DTYPES[base_dtype])
    fields = dict(r=4, lora_alpha=7, target_modules=ATTENTION + MLP, modules_to_save=["lm_head"])
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(**fields), DTYPES[adapter_dtype])
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.3)
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.3, oracle.identity)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adding_an_adapter_once_is_what_peft_merges(dtype: str, bases: Bases, tmp_path: Path) -> None:
    base = bases("llama", DTYPES[dtype])
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(r=4, lora_alpha=7, target_modules=ATTENTION))
    tv.add(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    for name, found in oracle.weights_of(tmp_path / "out").items():
        largest = float(merged[name].abs().max())
        oracle.assert_rounded(found, merged[name].double(), 1e-6 * largest, name)


def test_subtracting_what_was_merged_gives_the_base_back(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(r=4, target_modules=ATTENTION))
    tv.add(base, adapter, alpha=1, output=tmp_path / "merged", fsync=False)
    back = oracle.edited_by_taskvec(tmp_path / "merged", adapter, tmp_path / "back", alpha=1)
    for name, before in oracle.weights_of(base).items():
        torch.testing.assert_close(back[name], before, rtol=0, atol=1e-5)


# --- the direction a square weight is stored in ---------------------------------------------------------------------


@pytest.mark.parametrize("flag", [True, False])
def test_a_square_conv1d_is_transposed_whatever_the_flag_says(flag: bool, bases: Bases, tmp_path: Path) -> None:
    base = bases("gpt2")
    fields = dict(r=4, lora_alpha=7, target_modules=["c_proj"], fan_in_fan_out=True)
    adapter = oracle.train(oracle.gpt2(), tmp_path / "adapter", config(**fields))
    merged = oracle.merged_by_peft(oracle.gpt2(), base, adapter)
    oracle.rewrite_config(adapter, fan_in_fan_out=flag)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 1, oracle.identity)


def test_a_square_linear_is_not_transposed_by_a_lying_flag(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(r=4, target_modules=["q_proj", "o_proj"]))
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    oracle.rewrite_config(adapter, fan_in_fan_out=True)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 1, oracle.identity)


def golden_delta(adapter: Path, module: str, scale: float) -> np.ndarray:
    """s · B @ A in float64: [out, in]."""
    stored = load_file(adapter / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "AB")
    return scale * (b @ a)


def edited_module(base: Path, adapter: Path, output: Path, module: str) -> tuple[np.ndarray, np.ndarray]:
    """A weight before and after α = 2, in float64."""
    edited = oracle.edited_by_taskvec(base, adapter, output, alpha=2)
    before = oracle.weights_of(base)
    return before[f"{module}.weight"].double().numpy(), edited[f"{module}.weight"].double().numpy()


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / math.sqrt(4))])
def test_the_scale_is_alpha_by_r_or_by_its_root(rslora: bool, scale: float, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"x.q.weight": (8, 5)})
    adapter = write_adapter(tmp_path / "adapter", lora("x.q", 8, 5, 4), r=4, lora_alpha=6, use_rslora=rslora)
    before, after = edited_module(base, adapter, tmp_path / "out", "x.q")
    np.testing.assert_allclose(after, before - 2 * golden_delta(adapter, "x.q", scale), atol=1e-5)


# c_proj is square; what its neighbour c_fc shows of the model decides: bias [in] of [out, in] or the other way round
SQUARES = {
    "conv1d by its neighbour": ({"h.c_fc.weight": (8, 32), "h.c_fc.bias": (32,)}, {}, False, True),
    "linear by its neighbour": ({"h.c_fc.weight": (32, 8), "h.c_fc.bias": (32,)}, {"model_type": "gpt2"}, True, False),
    "conv1d by the model type": ({}, {"model_type": "gpt2"}, False, True),
    "unknown model, by the flag": ({}, {"model_type": "new"}, True, True),
    "unknown model, no flag": ({}, {"model_type": "new"}, False, False),
}


@pytest.mark.parametrize("case", SQUARES)
def test_a_square_c_proj_is_read_as_the_base_stores_it(case: str, tmp_path: Path) -> None:
    neighbours, model_config, flag, transposed = SQUARES[case]
    base = write_base(tmp_path / "base", {"h.c_proj.weight": (8, 8), **neighbours}, **model_config)
    adapter = write_adapter(tmp_path / "adapter", lora("h.c_proj", 8, 8), lora_alpha=2, fan_in_fan_out=flag)
    before, after = edited_module(base, adapter, tmp_path / "out", "h.c_proj")
    delta = golden_delta(adapter, "h.c_proj", 1.0)
    np.testing.assert_allclose(after, before - 2 * (delta.T if transposed else delta), atol=1e-5)


# --- names: the same adapter under other names -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A llama adapter with a replaced head, and the bytes of base − adapter."""
    root = tmp_path_factory.mktemp("plain")
    fields = dict(r=4, lora_alpha=7, target_modules=ATTENTION, modules_to_save=["lm_head"])
    adapter = oracle.train(oracle.llama(), root / "adapter", config(**fields))
    oracle.edited_by_taskvec(bases("llama"), adapter, root / "out", alpha=0.5)
    return adapter, (root / "out" / "model.safetensors").read_bytes()


def _insert(before: str, infix: str) -> Callable[[str], str]:
    return lambda key: key.replace(before, infix + before, 1)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "raw state dict": lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
    "raw replaced head": lambda key: key.replace("lm_head.", "lm_head.modules_to_save.default."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda key: "_orig_mod." + key,
    "sharded by FSDP": _insert("self_attn.", "_fsdp_wrapped_module."),
    "checkpointed": _insert("self_attn.", "_checkpoint_wrapped_module."),
    "several wrappers": _insert("self_attn.", "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_wrappers_add_to_the_names_changes_no_byte(
    spelling: str, bases: Bases, plain: tuple[Path, bytes], tmp_path: Path
) -> None:
    adapter, expected = shutil.copytree(plain[0], tmp_path / "adapter"), plain[1]
    keys = load_file(adapter / "adapter_model.safetensors").keys()
    rename = SPELLINGS[spelling]
    assert any(rename(key) != key for key in keys)
    oracle.rewrite_tensors(adapter, lambda tensors: {rename(key): tensor for key, tensor in tensors.items()})
    oracle.edited_by_taskvec(bases("llama"), adapter, tmp_path / "out", alpha=0.5)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_a_base_saved_without_its_first_component_is_matched(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.gpt2().transformer, tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in oracle.weights_of(base)
    adapter = oracle.train(oracle.gpt2(), tmp_path / "adapter", config(r=4, target_modules=GPT2, fan_in_fan_out=True))
    whole = oracle.save_model(oracle.gpt2(), tmp_path / "whole")
    merged = oracle.merged_by_peft(oracle.gpt2(), whole, adapter)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 1, lambda name: f"transformer.{name}")


def test_an_adapter_trained_without_the_first_component_is_matched(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = oracle.train(oracle.llama().model, tmp_path / "adapter", config(r=4, target_modules=ATTENTION))
    stored = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in stored
    oracle.save_model(oracle.llama().model, tmp_path / "headless")
    merged = oracle.merged_by_peft(oracle.llama().model, tmp_path / "headless", adapter)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    merged = {f"model.{name}": tensor for name, tensor in merged.items()}
    merged["lm_head.weight"] = oracle.weights_of(base)["lm_head.weight"]
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 1, oracle.identity)


def test_a_sharded_base_gives_the_tensors_of_a_whole_one(bases: Bases, plain: tuple[Path, bytes], tmp_path: Path) -> None:
    adapter, expected = plain
    base = oracle.save_model(oracle.llama(), tmp_path / "base", max_shard_size="4KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.5)
    (tmp_path / "whole.safetensors").write_bytes(expected)
    whole = load_file(tmp_path / "whole.safetensors")
    assert edited.keys() == whole.keys()
    assert all(edited[name].equal(whole[name]) for name in whole)


# --- configs ----------------------------------------------------------------------------------------------------------


def test_a_config_of_three_fields_is_enough(bases: Bases, plain: tuple[Path, bytes], tmp_path: Path) -> None:
    adapter = shutil.copytree(plain[0], tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 7}))
    oracle.edited_by_taskvec(bases("llama"), adapter, tmp_path / "out", alpha=0.5)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == plain[1]


def test_without_r_and_alpha_the_rank_is_the_tensors_own_and_alpha_is_pefts_default(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {"x.q.weight": (8, 5)})
    adapter = write_adapter(tmp_path / "adapter", lora("x.q", 8, 5, 4))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    before, after = edited_module(base, adapter, tmp_path / "out", "x.q")
    default = LoraConfig().lora_alpha
    np.testing.assert_allclose(after, before - 2 * golden_delta(adapter, "x.q", default / 4), atol=1e-5)


@pytest.mark.parametrize("order", [["q_proj", "layers.0.self_attn.q_proj"], ["layers.0.self_attn.q_proj", "q_proj"]])
def test_of_two_alpha_patterns_the_first_in_the_file_wins_as_in_peft(order: list[str], bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(r=4, lora_alpha=7, target_modules=["q_proj"]))
    oracle.rewrite_config(adapter, alpha_pattern={key: 10 + place * 50 for place, key in enumerate(order)})
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 1, oracle.identity)


def notes(base: Path, adapter: Path) -> tuple[str, ...]:
    return (tv.Checkpoint.open(base) - tv.TaskVector.from_adapter(adapter)).plan().notes


def test_an_adapter_of_a_4_bit_base_is_taken_with_a_note(bases: Bases, plain: tuple[Path, bytes], tmp_path: Path) -> None:
    adapter = shutil.copytree(plain[0], tmp_path / "adapter")
    assert notes(bases("llama"), adapter) == ()
    oracle.rewrite_config(adapter, base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit")
    (note,) = notes(bases("llama"), adapter)
    assert "unsloth/llama-3-8b-bnb-4bit" in note and "quantised" in note


def test_lost_biases_of_an_old_peft_are_noted(bases: Bases, tmp_path: Path) -> None:
    fields = dict(r=2, target_modules=["query"], bias="lora_only")
    adapter = oracle.train(oracle.bert(), tmp_path / "adapter", config(**fields))
    assert notes(bases("bert"), adapter) == ()
    oracle.rewrite_tensors(adapter, lambda stored: {k: v for k, v in stored.items() if not k.endswith(".bias")})
    (note,) = notes(bases("bert"), adapter)
    assert "lora_only" in note


# --- another base than the one it was trained on ----------------------------------------------------------------------


def test_with_its_origin_an_adapter_is_subtracted_from_another_model(bases: Bases, tmp_path: Path) -> None:
    origin = bases("llama")
    model = oracle.save_model(oracle.random_model(oracle.llama(), seed=9), tmp_path / "model")
    fields = dict(r=4, lora_alpha=7, target_modules=ATTENTION, modules_to_save=["lm_head"])
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config(**fields))
    edited = oracle.edited_by_taskvec(model, adapter, tmp_path / "out", alpha=0.5, base=origin)
    merged, trained_from = oracle.merged_by_peft(oracle.llama(), origin, adapter), oracle.weights_of(origin)
    before = oracle.weights_of(model)
    shifted = {name: before[name].double() + merged[name].double() - trained_from[name].double() for name in before}
    oracle.assert_is_base_minus(edited, before, shifted, 0.5, oracle.identity)


def test_an_origin_the_adapter_does_not_fit_is_refused(bases: Bases, plain: tuple[Path, bytes], tmp_path: Path) -> None:
    other = oracle.save_model(oracle.llama(hidden_size=32), tmp_path / "other")
    with pytest.raises(tv.ShapeMismatchError, match="other"):
        tv.subtract(bases("llama"), plain[0], alpha=1, base=other, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
