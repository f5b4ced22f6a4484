"""LoRA on every kind of layer, DoRA, and initialisations that take a part out of the base, all against PEFT's merge."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import taskvec as tv

from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import write_adapter, write_base

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

LAYERS = ["embedding", "square", "conv1", "conv2", "conv3", "pointwise", "linear"]


class Layers(nn.Module):
    """One of each kind of layer, square ones among them, where shapes do not tell which way round a factor goes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.square = nn.Embedding(8, 8)
        self.conv1 = nn.Conv1d(8, 6, 3)
        self.conv2 = nn.Conv2d(6, 6, 3)
        self.conv3 = nn.Conv3d(6, 4, (1, 2, 3))
        self.pointwise = nn.Conv2d(6, 6, 1)
        self.linear = nn.Linear(4, 4)


def save_layers(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    model = oracle.random_model(Layers()).to(dtype)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def merged_layers(base: Path, adapter: Path) -> oracle.Tensors:
    """PEFT's merge in float64: its float32 merge of a convolution is itself off by more than 1e-6 of the largest Δ."""
    model = Layers().double()
    model.load_state_dict({name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()})
    return oracle.merged_in_double(model, adapter)


CASES: dict[str, dict[str, Any]] = {
    "plain": dict(lora_alpha=5),
    "rslora": dict(lora_alpha=5, use_rslora=True),
    "patterns": dict(lora_alpha=5, rank_pattern={"conv2": 3, "embedding": 1}, alpha_pattern={"conv.": 9, "square": 2}),
    "lora bias": dict(lora_alpha=5, lora_bias=True),
    "all biases": dict(lora_alpha=5, bias="all"),
    "dora": dict(lora_alpha=5, use_dora=True),
    "dora with rslora and patterns": dict(
        lora_alpha=5, use_dora=True, use_rslora=True, rank_pattern={"conv2": 3, "square": 4}
    ),
}
BIASED = ["conv1", "conv2", "conv3", "pointwise", "linear"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_is_edited_as_peft_merges_it(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_layers(tmp_path / "base", dtype)
    targets = BIASED if "lora bias" in case else LAYERS
    config = LoraConfig(r=2, target_modules=targets, **CASES[case])
    adapter = oracle.train(oracle.random_model(Layers()), tmp_path / "adapter", config)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = merged_layers(base, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)
    before = oracle.weights_of(base)
    assert all(not edited[f"{layer}.weight"].equal(before[f"{layer}.weight"]) for layer in targets)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_on_a_conv1d_has_one_norm_per_output(rslora: bool, bases: Bases, tmp_path: Path) -> None:
    base, leaves = bases("gpt2"), ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square
    config = LoraConfig(r=3, lora_alpha=5, target_modules=leaves, use_dora=True, use_rslora=rslora, fan_in_fan_out=True)
    adapter = oracle.train(oracle.gpt2(), tmp_path / "adapter", config)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_in_double(oracle.in_double(oracle.gpt2(), base), adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)


def test_doras_magnitudes_may_have_the_suffix_of_a_raw_dump(bases: Bases, tmp_path: Path) -> None:
    base, config = bases("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config)
    expected = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    raw = shutil.copytree(adapter, tmp_path / "raw")
    suffix = "lora_magnitude_vector"
    oracle.rewrite_tensors(raw, lambda held: {k.replace(suffix, f"{suffix}.default.weight"): t for k, t in held.items()})
    edited = oracle.edited_by_taskvec(base, raw, tmp_path / "again", alpha=1)
    assert all(edited[name].equal(expected[name]) for name in expected)


def test_a_dora_of_one_chunk_and_of_many_give_the_same_bytes(tmp_path: Path) -> None:
    # 3 MB of bf16: several tiles, batches of other sizes on a device, and columns normed over all of them
    shapes = {"wte.weight": (3000, 512), "lin.weight": (512, 3000)}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, tmp_path / "base.safetensors")
    tensors = {
        "wte.lora_embedding_A": (2, 3000), "wte.lora_embedding_B": (512, 2), "wte.lora_magnitude_vector": (512,),
        "lin.lora_A.weight": (2, 3000), "lin.lora_B.weight": (512, 2), "lin.lora_magnitude_vector": (512,),
    }  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", tensors, use_dora=True)
    edited = tv.Checkpoint.open(tmp_path / "base.safetensors") - tv.TaskVector.from_adapter(adapter)
    for jobs in (1, 3):
        edited.save(tmp_path / f"{jobs}.safetensors", jobs=jobs, fsync=False)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()
    before, after = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "1.safetensors")
    held = {
        k.removeprefix("base_model.model."): t.double() for k, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    for name, axis in (("wte", 0), ("lin", 1)):
        part = "embedding_A" if name == "wte" else "A.weight"
        a, b = held[f"{name}.lora_{part}"], held[f"{name}.lora_{part.replace('A', 'B', 1)}"]
        weight = before[f"{name}.weight"].double()
        direction = weight + 2 * ((b @ a).T if name == "wte" else b @ a)
        merged = direction / direction.norm(dim=axis, keepdim=True) * held[f"{name}.lora_magnitude_vector"].unsqueeze(axis)
        oracle.assert_rounded(after[f"{name}.weight"], 2 * weight - merged, 1e-5, name)


# --- initialisations that take a part out of the base -----------------------------------------------------------------


def pissa(bases: Bases, folder: Path, init: str, **fields: Any) -> tuple[Path, LoraConfig]:
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=init, **fields
    )
    return oracle.train(oracle.in_double(oracle.llama(), bases("llama")).float(), folder, config), config


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_an_initialisation_took_out_of_the_base_is_taken_out(
    init: str, rslora: bool, bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama")
    adapter, _ = pissa(bases, tmp_path / "adapter", init, use_rslora=rslora)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    before = oracle.weights_of(base)
    for name, found in edited.items():  # PEFT decomposes in float32, so it is itself exact to about 1e-6 of the weight only
        change = merged[name].double() - before[name].double()
        np.testing.assert_allclose(
            found.double(), before[name].double() - 0.7 * change, atol=5e-6 * float(before[name].abs().max())
        )
        independent = _without_the_largest(
            before[name].double(), load_file(adapter / "adapter_model.safetensors"), name, init, rslora
        )
        exact = before[name].double() - 0.7 * independent
        oracle.assert_rounded(found, exact, 1e-6 * float(independent.abs().max()), name)


def _without_the_largest(weight: torch.Tensor, held: oracle.Tensors, name: str, init: str, rslora: bool) -> torch.Tensor:
    """Δ in float64, by a full SVD or QR."""
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    if f"{key}A.weight" not in held:
        return torch.zeros_like(weight)
    scale = 5 / 3**0.5 if rslora else 5 / 3
    product = scale * held[f"{key}B.weight"].double() @ held[f"{key}A.weight"].double()
    if init == "pissa":
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return product - u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    q, r = torch.linalg.qr(weight)
    return product - scale * q[:, :3] @ r[:3]


def test_pissa_on_a_conv1d_is_taken_out_the_right_way_round(bases: Bases, tmp_path: Path) -> None:
    base = bases("gpt2")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["c_proj", "c_fc"], init_lora_weights="pissa", fan_in_fan_out=True)
    adapter = oracle.train(oracle.in_double(oracle.gpt2(), base).float(), tmp_path / "adapter", config)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=1)
    merged, before = oracle.merged_by_peft(oracle.gpt2(), base, adapter), oracle.weights_of(base)
    for name, found in edited.items():
        change = merged[name].double() - before[name].double()
        np.testing.assert_allclose(
            found.double(), before[name].double() - change, atol=5e-6 * float(before[name].abs().max())
        )


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_a_converted_pissa_is_plain_lora(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    model = oracle.in_double(oracle.llama(), base).float()
    tuned = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa")
    )
    with oracle.quietly():
        tuned.peft_config["default"].init_lora_weights = True
        tuned.save_pretrained(tmp_path / "initial")
        tuned.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(6)) * 0.1)
    with oracle.quietly():
        tuned.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
        trained = tuned.merge_and_unload().state_dict()
    edited = oracle.edited_by_taskvec(base, tmp_path / "adapter", tmp_path / "out", alpha=-1)
    assert tv.inspect(tmp_path / "adapter").adapter["ranks"] == {"6": 4}
    for name, found in edited.items():
        torch.testing.assert_close(found, trained[name], rtol=0, atol=5e-6)


