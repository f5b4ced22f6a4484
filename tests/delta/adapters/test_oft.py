"""OFT against PEFT's merge, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model

import taskvec as tv

from . import layers
from . import peft_oracle as oracle
from .conftest import Bases
from .handmade import write_adapter, write_base
from .layers import biases, weights

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

LINEAR = ("linear", "square", "embedding", "square_embedding")
POINTWISE = ("pointwise", "square_pointwise")

PARAMETRISATIONS: dict[str, dict[str, Any]] = {
    "default": dict(),
    **{f"{terms} terms": dict(num_cayley_neumann_terms=terms) for terms in (2, 3, 4, 6, 9)},
    "exact": dict(use_cayley_neumann=False),
    "shared": dict(block_share=True),
    "shared exact": dict(block_share=True, use_cayley_neumann=False),
    "constrained, wide": dict(coft=True, eps=1.5, use_cayley_neumann=False),
    "constrained, wider than all": dict(coft=True, eps=100.0),
    "constrained and shared": dict(coft=True, block_share=True, eps=0.7),
}


def targets(*names: str, size: int = 2, **fields: Any) -> OFTConfig:
    return OFTConfig(target_modules=list(names), oft_block_size=size, **fields)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("fields", PARAMETRISATIONS.values(), ids=PARAMETRISATIONS)
def test_linear_layers_and_embeddings_are_edited_as_peft_merges_them(
    fields: dict[str, Any], size: int, tmp_path: Path
) -> None:
    layers.assert_edited_as_peft_merges(targets(*LINEAR, size=size, **fields), tmp_path, weights(*LINEAR))


@pytest.mark.parametrize("fields", PARAMETRISATIONS.values(), ids=PARAMETRISATIONS)
def test_pointwise_convolutions_are_edited_as_peft_merges_them(fields: dict[str, Any], tmp_path: Path) -> None:
    layers.assert_edited_as_peft_merges(targets(*POINTWISE, size=3, **fields), tmp_path, weights(*POINTWISE))


@pytest.mark.parametrize("shared", [False, True])
def test_the_small_rotations_of_constrained_oft_are_exact_to_six_digits(shared: bool, tmp_path: Path) -> None:
    alpha = 2.0**20  # Δ is so small that float32 rounds most of it away from base − Δ
    base = layers.save(tmp_path / "base")
    adapter = layers.train(tmp_path / "adapter", targets("linear", "pointwise", coft=True, block_share=shared))
    edited = oracle.edited_by_taskvec(base, adapter, tmp_path / "out", alpha=alpha)
    before, merged = oracle.weights_of(base), layers.merged(base, adapter)
    for name in weights("linear", "pointwise"):
        delta = merged[name] - before[name].double()
        largest = float(delta.abs().max())
        assert 0 < largest < 1e-3
        found = (before[name].double() - edited[name].double()) / alpha
        assert float((found - delta).abs().max()) <= 1e-6 * largest


@pytest.mark.parametrize("dtypes", layers.DTYPES.values(), ids=layers.DTYPES)
def test_dtypes_are_mixed(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    layers.assert_edited_as_peft_merges(targets(*LINEAR), tmp_path, weights(*LINEAR), dtypes)


def test_a_number_of_blocks_may_be_given_and_biases_trained(tmp_path: Path) -> None:
    config = OFTConfig(r=4, oft_block_size=0, target_modules=["linear", "square"], bias="oft_only")
    names = weights("linear", "square") | biases("linear", "square")
    layers.assert_edited_as_peft_merges(config, tmp_path, names)


def test_a_transformer_is_edited_as_peft_merges_it(bases: Bases, tmp_path: Path) -> None:
    config = targets("q_proj", "down_proj", "embed_tokens", size=8, module_dropout=0.1)
    layers.assert_transformer_edited_as_peft_merges(oracle.llama, bases("llama"), config, tmp_path)


def test_what_peft_trains_for_a_larger_kernel_is_not_what_it_merges() -> None:
    model = get_peft_model(oracle.random_model(layers.Layers()), targets("conv2"))
    image = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        trained = model.base_model.model.conv2(image)
        merged = model.merge_and_unload().conv2(image)
    assert float((trained - merged).abs().max()) > 0.1  # though nothing was trained yet


def test_a_larger_kernel_is_refused(tmp_path: Path) -> None:
    base = layers.save(tmp_path / "base")
    adapter = layers.train(tmp_path / "adapter", targets("conv2"))
    with pytest.raises(tv.AdapterError, match=r"conv2.*not what it merges"):
        tv.subtract(base, adapter, alpha=1, output=tmp_path / "out")


NEW = dict(oft_block_size=2, peft_version="0.21.2", use_cayley_neumann=True)


def edit(tmp_path: Path, tensors: dict[str, tuple[int, ...]], base: dict[str, Any] | None = None, **config: Any) -> None:
    model = write_base(tmp_path / "base", {"m.q.weight": (6, 4), "m.c_fc.weight": (4, 4)}, **(base or {}))
    settings = {"peft_type": "OFT", "r": 0, "lora_alpha": 0, **NEW, **config}
    adapter = write_adapter(tmp_path / "adapter", {f"m.q.{name}": shape for name, shape in tensors.items()}, **settings)
    tv.subtract(model, adapter, alpha=1, output=tmp_path / "out", fsync=False)


@pytest.mark.parametrize("version", ["0.18.0", "0.18.1", "0.19.0.dev0", "0.21.2", "0.22.0.dev0@ab12", "1.0.0"])
def test_the_series_of_peft_018_is_read(version: str, tmp_path: Path) -> None:
    edit(tmp_path, {"oft_R.weight": (2, 1)}, peft_version=version)


@pytest.mark.parametrize("version", ["0.17.1", "0.18.0.dev0", "0.18.0rc1", "0.9.0", "", None, 18])
def test_the_series_of_an_older_peft_is_refused(version: Any, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=r"peft_version.*0\.18"):
        edit(tmp_path, {"oft_R.weight": (2, 1)}, peft_version=version)


def test_the_exact_inverse_of_an_older_peft_is_the_same(tmp_path: Path) -> None:
    edit(tmp_path, {"oft_R.weight": (2, 1)}, peft_version=None, use_cayley_neumann=False)


@pytest.mark.parametrize("suffix", ["oft_r", "oft_s"])
def test_the_tensors_of_an_older_peft_are_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=rf"{suffix} is the OFT of PEFT before"):
        edit(tmp_path, {suffix: (2, 2, 2)})


def test_a_config_without_block_size_is_refused(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", {"m.q.oft_R.weight": (2, 1)}, peft_type="OFT", r=2, lora_alpha=0)
    with pytest.raises(tv.AdapterError, match="no oft_block_size"):
        tv.subtract(model, adapter, alpha=1, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"oft_R.weight": (3, 1)}, {}),
        ({"oft_R.weight": (1, 1)}, {}),
        ({"oft_R.weight": (2, 2)}, {}),
        ({"oft_R.weight": (1, 3)}, {"block_share": True}),
        ({"oft_R.weight": (2, 1)}, {"block_share": True}),
        ({"oft_R.weight": (2, 1, 1)}, {}),
        ({"oft_embedding_R.weight": (3, 1)}, {}),
    ],
)
def test_a_rotation_of_another_size_is_refused(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(tv.ShapeMismatchError, match=r"m\.q"):
        edit(tmp_path, tensors, **config)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(num_cayley_neumann_terms=0), "terms"),
        (dict(num_cayley_neumann_terms=2.5), "terms"),
        (dict(coft=True, eps="wide"), "eps"),
        (dict(coft=True, eps=-1), "eps"),
        (dict(oft_block_size=0), "neither r nor oft_block_size"),
        (dict(fresh="x"), "fresh"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match=match):
        edit(tmp_path, {"oft_R.weight": (2, 1)}, **config)


def test_two_rotations_of_one_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.AdapterError, match="one of them"):
        edit(tmp_path, {"oft_R.weight": (2, 1), "oft_embedding_R.weight": (2, 1)})


def test_a_conv1d_is_refused(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base", {"h.c_fc.weight": (4, 4)}, model_type="gpt2")
    adapter = write_adapter(
        tmp_path / "adapter", {"h.c_fc.oft_R.weight": (2, 1)}, **{"peft_type": "OFT", "r": 0, "lora_alpha": 0, **NEW}
    )
    with pytest.raises(tv.AdapterError, match="PEFT has no OFT"):
        tv.subtract(model, adapter, alpha=1, output=tmp_path / "out")
