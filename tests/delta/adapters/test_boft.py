"""BOFT of one butterfly factor against PEFT's merge, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import write_adapter, write_base
from .layers import biases, weights

pytestmark = [
    *(pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER),
    # what PEFT says without a CUDA compiler
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
]

NAMES = ("linear", "square", "conv2", "square_conv2", "pointwise")


def targets(*names: str, **fields: Any) -> BOFTConfig:
    return BOFTConfig(target_modules=list(names), **{"boft_block_size": 2, **fields})


@pytest.mark.parametrize("fields", [dict(), dict(boft_block_size=0, boft_block_num=2), dict(boft_dropout=0.1)], ids=str)
@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
def test_every_kind_of_layer_is_edited_as_peft_merges_it(
    dtypes: tuple[torch.dtype, torch.dtype], fields: dict[str, Any], tmp_path: Path
) -> None:
    layers.assert_edited_as_peft_merges(targets(*NAMES, **fields), tmp_path, weights(*NAMES), dtypes)


def test_biases_are_replaced(tmp_path: Path) -> None:
    config = targets("linear", "square", bias="boft_only")
    names = weights("linear", "square") | biases("linear", "square")
    layers.assert_edited_as_peft_merges(config, tmp_path, names)


def test_a_transformer_is_edited_as_peft_merges_it(bases: Bases, tmp_path: Path) -> None:
    config = targets("q_proj", "down_proj", boft_block_size=8)
    layers.assert_transformer_edited_as_peft_merges(oracle.llama, bases("llama"), config, tmp_path)


def edit(tmp_path: Path, tensors: dict[str, tuple[int, ...]], name: str = "m.q", **base_config: Any) -> None:
    base = write_base(
        tmp_path / "base", {"m.q.weight": (6, 4), "m.c_fc.weight": (4, 4), "m.k.weight": (6, 4, 3)}, **base_config
    )
    adapter = write_adapter(
        tmp_path / "adapter",
        {f"{name}.{suffix}": shape for suffix, shape in tensors.items()},
        peft_type="BOFT",
        r=0,
        lora_alpha=0,
    )
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)


def test_several_butterfly_factors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="2 butterfly factors"):
        edit(tmp_path, {"boft_R": (2, 2, 2, 2), "boft_s": (6, 1)})


@pytest.mark.parametrize(
    ("rotation", "scale"),
    [
        ((1, 3, 2, 2), (6, 1)),
        ((1, 1, 2, 2), (6, 1)),
        ((1, 2, 2, 3), (6, 1)),
        ((1, 2, 2), (6, 1)),
        ((1, 2, 2, 2), (1, 6)),
        ((1, 2, 2, 2), (4, 1)),
        ((1, 2, 2, 2), (6,)),
    ],
)
def test_tensors_of_another_size_are_refused(rotation: tuple[int, ...], scale: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.q"):
        edit(tmp_path, {"boft_R": rotation, "boft_s": scale})


@pytest.mark.parametrize("missing", ["boft_R", "boft_s"])
def test_half_a_pair_is_refused(missing: str, tmp_path: Path) -> None:
    tensors = {"boft_R": (1, 2, 2, 2), "boft_s": (6, 1)}
    del tensors[missing]
    with pytest.raises(tv.AdapterError, match=f"no {missing}"):
        edit(tmp_path, tensors)


@pytest.mark.parametrize("name", ["m.c_fc", "m.k"])
def test_a_layer_peft_has_no_boft_for_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="PEFT has no BOFT"):
        edit(tmp_path, {"boft_R": (1, 2, 2, 2), "boft_s": (4, 1)}, name, model_type="gpt2")
