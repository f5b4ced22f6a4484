"""LN tuning against PEFT's merge, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig
from safetensors.torch import load_file

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import FAMILIES, Bases
from .handmade import write_adapter, write_base
from .layers import biases, weights

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # what PEFT says of every norm
]

NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"]}


@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
def test_norms_with_a_bias_are_replaced_with_it(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    config = LNTuningConfig(target_modules=["norm", "group_norm"])
    names = weights("norm", "group_norm") | biases("norm", "group_norm")
    adapter = layers.assert_edited_as_peft_merges(config, tmp_path, names, dtypes)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert "base_model.model.norm.ln_tuning_layers.weight" in stored and len(stored) == 4


@pytest.mark.parametrize("family", NORMS)
def test_a_transformer_is_edited_as_peft_merges_it(family: str, bases: Bases, tmp_path: Path) -> None:
    config = LNTuningConfig(target_modules=NORMS[family])
    layers.assert_transformer_edited_as_peft_merges(FAMILIES[family], bases(family), config, tmp_path)


def test_other_modules_are_replaced_too(bases: Bases, tmp_path: Path) -> None:
    base, config = bases("llama"), LNTuningConfig(target_modules=["norm"], modules_to_save=["lm_head"])
    adapter = oracle.train(oracle.llama(), tmp_path / "adapter", config)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_in_double(oracle.in_double(oracle.llama(), base), adapter)
    # PEFT leaves the replaced module in its wrapper
    merged = {name.replace("lm_head.modules_to_save.default.", "lm_head."): tensor for name, tensor in merged.items()}
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)
    assert not edited["lm_head.weight"].equal(oracle.weights_of(base)["lm_head.weight"])


def test_the_difference_is_to_the_model_it_was_trained_on(tmp_path: Path) -> None:
    origin = write_base(tmp_path / "origin", {"m.norm.weight": (4,)})
    model = write_base(tmp_path / "model", {"m.q.weight": (4, 4), "m.norm.weight": (4,)})
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    adapter = write_adapter(
        tmp_path / "adapter", {"m.norm.ln_tuning_layers.weight": value}, peft_type="LN_TUNING", r=0, lora_alpha=0
    )
    edited = oracle.edited_by_taskvec(model, adapter, tmp_path / "out", alpha=2, base=origin)
    before, trained_on = oracle.weights_of(model)["m.norm.weight"], oracle.weights_of(origin)["m.norm.weight"]
    assert not before.equal(trained_on)
    torch.testing.assert_close(edited["m.norm.weight"], before - 2 * (value - trained_on))


def edit(tmp_path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    shapes = {"m.norm.weight": (4,), "m.norm.bias": (4,), "m.rms.weight": (4,), "m.q.weight": (6, 4)}
    base = write_base(tmp_path / "base", shapes)
    adapter = write_adapter(
        tmp_path / "adapter",
        {name.replace(".w", ".ln_tuning_layers.w").replace(".b", ".ln_tuning_layers.b"): s for name, s in tensors.items()},
        peft_type="LN_TUNING",
        r=0,
        lora_alpha=0,
    )
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)


@pytest.mark.parametrize(
    "tensors", [{"m.norm.weight": (5,), "m.norm.bias": (4,)}, {"m.norm.weight": (4,), "m.norm.bias": (1, 4)}]
)
def test_values_of_another_size_are_refused(tensors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.norm"):
        edit(tmp_path, tensors)


@pytest.mark.parametrize(("given", "missing"), [("weight", "bias"), ("bias", "weight")])
def test_half_a_norm_is_refused(given: str, missing: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=f"no ln_tuning_layers.{missing}"):
        edit(tmp_path, {f"m.norm.{given}": (4,)})


def test_a_bias_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.NameMismatchError, match=r"m\.rms\.bias"):
        edit(tmp_path, {"m.rms.weight": (4,), "m.rms.bias": (4,)})


def test_a_layer_that_is_no_norm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="anything but norms"):
        edit(tmp_path, {"m.q.weight": (6, 4)})
