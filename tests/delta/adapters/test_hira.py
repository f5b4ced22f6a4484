"""HiRA against PEFT's merge, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HiraConfig

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import write_adapter, write_base
from .layers import weights

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

NAMES = (
    "linear", "square", "narrow", "embedding", "square_embedding", "conv1", "conv2", "square_conv2", "oblong_conv2", "conv3",
    "pointwise", "square_pointwise",
)  # fmt: skip


@pytest.mark.parametrize("fields", [dict(), dict(rank_pattern={"conv.": 2, "square_embedding": 1})], ids=["plain", "pattern"])
@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
def test_every_kind_of_layer_is_edited_as_peft_merges_it(
    dtypes: tuple[torch.dtype, torch.dtype], fields: dict[str, Any], tmp_path: Path
) -> None:
    config = HiraConfig(r=3, target_modules=list(NAMES), **fields)
    layers.assert_edited_as_peft_merges(config, tmp_path, weights(*NAMES), dtypes)


@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_is_edited_as_peft_merges_it(tied: bool, tmp_path: Path) -> None:
    def model() -> Any:
        return oracle.llama(tie_word_embeddings=tied)

    base = oracle.save_model(model(), tmp_path / "base")
    config = HiraConfig(r=3, target_modules=["q_proj", "down_proj", "embed_tokens"], hira_dropout=0.1)
    adapter = oracle.train(model(), tmp_path / "adapter", config)
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=0.7)
    merged = oracle.merged_in_double(oracle.in_double(model(), base), adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), merged, 0.7, oracle.identity)
    assert ("lm_head.weight" in edited) is not tied


@pytest.mark.parametrize("flag", [True, False])
def test_a_conv1d_is_turned_round_whatever_the_flag_says(flag: bool, bases: Bases, tmp_path: Path) -> None:
    config = HiraConfig(r=3, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    adapter = layers.assert_transformer_edited_as_peft_merges(oracle.gpt2, bases("gpt2"), config, tmp_path)
    oracle.rewrite_config(adapter, fan_in_fan_out=flag)
    again = oracle.edited_by_taskvec(bases("gpt2"), adapter, tmp_path / "again", alpha=0.7)
    assert all(tensor.equal(again[name]) for name, tensor in oracle.weights_of(tmp_path / "out").items())


def edit(tmp_path: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> None:
    base = write_base(tmp_path / "base", {"m.q.weight": (6, 4), "m.k.weight": (6, 4, 3)})
    adapter = write_adapter(tmp_path / "adapter", tensors, **{"peft_type": "HIRA", "lora_alpha": 0, **config})
    tv.subtract(base, adapter, alpha=1, output=tmp_path / "out", fsync=False)


PAIR = {"m.q.hira_A": (2, 4), "m.q.hira_B": (6, 2)}


@pytest.mark.parametrize("missing", PAIR)
def test_half_a_pair_is_refused(missing: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=f"no {missing[4:]}"):
        edit(tmp_path, {name: shape for name, shape in PAIR.items() if name != missing})


@pytest.mark.parametrize("extra", ["hira_embedding_A", "hira_embedding_B"])
def test_two_pairs_of_one_module_are_refused(extra: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="one pair"):
        edit(tmp_path, {**PAIR, f"m.q.{extra}": (2, 6)})


@pytest.mark.parametrize(
    "tensors",
    [
        {"m.q.hira_A": (2, 6), "m.q.hira_B": (4, 2)},
        {"m.q.hira_A": (2, 4), "m.q.hira_B": (5, 2)},
        {"m.q.hira_embedding_A": (2, 4), "m.q.hira_embedding_B": (6, 2)},
        {"m.k.hira_A": (2, 4, 3), "m.k.hira_B": (6, 2, 3)},
        {"m.k.hira_A": (2, 4, 1), "m.k.hira_B": (6, 2, 1)},
        {"m.k.hira_A": (2, 12), "m.k.hira_B": (6, 2)},
    ],
    ids=str,
)
def test_factors_of_another_size_are_refused(tensors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.[qk]"):
        edit(tmp_path, tensors)


@pytest.mark.parametrize("shapes", [((2, 4), (6, 3)), ((2, 4), (6, 2, 1)), ((2,), (6,))], ids=str)
def test_factors_of_different_ranks_are_refused(shapes: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="ranks differ"):
        edit(tmp_path, {"m.q.hira_A": shapes[0], "m.q.hira_B": shapes[1]})


def test_a_rank_may_be_that_of_the_pattern(tmp_path: Path) -> None:
    edit(tmp_path, PAIR, r=3, rank_pattern={"q": 2})  # PEFT 0.21 has rank_pattern, and makes no use of it


@pytest.mark.parametrize("config", [dict(r=3), dict(r=3, rank_pattern={"q": 1, "k": 2})], ids=str)
def test_a_rank_that_is_not_the_configs_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="expected rank"):
        edit(tmp_path, PAIR, **config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_factors_are_multiplied_in_full(dtype: torch.dtype, tmp_path: Path) -> None:
    config = HiraConfig(r=3, target_modules=["linear", "embedding"])
    layers.assert_edited_as_peft_merges(config, tmp_path, weights("linear", "embedding"), (torch.float32, dtype))
