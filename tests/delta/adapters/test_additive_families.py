"""The families that add to a weight what their tensors alone say, against PEFT's merge in float64."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.c3a import layer as c3a_layer
from peft.tuners.c3a.utils import get_circulant_fast
from safetensors.torch import load_file

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .layers import DTYPES, Layers, assert_edited_as_peft_merges, assert_transformer_edited_as_peft_merges, biases, weights

CHATTER = [
    "ignore:Note that `r` is not used in AdaLora:UserWarning",
    "ignore:The following rank_pattern keys:RuntimeWarning",
    "ignore:Sparse invariant checks:UserWarning",
]
pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER + CHATTER]

LINEAR = ["linear", "square"]
CONV2 = ["conv2", "square_conv2", "oblong_conv2", "grouped", "square_grouped", "pointwise", "square_pointwise"]
UNGROUPED = [name for name in CONV2 if "grouped" not in name]
ALL = [*LINEAR, "narrow", "conv1", *CONV2]
LYCORIS = dict(r=2, alpha=5, target_modules=ALL)
PATTERNS = dict(rank_pattern={"linear": 1, "conv.": 3}, alpha_pattern={"square": 7, "conv2|grouped": 2})

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "adalora": (AdaLoraConfig, dict(init_r=3, lora_alpha=5, target_modules=[*LINEAR, *UNGROUPED])),
    "adalora with settings of lora": (
        AdaLoraConfig,
        dict(init_r=3, lora_alpha=5, r=5, use_rslora=True, alpha_pattern={"square": 50}, target_modules=LINEAR),
    ),
    "adalora without alpha": (AdaLoraConfig, dict(init_r=3, lora_alpha=0, target_modules=LINEAR)),
    "loha": (LoHaConfig, LYCORIS),
    "loha with patterns": (LoHaConfig, {**LYCORIS, **PATTERNS}),
    "loha in the cp form": (LoHaConfig, {**LYCORIS, **PATTERNS, "use_effective_conv2d": True}),
    "lokr, whole": (LoKrConfig, {**LYCORIS, "r": 60, "alpha": 400}),
    "lokr, whole, with factor": (LoKrConfig, {**LYCORIS, "r": 60, "alpha": 400, "decompose_factor": 2}),
    "lokr of a product": (LoKrConfig, {**LYCORIS, "r": 1, "decompose_factor": 2}),
    "lokr of two products": (LoKrConfig, {**LYCORIS, "r": 1, "alpha": 30, "decompose_factor": 4, "decompose_both": True}),
    "lokr with patterns": (LoKrConfig, {**LYCORIS, **PATTERNS}),
    "vera": (VeraConfig, dict(r=5, target_modules=[*LINEAR, "narrow", "single"])),
    "randlora": (RandLoraConfig, dict(r=3, randlora_alpha=2, target_modules=[*LINEAR, "narrow", "single"])),
    "randlora of one basis": (RandLoraConfig, dict(r=60, randlora_alpha=20, target_modules=LINEAR)),
    "sparse randlora": (RandLoraConfig, dict(r=2, randlora_alpha=2, sparse=True, target_modules=[*LINEAR, "narrow"])),
    "shira": (ShiraConfig, dict(r=3, random_seed=1, target_modules=LINEAR)),
    "c3a": (C3AConfig, dict(block_size=4, target_modules=LINEAR)),
    "c3a of several block sizes": (
        C3AConfig, dict(block_size=1, block_size_pattern={"square": 8}, target_modules=[*LINEAR, "narrow", "single"]),
    ),
    "miss": (MissConfig, dict(r=4, target_modules=[*LINEAR, "narrow"])),
    "miss with a remainder": (MissConfig, dict(r=5, init_weights=False, target_modules=[*LINEAR, "narrow"])),
    "miss, mini": (MissConfig, dict(r=4, mini_r=2, init_weights="mini", target_modules=LINEAR)),
    "miss, mini, with a remainder": (MissConfig, dict(r=3, mini_r=4, init_weights="mini", target_modules=LINEAR)),
    "miss, bat": (MissConfig, dict(r=4, init_weights="bat", target_modules=LINEAR)),
    "miss, bat, of one block": (MissConfig, dict(r=8, init_weights="bat", target_modules=["square"])),
}  # fmt: skip


def config(case: str) -> Any:
    kind, fields = CASES[case]
    steps = dict(total_step=10) if kind is AdaLoraConfig else {}
    return kind(**fields, **steps)


@pytest.fixture(autouse=True)
def c3a_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT computes C3A's Δ in float32, whatever the model's dtype: too coarse for an oracle."""
    monkeypatch.setattr(c3a_layer, "get_circulant_fast", lambda kernel: get_circulant_fast(kernel.double()))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_is_edited_as_peft_merges_it(case: str, dtypes: str, tmp_path: Path) -> None:
    targets = CASES[case][1]["target_modules"]
    assert_edited_as_peft_merges(config(case), tmp_path, weights(*targets), DTYPES[dtypes])