def test_pissa_where_peft_has_none_is_refused(tmp_path: Path) -> None:
    adapter = oracle.train(Layers(), tmp_path / "adapter", LoraConfig(r=2, target_modules=["conv2"]))
    oracle.rewrite_config(adapter, init_lora_weights="pissa")
    with pytest.raises(tv.AdapterError, match="pissa"):
        oracle.edited_by_taskvec(save_layers(tmp_path / "base"), adapter, tmp_path / "out", alpha=1)


# --- BD-LoRA ----------------------------------------------------------------------------------------------------------


def test_block_diagonal_factors_are_spread_out(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    spread = dict(
        target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=2, match_strict=False
    )
    fields = dict(target_modules=["q_proj", "o_proj", "up_proj", "down_proj", "k_proj"], use_bdlora=spread)
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", LoraConfig(r=4, lora_alpha=7, **fields))
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)


def test_blocks_that_do_not_divide_the_shapes_are_refused(tmp_path: Path) -> None:
    adapter = write_adapter(
        tmp_path / "a", {"m.q.lora_A.weight": (2, 4), "m.q.lora_B.weight": (6, 2)},
        use_bdlora={"target_modules_bd_b": ["q"], "nblocks": 5},
    )  # fmt: skip
    with pytest.raises(tv.AdapterError, match="nblocks 5 of its shapes"):
        oracle.edited_by_taskvec(write_base(tmp_path / "base"), adapter, tmp_path / "out", alpha=1)


