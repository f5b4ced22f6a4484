"""What the additive families refuse, each in one line that says what was found; and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import taskvec as tv
from taskvec.delta.adapters import loha, lokr
from taskvec.delta.adapters.adapter import Family, Module, Weight

from . import peft_oracle as oracle
from .handmade import write_adapter, write_base

Stored = dict[str, Any]  # suffix -> shape, or the tensor itself
MODEL = {"m.q.weight": (6, 4), "m.conv.weight": (6, 4, 3), "m.conv2.weight": (4, 4, 3, 3)}


@dataclass
class Good:
    """An adapter of m.q, [6, 4], that is taken; the cases change it."""

    tensors: Stored
    config: dict[str, Any] = field(default_factory=dict)
    shared: Stored = field(default_factory=dict)


GOOD = {
    "ADALORA": Good({"lora_A": (2, 4), "lora_B": (6, 2), "lora_E": (2, 1)}, dict(init_r=2, lora_alpha=4)),
    "LOHA": Good({"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 2), "hada_w2_b": (2, 4)}),
    "LOKR": Good({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2)}),
    "VERA": Good({"vera_lambda_b": (6,), "vera_lambda_d": (2,)}, {}, {"vera_A": (2, 9), "vera_B": (9, 2)}),
    "RANDLORA": Good(
        {"randlora_lambda": (2, 2), "randlora_gamma": (2, 4)}, {}, {"randlora_A": (2, 1, 9), "randlora_B": (9, 5, 2)}
    ),
    "SHIRA": Good({"shira_weight": (2,), "shira_indices": torch.tensor([[0, 5], [3, 1]], dtype=torch.int32)}),
    "C3A": Good({"c3a_kernel": (3, 2, 2)}, dict(r=0)),
    "MISS": Good({"miss_block": (2, 6)}),
}


def subtract(family: str, tensors: Stored, config: dict[str, Any], shared: Stored, folder: Path, **base: Any) -> None:
    model = write_base(folder / "base", {**MODEL, **base.pop("shapes", {})}, **base)
    named = {f"m.{name}" if "." in name else f"m.q.{name}": stored for name, stored in tensors.items()}
    settings = {"peft_type": family, "lora_alpha": 0, **config}  # and r = 2
    adapter = write_adapter(folder / "adapter", {**named, **shared}, **settings)
    tv.subtract(model, adapter, alpha=1, output=folder / "out", fsync=False)


@pytest.mark.parametrize("family", GOOD)
def test_the_adapters_that_the_cases_change_are_taken(family: str, tmp_path: Path) -> None:
    good = GOOD[family]
    subtract(family, good.tensors, good.config, good.shared, tmp_path)
    edited, before = oracle.weights_of(tmp_path / "out"), oracle.weights_of(tmp_path / "base")
    assert not edited["m.q.weight"].equal(before["m.q.weight"])


GONE = None
INDICES = torch.tensor([[0, 5], [3, 1]])
CASES: list[tuple[str, Stored, dict[str, Any], Stored, str]] = [
    # family, changes of tensors, of the config, of shared tensors; the message
    ("ADALORA", {"lora_E": GONE}, {}, {}, "no lora_E"),
    ("ADALORA", {"lora_A": GONE}, {}, {}, "no lora_A"),
    ("ADALORA", {"lora_E": (2,)}, {}, {}, r"lora_E: found shape \[2\], expected \[2, 1\]"),
    ("ADALORA", {"lora_B": (6, 3)}, {}, {}, r"lora_B: found shape \[6, 3\], expected \[6, 2\]"),
    ("ADALORA", {}, dict(init_r=3), {}, "found rank 2, expected 3"),
    ("ADALORA", {}, dict(rank_pattern={"m.q.lora_E": [True, False]}), {}, "found rank 2, expected 1"),
    ("ADALORA", {}, dict(rank_pattern={"m.q.lora_E": 2}), {}, "rank_pattern is not understood"),
    ("ADALORA", {}, dict(rank_pattern={"m.q.lora_E": [True, True]}, lora_alpha=0), {}, "lora_alpha is not positive"),
    ("ADALORA", {}, dict(init_r=0), {}, "init_r is 0"),
    ("ADALORA", {}, dict(layer_replication=[[0, 2]]), {}, "layer_replication"),
    ("ADALORA", {}, dict(use_dora=True), {}, "use_dora"),
    ("ADALORA", {"lora_A": torch.zeros(0)}, {}, {}, "empty"),
    ("ADALORA", {"conv.lora_A": (2, 12), "conv.lora_B": (6, 2), "conv.lora_E": (2, 1)}, {}, {}, "weights of 2 or 4 axes"),
    ("LOHA", {"hada_w2_b": GONE}, {}, {}, "no hada_w2_b"),
    ("LOHA", {"hada_w1_b": GONE}, {}, {}, "no hada_w1_b"),
    ("LOHA", {"hada_w2_b": (1, 4), "hada_w2_a": (6, 1)}, {}, {}, r"hada_w2_a: found shape \[6, 1\], expected \[6, 2\]"),
    ("LOHA", {"hada_w1_a": (4, 2)}, {}, {}, r"hada_w1_a: found shape \[4, 2\], expected \[6, 2\]"),
    ("LOHA", {"hada_w1_b": torch.zeros(0, 4)}, {}, {}, "empty"),
    ("LOHA", {}, dict(r=3), {}, "found rank 2, expected 3"),
    ("LOHA", {}, dict(rank_pattern={"q": 3}), {}, "found rank 2, expected 3"),
    ("LOHA", {"hada_t1": (2, 2, 1, 1), "hada_t2": (2, 2, 1, 1)}, {}, {}, "hada_t1 is for convolutions"),
    ("LOKR", {"lokr_w1": GONE}, {}, {}, "no lokr_w1_b"),
    ("LOKR", {"lokr_w2_a": GONE}, {}, {}, "no lokr_w2_a"),
    ("LOKR", {"lokr_w1_a": (2, 2)}, {}, {}, "found lokr_w1 and lokr_w1_a, expected either"),
    ("LOKR", {"lokr_w2": (3, 2)}, {}, {}, "found lokr_w2 and lokr_w2_a, lokr_w2_b, expected either"),
    ("LOKR", {"lokr_w1": (3, 2)}, {}, {}, r"its Δ is \[3·3, 2·2\], expected \[6, 4\]"),
    ("LOKR", {"lokr_w1": (2, 1)}, {}, {}, r"its Δ is \[2·3, 1·2\], expected \[6, 4\]"),
    ("LOKR", {"lokr_w1": GONE, "lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2)}, {}, {}, "its factors have ranks"),
    ("LOKR", {"lokr_t2": (2, 2, 1, 1)}, {}, {}, "lokr_t2 is for convolutions"),
    ("LOKR", {"lokr_w2_a": GONE, "lokr_w2_b": GONE, "lokr_w2": (3, 2, 1)}, {}, {}, "lokr_w2 is .* expected 2 axes"),
    ("LOKR", {"lokr_w2_a": GONE, "lokr_w2_b": GONE, "lokr_w2": (3, 2)}, dict(r=0), {}, "r is 0"),
    ("LOKR", {}, dict(r=5), {}, "found rank 2, expected 5"),
    ("VERA", {}, dict(save_projection=False), {}, "save_projection is false.*Merge it with PEFT"),
    ("VERA", {}, {}, {"vera_A": GONE}, "no base_model.vera_A.*Merge it with PEFT"),
    ("VERA", {}, {}, {"vera_A": (2, 3)}, r"expected at least \[2, 4\] and \[6, 2\]"),
    ("VERA", {}, {}, {"vera_B": (5, 2)}, r"expected at least \[2, 4\] and \[6, 2\]"),
    ("VERA", {}, {}, {"vera_A": (3, 9)}, r"expected at least \[2, 4\] and \[6, 2\]"),
    ("VERA", {}, {}, {"vera_B": (9, 3)}, r"expected at least \[2, 4\] and \[6, 2\]"),
    ("VERA", {"vera_lambda_b": (4,)}, {}, {}, r"vera_lambda_b: found shape \[4\], expected \[6\]"),
    ("VERA", {"vera_lambda_d": GONE}, {}, {}, "no vera_lambda_d"),
    ("VERA", {}, dict(r=3), {}, "found rank 2, expected 3"),
    ("RANDLORA", {}, dict(save_projection=False), {}, "save_projection is false.*Merge it with PEFT"),
    ("RANDLORA", {}, {}, {"randlora_B": GONE}, "no base_model.randlora_B.*Merge it with PEFT"),
    ("RANDLORA", {}, {}, {"randlora_B": (5, 5, 2)}, r"expected at least \[2, 1, 4\] and \[6, 2, 2\]"),
    ("RANDLORA", {}, {}, {"randlora_B": (9, 1, 2)}, r"expected at least \[2, 1, 4\] and \[6, 2, 2\]"),
    ("RANDLORA", {}, {}, {"randlora_B": (9, 5, 3)}, r"expected at least \[2, 1, 4\] and \[6, 2, 2\]"),
    ("RANDLORA", {}, {}, {"randlora_A": (2, 2, 9)}, r"expected at least \[2, 1, 4\] and \[6, 2, 2\]"),
    ("RANDLORA", {}, {}, {"randlora_A": (2, 9)}, r"expected at least \[2, 1, 4\] and \[6, 2, 2\]"),
    ("RANDLORA", {"randlora_A": (2, 1, 9)}, {}, {}, "should be a copy of base_model.model.randlora_A, but differs"),
    ("RANDLORA", {"randlora_gamma": (2, 6)}, {}, {}, r"randlora_gamma: found shape \[2, 6\], expected \[2, 4\]"),
    ("RANDLORA", {"randlora_lambda": (2, 3)}, {}, {}, r"randlora_lambda: found shape \[2, 3\], expected \[2, 2\]"),
    ("RANDLORA", {}, dict(r=3), {}, "found rank 2, expected 3"),
    ("SHIRA", {"shira_indices": INDICES + 1}, {}, {}, r"shira_indices hold 6, expected whole numbers inside \[6, 4\]"),
    ("SHIRA", {"shira_indices": INDICES.flip(0)}, {}, {}, r"shira_indices hold 5, expected whole numbers inside \[6, 4\]"),
    ("SHIRA", {"shira_indices": INDICES - 1}, {}, {}, "shira_indices hold -1"),
    ("SHIRA", {"shira_indices": INDICES / 2}, {}, {}, "shira_indices hold 2.5"),
    ("SHIRA", {"shira_indices": INDICES * float("nan")}, {}, {}, "shira_indices hold nan"),
    ("SHIRA", {"shira_indices": INDICES.bfloat16()}, {}, {}, "shira_indices are BF16"),
    ("SHIRA", {"shira_indices": GONE}, {}, {}, "no shira_indices"),
    ("SHIRA", {"shira_weight": (3,)}, {}, {}, r"shira_indices: found shape \[2, 2\], expected \[2, 3\]"),
    ("C3A", {"c3a_kernel": (2, 3, 2)}, {}, {}, r"its Δ is \[4, 6\], expected \[6, 4\]"),
    ("C3A", {"c3a_kernel": (6, 4)}, {}, {}, r"c3a_kernel: found shape \[6, 4\], expected \[any, any, any\]"),
    ("MISS", {}, dict(init_weights="new"), {}, "init_weights is new"),
    ("MISS", {}, dict(init_weights="bat"), {}, r"miss_block: found shape \[2, 6\], expected \[3, 2, 2\]"),
    ("MISS", {"miss_block": (3, 2, 2)}, {}, {}, r"miss_block: found shape \[3, 2, 2\], expected \[2, 6\]"),
    ("MISS", {"miss_block": (1, 4, 4)}, dict(init_weights="bat", r=4), {}, r"its Δ is made of blocks \[4, 4\]"),
    ("MISS", {"miss_block": (2, 3, 3)}, dict(init_weights="bat", r=3), {}, r"its Δ is made of blocks \[3, 3\]"),
    ("MISS", {}, dict(init_weights="mini", mini_r=3), {}, r"miss_block: found shape \[2, 6\], expected \[2, 3\]"),
    ("MISS", {"miss_block": (2, 4)}, dict(init_weights="mini", mini_r=4), {}, r"its Δ is \[2, 4\] repeated"),
    ("MISS", {}, dict(mini_r=0), {}, "mini_r is 0"),
    ("MISS", {"miss_block": (5, 6)}, dict(r=5), {}, r"its Δ is \[5, 6\] repeated"),
    ("MISS", {"miss_block": (6,)}, {}, {}, "miss_block is .*, expected 2 or 3 axes"),
    ("MISS", {}, dict(r=4), {}, "found rank 2, expected 4"),
]  # fmt: skip


def changed(stored: Stored, changes: Stored) -> Stored:
    return {name: value for name, value in {**stored, **changes}.items() if value is not GONE}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4][:40]}")
def test_what_does_not_fit_is_refused_by_name(case: tuple[str, Stored, dict[str, Any], Stored, str], tmp_path: Path) -> None:
    family, tensors, config, shared, message = case
    good = GOOD[family]
    with pytest.raises(tv.MismatchError, match=message) as refused:
        subtract(family, changed(good.tensors, tensors), {**good.config, **config}, changed(good.shared, shared), tmp_path)
    assert "\n" not in str(refused.value) and "adapter" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", GOOD)
def test_a_field_that_may_change_the_meaning_is_refused(family: str, tmp_path: Path) -> None:
    good = GOOD[family]
    with pytest.raises(tv.AdapterError, match="use_novelty"):
        subtract(family, good.tensors, {**good.config, "use_novelty": True}, good.shared, tmp_path)


@pytest.mark.parametrize("family", ["LOHA", "LOKR", "SHIRA", "C3A", "MISS"])
def test_a_conv1d_is_refused_where_peft_knows_none(family: str, tmp_path: Path) -> None:
    good = GOOD[family]
    tensors = {f"c_fc.{name}": stored for name, stored in good.tensors.items()}
    with pytest.raises(tv.AdapterError, match=r"c_fc.weight is \[4, 6\], stored \[in, out\]"):
        subtract(family, tensors, good.config, {}, tmp_path, shapes={"m.c_fc.weight": (4, 6)}, model_type="gpt2")


@pytest.mark.parametrize("family", ["VERA", "RANDLORA", "SHIRA", "C3A", "MISS"])
def test_a_convolution_is_refused_where_peft_knows_none(family: str, tmp_path: Path) -> None:
    good = GOOD[family]
    tensors = {f"conv.{name}": stored for name, stored in good.tensors.items()}
    with pytest.raises(tv.AdapterError, match=r"conv.weight is \[6, 4, 3\].* weights of 2 axes"):
        subtract(family, tensors, good.config, good.shared, tmp_path)


CORES = {
    "LOHA": ("hada_t2", {"hada_w1_a": (2, 6), "hada_w1_b": (2, 4), "hada_w2_a": (2, 6), "hada_w2_b": (2, 4)}),
    "LOKR": ("lokr_t2", {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 2)}),
}


@pytest.mark.parametrize("family", CORES)
@pytest.mark.parametrize("core", [(2, 2, 3, 1), (2, 2, 3), (2, 2, 1, 3), (2, 2, 4, 1), (1, 2, 3, 1)])
def test_a_core_must_have_the_kernel_of_the_convolution(family: str, core: tuple[int, ...], tmp_path: Path) -> None:
    name, stored = CORES[family]
    others = {"hada_t1": (2, 2, 3, 1)} if family == "LOHA" else {}
    tensors = {f"conv.{suffix}": shape for suffix, shape in {**stored, **others, name: core}.items()}
    if core == (2, 2, 3, 1):
        return subtract(family, tensors, {}, {}, tmp_path)
    with pytest.raises(tv.ShapeMismatchError, match=rf"{name}: found shape .*, expected \[2, 2, 3, 1\]"):
        subtract(family, tensors, {}, {}, tmp_path)


@pytest.mark.parametrize("kernel", [(9, 1), (1, 9), (3, 1), (9,), ()])
def test_a_whole_w2_must_have_the_kernel_of_the_convolution(kernel: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"conv2.lokr_w1": (2, 2), "conv2.lokr_w2": (2, 2, *kernel)}
    with pytest.raises(tv.MismatchError, match=r"expected"):
        subtract("LOKR", tensors, {}, {}, tmp_path)


def test_one_core_of_two_is_refused(tmp_path: Path) -> None:
    tensors = {f"conv.{suffix}": shape for suffix, shape in {**CORES["LOHA"][1], "hada_t1": (2, 2, 3, 1)}.items()}
    with pytest.raises(tv.AdapterError, match="no hada_t2"):
        subtract("LOHA", tensors, {}, {}, tmp_path)


# --- modules of a file that has no config, where the scale is given ---------------------------------------------------


def module(family: Family, shapes: dict[str, tuple[int, ...]], folder: Path, scale: float) -> Module:
    adapter = tv.Checkpoint.open(write_adapter(folder / "adapter", shapes) / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): stored for name, stored in adapter.tensors.items()}
    return Module("conv", family, tensors, adapter.path, scale=scale)


def weight(folder: Path) -> Weight:
    stored = tv.Checkpoint.open(write_base(folder / "base", MODEL)).tensors["m.conv.weight"]
    return Weight(stored, stored, transposed=False)


@pytest.mark.parametrize("family", [loha.FAMILY, lokr.FAMILY], ids=lambda family: family.name)
def test_without_a_config_the_scale_is_the_modules(family: Family, tmp_path: Path) -> None:
    shapes = {"hada_t1": (2, 2, 3, 1), "hada_t2": (2, 2, 3, 1)} if family.name == "LOHA" else {"lokr_t2": (2, 2, 3, 1)}
    held = module(family, {**CORES[family.name][1], **shapes}, tmp_path, scale=0.375)
    assert family.weight(held, weight(tmp_path)).formula.scale == 0.375


def test_a_whole_w2_of_a_conv1d_is_refused_unless_it_is_pefts(tmp_path: Path) -> None:
    held = module(lokr.FAMILY, {"lokr_w1": (2, 2), "lokr_w2": (3, 2, 3)}, tmp_path, scale=1)
    with pytest.raises(tv.AdapterError, match="PEFT and LyCORIS disagree"):
        lokr.FAMILY.weight(held, weight(tmp_path))