TRANSFORMERS = {
    "adalora": AdaLoraConfig(init_r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "down_proj"], total_step=9),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "o_proj", "down_proj"]),
    "lokr": LoKrConfig(r=1, alpha=5, target_modules=["q_proj", "o_proj", "down_proj"]),
    "vera": VeraConfig(r=3, target_modules=["q_proj", "k_proj", "down_proj"]),
    "randlora": RandLoraConfig(r=3, randlora_alpha=1, target_modules=["q_proj", "k_proj", "down_proj"]),
    "shira": ShiraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"]),
    "c3a": C3AConfig(block_size=8, target_modules=["q_proj", "k_proj"]),
    "miss": MissConfig(r=4, target_modules=["q_proj", "k_proj", "down_proj"]),
    "miss, bat": MissConfig(r=8, init_weights="bat", target_modules=["q_proj", "k_proj", "down_proj"]),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformer_is_edited_as_peft_merges_it(family: str, bases: Bases, tmp_path: Path) -> None:
    assert_transformer_edited_as_peft_merges(oracle.llama, bases("llama"), TRANSFORMERS[family], tmp_path)


CONV1D = dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)  # attn.c_proj is square
ON_CONV1D = {
    "adalora": AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, **CONV1D),
    "vera": VeraConfig(r=3, **CONV1D),
    "randlora": RandLoraConfig(r=3, randlora_alpha=1, **CONV1D),
}


@pytest.mark.parametrize("family", ON_CONV1D)
def test_a_conv1d_is_edited_the_way_round_it_is_stored(family: str, bases: Bases, tmp_path: Path) -> None:
    assert_transformer_edited_as_peft_merges(oracle.gpt2, bases("gpt2"), ON_CONV1D[family], tmp_path)


BIASED = {
    "adalora": AdaLoraConfig(init_r=3, total_step=9, bias="lora_only", target_modules=LINEAR),
    "vera": VeraConfig(r=3, bias="vera_only", target_modules=LINEAR),
    "randlora": RandLoraConfig(r=3, randlora_alpha=1, bias="randlora_only", target_modules=LINEAR),
    "c3a": C3AConfig(block_size=4, bias="c3a_only", target_modules=LINEAR),
    "miss": MissConfig(r=4, bias="miss_only", target_modules=LINEAR),
}


@pytest.mark.parametrize("family", BIASED)
def test_biases_trained_beside_the_family_get_their_new_values(family: str, tmp_path: Path) -> None:
    assert_edited_as_peft_merges(BIASED[family], tmp_path, weights(*LINEAR) | biases(*LINEAR))


# --- AdaLoRA: ranks that training pruned -----------------------------------------------------------------------------


def pruned(folder: Path, kept: dict[str, list[bool]]) -> Path:
    """An adapter of init_r 3, its modules cut by PEFT on saving to the ranks that are true."""
    settings = AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=LINEAR)
    tuned = get_peft_model(oracle.random_model(Layers()), settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    tuned.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}
    tuned.save_pretrained(folder)
    return folder


PRUNED = {"linear": [True, False, True], "square": [False, True, False]}


def test_a_pruned_adalora_is_scaled_by_the_rank_it_began_with(tmp_path: Path) -> None:
    base, adapter = layers.save(tmp_path / "base"), pruned(tmp_path / "adapter", PRUNED)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = layers.merged(base, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)
    ranks = tv.TaskVector.from_adapter(adapter).terms[0][1].summary()["ranks"]
    assert ranks == {"1": 1, "2": 1}


def test_a_module_pruned_to_rank_0_keeps_its_weight_to_the_bit(tmp_path: Path) -> None:
    base = layers.save(tmp_path / "base")
    adapter = pruned(tmp_path / "adapter", {**PRUNED, "square": [False, False, False]})
    stored = load_file(adapter / "adapter_model.safetensors")
    assert stored["base_model.model.square.lora_A"].shape == (0, 8)
    edited, before = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1), oracle.weights_of(base)
    assert edited["square.weight"].equal(before["square.weight"])
    assert not edited["linear.weight"].equal(before["linear.weight"])


def test_the_product_of_a_module_of_rank_0_is_no_product_of_empty_matrices(tmp_path: Path) -> None:
    adapter = pruned(tmp_path / "adapter", {**PRUNED, "square": [False, False, False]})
    base = tv.Checkpoint.open(layers.save(tmp_path / "base"))
    delta = tv.TaskVector.from_adapter(adapter).terms[0][1].resolve(base, lambda name: True).deltas["square.weight"]
    left, right = delta.factors(np.zeros((8, 0)), np.zeros((0, 8)), np.zeros((0, 1)))
    assert left.shape == (8, 1) and right.shape == (1, 8) and not (left @ right).any()


# --- MiSS: which of the three ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "variants"), [("miss", ()), ("miss, mini", ("mini",)), ("miss, bat", ("bat",))])
def test_a_miss_says_which_of_the_three_it_is(case: str, variants: tuple[str, ...], tmp_path: Path) -> None:
    adapter = layers.train(tmp_path / "adapter", config(case))
    assert tv.TaskVector.from_adapter(adapter).terms[0][1].variants == variants


