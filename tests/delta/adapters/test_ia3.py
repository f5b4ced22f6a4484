"""(IA)³ against PEFT's merge, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import write_adapter, write_base
from .layers import biases, weights

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

LINEAR = ("linear", "narrow", "single", "square")
CONVOLUTIONS = ("conv2", "square_conv2", "oblong_conv2", "conv3", "pointwise", "square_pointwise")
GROUPED = ("grouped", "square_grouped")


def targets(*names: str, inputs: Any = ()) -> IA3Config:
    return IA3Config(target_modules=list(names), feedforward_modules=inputs if isinstance(inputs, str) else list(inputs))


@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
@pytest.mark.parametrize("names", [LINEAR, CONVOLUTIONS, GROUPED], ids=["linear", "conv", "grouped"])
def test_outputs_are_scaled_as_peft_merges_them_and_biases_with_them(
    names: tuple[str, ...], dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    layers.assert_edited_as_peft_merges(targets(*names), tmp_path, weights(*names) | biases(*names), dtypes)


@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
@pytest.mark.parametrize("names", [LINEAR, CONVOLUTIONS, GROUPED], ids=["linear", "conv", "grouped"])
def test_inputs_are_scaled_as_peft_merges_them_and_no_bias(
    names: tuple[str, ...], dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    layers.assert_edited_as_peft_merges(targets(*names, inputs=names), tmp_path, weights(*names), dtypes)


# of square convolutions only the config tells; an ending need not be a whole component, an expression has to match all
RULES: dict[str, tuple[Any, set[str]]] = {
    "an ending": (["pointwise"], {"pointwise", "square_pointwise"}),
    "part of a name": (["e_pointwise"], {"square_pointwise"}),
    "an expression": ("square_.*", {"square_conv2", "square_pointwise"}),
    "an expression of a part": ("pointwise", {"pointwise"}),
    "nothing": ([], set()),
}


@pytest.mark.parametrize("rule", RULES)
def test_which_modules_scale_their_inputs_is_read_as_peft_reads_it(rule: str, tmp_path: Path) -> None:
    named, per_input = RULES[rule]
    every = {"square_conv2", "pointwise", "square_pointwise"}
    config = IA3Config(target_modules="|".join(sorted(every)), feedforward_modules=named)
    layers.assert_edited_as_peft_merges(config, tmp_path, weights(*every) | biases(*(every - per_input)))


def test_a_transformer_is_edited_as_peft_merges_it(bases: Bases, tmp_path: Path) -> None:
    config = targets("q_proj", "k_proj", "o_proj", "down_proj", inputs=["down_proj", "o_proj"])
    layers.assert_transformer_edited_as_peft_merges(oracle.llama, bases("llama"), config, tmp_path)


@pytest.mark.parametrize("inputs", [["mlp.c_proj"], ["c_fc", "attn.c_proj", "c_attn"], []], ids=str)
def test_a_conv1d_has_the_factors_of_a_linear(inputs: list[str], bases: Bases, tmp_path: Path) -> None:
    # c_proj of the attention is square, and stored [in, out]
    config = targets("c_attn", "attn.c_proj", "mlp.c_proj", "c_fc", inputs=inputs)
    config.fan_in_fan_out = True
    layers.assert_transformer_edited_as_peft_merges(oracle.gpt2, bases("gpt2"), config, tmp_path)


def test_other_modules_are_replaced(bases: Bases, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["query"], feedforward_modules=[], modules_to_save=["classifier"])
    layers.assert_transformer_edited_as_peft_merges(oracle.bert, bases("bert"), config, tmp_path)


def edit(tmp_path: Path, shape: tuple[int, ...], weight: tuple[int, ...] = (6, 4), **config: Any) -> None:
    base = write_base(tmp_path / "base", {"m.q.weight": weight, "m.q.bias": weight[:1]})
    adapter = write_adapter(tmp_path / "adapter", {"m.q.ia3_l": shape}, peft_type="IA3", r=0, lora_alpha=0, **config)
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (6, 2), (6,), (1, 6, 1), (4, 1), (1, 6)])
def test_factors_of_another_size_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.q"):
        edit(tmp_path, shape, feedforward_modules=[])


@pytest.mark.parametrize("shape", [(1, 7, 1, 1), (6, 1, 1, 1), (1, 6, 3, 3), (6, 1), (1, 6, 1)])
@pytest.mark.parametrize("inputs", [["q"], []], ids=["inputs", "outputs"])
def test_factors_of_another_convolution_are_refused(shape: tuple[int, ...], inputs: list[str], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.q"):
        edit(tmp_path, shape, (6, 4, 3, 3), feedforward_modules=inputs)


@pytest.mark.parametrize("named", [None, "(a(b))*q", 7])
def test_a_convolution_is_refused_if_the_config_does_not_tell_what_is_scaled(named: Any, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="feedforward_modules"):
        edit(tmp_path, (1, 6, 1, 1), (6, 6, 3, 3), feedforward_modules=named)


def test_a_layer_peft_has_no_ia3_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="PEFT has no"):
        edit(tmp_path, (1, 6, 1), (6, 4, 3), feedforward_modules=[])


@pytest.mark.parametrize("shape", [(150_000, 1), (1, 2)], ids=str)
def test_a_bias_wider_than_a_tile_is_scaled_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    edit(tmp_path, shape, (150_000, 2))
    before, after = oracle.weights_of(tmp_path / "base"), oracle.weights_of(tmp_path / "out")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.m.q.ia3_l"].double() - 1
    torch.testing.assert_close(after["m.q.weight"], (before["m.q.weight"] * (1 - factors)).float())
    expected = before["m.q.bias"] * (1 - factors.reshape(-1)) if shape[1] == 1 else before["m.q.bias"]
    torch.testing.assert_close(after["m.q.bias"], expected.float())
