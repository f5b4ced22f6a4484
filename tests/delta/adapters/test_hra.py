"""HRA against PEFT's merge, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import write_adapter, write_base
from .layers import biases, weights

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

NAMES = ("linear", "square", "conv2", "square_conv2", "pointwise")


def targets(*names: str, **fields: Any) -> HRAConfig:
    return HRAConfig(target_modules=list(names), **{"r": 4, **fields})


@pytest.mark.parametrize("orthonormal", [False, True], ids=["chain", "Gram-Schmidt"])
@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
def test_every_kind_of_layer_is_edited_as_peft_merges_it(
    dtypes: tuple[torch.dtype, torch.dtype], orthonormal: bool, tmp_path: Path
) -> None:
    layers.assert_edited_as_peft_merges(targets(*NAMES, apply_GS=orthonormal), tmp_path, weights(*NAMES), dtypes)


@pytest.mark.parametrize("orthonormal", [False, True], ids=["chain", "Gram-Schmidt"])
@pytest.mark.parametrize("rank", [2, 6])
def test_any_rank_is_read(rank: int, orthonormal: bool, tmp_path: Path) -> None:
    layers.assert_edited_as_peft_merges(targets("square", r=rank, apply_GS=orthonormal), tmp_path, weights("square"))


def test_biases_are_replaced(tmp_path: Path) -> None:
    names = weights("linear", "square") | biases("linear", "square")
    layers.assert_edited_as_peft_merges(targets("linear", "square", bias="hra_only"), tmp_path, names)


def test_a_transformer_is_edited_as_peft_merges_it(bases: Bases, tmp_path: Path) -> None:
    config = targets("q_proj", "down_proj")
    layers.assert_transformer_edited_as_peft_merges(oracle.llama, bases("llama"), config, tmp_path)


def edit(tmp_path: Path, vectors: torch.Tensor, name: str = "m.q", base_config: Any = None, **config: Any) -> None:
    base = write_base(
        tmp_path / "base", {"m.q.weight": (6, 4), "m.c_fc.weight": (4, 4), "m.k.weight": (6, 4, 3)}, **(base_config or {})
    )
    settings = {"peft_type": "HRA", "r": 2, "lora_alpha": 0, **config}
    adapter = write_adapter(tmp_path / "adapter", {f"{name}.hra_u": vectors}, **settings)
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)


@pytest.mark.parametrize("shape", [(6, 2), (3, 2), (4,), (4, 2, 1)])
def test_vectors_of_another_size_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.q"):
        edit(tmp_path, torch.randn(shape))


def test_a_rank_that_is_not_the_configs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="expected 3 columns"):
        edit(tmp_path, torch.randn(4, 2), r=3)


@pytest.mark.parametrize("name", ["m.c_fc", "m.k"])
def test_a_layer_peft_has_no_hra_for_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="PEFT has no HRA"):
        edit(tmp_path, torch.randn(4, 2), name, {"model_type": "gpt2"})


def test_a_vector_of_zeros_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=r"m\.q\.hra_u.*column 1 has no direction"):
        edit(tmp_path, torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0], [1.0, 0.0]]))
    assert not (tmp_path / "out").exists()


def test_vectors_of_one_direction_are_no_basis_and_refused(tmp_path: Path) -> None:
    column = torch.tensor([[0.3], [0.7], [-0.2], [0.1]])
    with pytest.raises(tv.AdapterError, match=r"m\.q\.hra_u.*column 1 has no direction"):
        edit(tmp_path, torch.cat([column, 3 * column], dim=1), apply_GS=True)


def test_vectors_of_one_direction_reflect_twice_without_gram_schmidt(tmp_path: Path) -> None:
    column = torch.tensor([[0.3], [0.7], [-0.2], [0.1]])
    edit(tmp_path, torch.cat([column, 2 * column], dim=1))
    before, after = oracle.weights_of(tmp_path / "base"), oracle.weights_of(tmp_path / "out")
    torch.testing.assert_close(after["m.q.weight"], before["m.q.weight"], rtol=0, atol=1e-6)