def test_block_settings_that_are_no_object_are_refused(tmp_path: Path) -> None:
    tensors = {"m.q.lora_A.weight": (2, 4), "m.q.lora_B.weight": (6, 2)}
    adapter = write_adapter(tmp_path / "a", tensors, use_bdlora=True)
    with pytest.raises(tv.AdapterError, match="use_bdlora is True"):
        oracle.edited_by_taskvec(write_base(tmp_path / "base"), adapter, tmp_path / "out", alpha=1)


# --- what does not belong together ------------------------------------------------------------------------------------

Q = {"m.q.lora_A.weight": (2, 4), "m.q.lora_B.weight": (6, 2)}
DORA: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no magnitudes": (Q, {"use_dora": True}, "no lora_magnitude_vector"),
    "magnitudes but no DoRA": ({**Q, "m.q.lora_magnitude_vector": (6,)}, {}, "use_dora"),
    "too few magnitudes": ({**Q, "m.q.lora_magnitude_vector": (4,)}, {"use_dora": True}, "expected 6 numbers"),
    "two kinds of factors": ({**Q, "m.q.lora_embedding_A": (2, 6), "m.q.lora_embedding_B": (4, 2)}, {}, "lora_embedding_A"),
    "wide B": ({"m.q.lora_A.weight": (2, 4, 1), "m.q.lora_B.weight": (6, 2, 3)}, {}, "m.q"),
}


@pytest.mark.parametrize("case", DORA)
def test_tensors_that_contradict_the_config_or_each_other_are_refused(case: str, tmp_path: Path) -> None:
    tensors, config, reason = DORA[case]
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(tv.MismatchError, match=reason) as caught:
        oracle.edited_by_taskvec(write_base(tmp_path / "base"), adapter, tmp_path / "out", alpha=1)
    assert str(adapter) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    save_file({"c.weight": torch.randn(6, 2, 3)}, tmp_path / "base.safetensors")  # groups=3
    adapter = write_adapter(tmp_path / "adapter", {"c.lora_A.weight": (2, 6, 3), "c.lora_B.weight": (6, 2, 1)})
    with pytest.raises(tv.ShapeMismatchError, match=r"\[6, 6, 3\], expected \[6, 2, 3\]"):
        tv.subtract(tmp_path / "base.safetensors", adapter, alpha=1, output=tmp_path / "out")


def test_peft_itself_would_load_the_adapters_of_this_file(bases: Bases, tmp_path: Path) -> None:
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    loaded = PeftModel.from_pretrained(oracle.llama(), adapter)
    assert any("lora_magnitude_vector" in name for name, _ in loaded.named_parameters())