# --- other spellings of the same file --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_raw_state_dict_gives_the_same_bytes(family: str, bases: Bases, tmp_path: Path) -> None:
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", TRANSFORMERS[family])
    expected = oracle.edited_by_taskvec(bases("llama"), adapter, tmp_path / "out", alpha=1)
    oracle.rewrite_tensors(adapter, lambda held: {f"{name}.default": tensor for name, tensor in held.items()})
    edited = oracle.edited_by_taskvec(bases("llama"), adapter, tmp_path / "again", alpha=1)
    assert all(edited[name].equal(expected[name]) for name in expected)


# --- SHiRA: indices as PEFT on Windows saves them --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_indices_may_be_stored_as_other_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = layers.save(tmp_path / "base"), layers.train(tmp_path / "adapter", config("shira"))
    expected = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    other = shutil.copytree(adapter, tmp_path / "other")
    oracle.rewrite_tensors(other, lambda held: {k: t.to(dtype) if "indices" in k else t for k, t in held.items()})
    edited = oracle.edited_by_taskvec(base, other, tmp_path / "again", alpha=1)
    assert all(edited[name].equal(expected[name]) for name in expected)


def test_indices_in_any_order_and_twice_and_rows_without_any_are_as_in_peft(tmp_path: Path) -> None:
    base, adapter = layers.save(tmp_path / "base"), layers.train(tmp_path / "adapter", config("shira"))
    key = "base_model.model.square.shira_indices"

    def shuffle(held: oracle.Tensors) -> oracle.Tensors:
        mixed = held[key][:, torch.randperm(held[key].shape[1], generator=torch.Generator().manual_seed(3))]
        mixed[0].clamp_(min=2)  # none in the first rows
        mixed[:, 1] = mixed[:, 7]
        return {**held, key: mixed}

    oracle.rewrite_tensors(adapter, shuffle)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), layers.merged(base, adapter), 0.7, oracle.identity)


# --- wider layers ----------------------------------------------------------------------------------------------------


def assert_layer_edited_as_peft_merges(layer: Any, settings: Any, folder: Path, gain: float = 3) -> None:
    """For a model of this layer alone. What PEFT saved is multiplied by `gain`: Δ must not drown in the rounding of W."""

    def model() -> Any:
        return oracle.random_model(torch.nn.Sequential(copy.deepcopy(layer)))

    (folder / "base").mkdir()
    oracle.save_file(model().state_dict(), folder / "base" / "model.safetensors")
    adapter = oracle.train(model(), folder / "adapter", settings)
    oracle.rewrite_tensors(adapter, lambda held: {k: t if "indices" in k else gain * t for k, t in held.items()})
    edited = oracle.edited_by_taskvec(folder / "base", adapter, folder / "out", alpha=0.7)
    merged = oracle.merged_in_double(model().double(), adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(folder / "base"), merged, 0.7, oracle.identity)


WIDE = {
    "conv1d": torch.nn.Conv1d(16, 24, 3),
    "pointwise conv1d": torch.nn.Conv1d(16, 24, 1),
    "conv2d": torch.nn.Conv2d(16, 24, (3, 2)),
    "square conv2d": torch.nn.Conv2d(16, 16, 3),
    "grouped conv2d": torch.nn.Conv2d(32, 16, 3, groups=2),
    "linear": torch.nn.Linear(16, 24),
}


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("layer", WIDE)
def test_a_lokr_in_the_cp_form_is_edited_as_peft_merges_it(layer: str, both: bool, factor: int, tmp_path: Path) -> None:
    settings = LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, decompose_factor=factor, decompose_both=both, target_modules=["0"]
    )
    assert_layer_edited_as_peft_merges(WIDE[layer], settings, tmp_path)


LARGE = {
    "loha": LoHaConfig(r=2, target_modules=["0"]),
    "lokr": LoKrConfig(r=2, target_modules=["0"]),
    "randlora": RandLoraConfig(r=50, randlora_alpha=1, target_modules=["0"]),
    "shira": ShiraConfig(r=3, target_modules=["0"]),
    "c3a": C3AConfig(block_size=300, target_modules=["0"]),
    "miss": MissConfig(r=7, target_modules=["0"]),
    "miss, mini": MissConfig(r=7, mini_r=40, init_weights="mini", target_modules=["0"]),
    "miss, bat": MissConfig(r=60, init_weights="bat", target_modules=["0"]),
}


@pytest.mark.parametrize("family", LARGE)
def test_a_weight_of_several_tiles_is_edited_as_peft_merges_it(family: str, tmp_path: Path) -> None:
    layer = torch.nn.Linear(600, 1200)  # 2.9 MB; a tile is 1 MB
    assert_layer_edited_as_peft_merges(layer, LARGE[family], tmp_path, gain=1000 if family == "c3a" else 3)


def test_a_whole_w2_of_a_conv1d_is_edited_in_the_order_peft_has(tmp_path: Path) -> None:
    settings = LoKrConfig(r=60, alpha=400, decompose_factor=2, target_modules=["0"])
    assert_layer_edited_as_peft_merges(torch.nn.Conv1d(8, 6, 3), settings, tmp_path)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert stored["base_model.model.0.lokr_w2"].shape == (3, 4, 3)
