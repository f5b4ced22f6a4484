"""Saved vectors of adapters; PEFT's own merge is the oracle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import taskvec as tv
from taskvec import Checkpoint, TaskVector
from taskvec.checkpoint import files

from ..delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def trained(folder: Path, **settings: Any) -> Path:
    fields = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj", "down_proj"], **settings}
    return oracle.train(oracle.llama(tie_word_embeddings="tied" in folder.name), folder, LoraConfig(**fields))


def edited(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_saved_adapter_is_the_merge_of_peft_minus_base(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.llama(), tmp_path / "base")
    adapter = trained(tmp_path / "adapter")
    saved = tv.extract(base, adapter, output=tmp_path / "v.safetensors", fsync=False)
    merged, own = oracle.merged_by_peft(oracle.llama(), base, adapter), oracle.weights_of(base)
    found = load_file(tmp_path / "v.safetensors")
    assert set(found) == {name for name in own if not merged[name].equal(own[name])} == set(saved.tensors)
    for name, delta in found.items():
        exact = merged[name].double() - own[name].double()
        assert (delta.double() - exact).abs().max() <= 2e-7 * merged[name].abs().max(), name


@pytest.mark.parametrize("alpha", [0.7, -0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_applied_again_it_is_within_an_ulp_of_the_adapter(tmp_path: Path, dtype: torch.dtype, alpha: float) -> None:
    """Or, in float32 itself, within the rounding of a product of rank 2 and of α."""
    base = oracle.save_model(oracle.llama(), tmp_path / "base", dtype)
    tv.extract(base, trained(tmp_path / "adapter"), output=tmp_path / "v.safetensors", fsync=False)
    tv.subtract(base, tmp_path / "adapter", alpha=alpha, output=tmp_path / "direct", fsync=False)
    tv.subtract(base, tmp_path / "v.safetensors", alpha=alpha, output=tmp_path / "saved", fsync=False)
    direct, saved, deltas = edited(tmp_path / "direct"), edited(tmp_path / "saved"), load_file(tmp_path / "v.safetensors")
    for name, value in direct.items():
        ulp = torch.nextafter(value.abs(), torch.full_like(value, torch.inf)) - value.abs()
        rounding = 4 * 2.0**-24 * (deltas[name].abs().max().double() if name in deltas else 0)
        assert ((value.double() - saved[name].double()).abs() <= ulp.double() + rounding).all(), name
        if dtype != torch.float32:
            assert (value == saved[name]).float().mean() > 0.98, name


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_a_saved_adapter_that_unties_the_head_unties_it_again(tmp_path: Path, modules: list[str]) -> None:
    base = oracle.save_model(oracle.llama(tie_word_embeddings=True), tmp_path / "base")
    adapter = trained(tmp_path / "tied adapter", modules_to_save=modules)
    tv.extract(base, adapter, output=tmp_path / "v.safetensors", fsync=False)
    tv.add(base, adapter, alpha=0.5, output=tmp_path / "direct", fsync=False)
    tv.add(base, tmp_path / "v.safetensors", alpha=0.5, output=tmp_path / "saved", fsync=False)
    direct, saved = edited(tmp_path / "direct"), edited(tmp_path / "saved")
    assert direct.keys() == saved.keys() and HEAD in saved
    for name, value in direct.items():
        torch.testing.assert_close(saved[name], value, rtol=2e-7, atol=2e-7)
    for name in (HEAD, EMBEDDINGS):  # new values: a plain difference, the same bytes
        assert saved[name].equal(direct[name])
    configs = [json.loads((tmp_path / way / "config.json").read_text()) for way in ("direct", "saved")]
    assert configs[0] == configs[1] and configs[1]["tie_word_embeddings"] is False


def test_an_adapter_weighed_by_views_is_saved_so(tmp_path: Path) -> None:
    base = Checkpoint.open(oracle.save_model(oracle.llama(), tmp_path / "base"))
    vector = TaskVector.from_adapter(trained(tmp_path / "adapter"), base)
    vector.save(tmp_path / "whole.safetensors", fsync=False)
    vector.without("*down_proj*").ramp(0.5, 1).save(tmp_path / "part.safetensors", fsync=False)
    whole, part = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "part"))
    assert set(part) == {name for name in whole if "down_proj" not in name}
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name] * (0.5 if ".0." in name else 1.0), rtol=1e-6, atol=1e-7)


def test_factors_of_an_adapter_that_occurs_twice_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Checkpoint.open(oracle.save_model(oracle.llama(), tmp_path / "base"))
    vector = TaskVector.from_adapter(trained(tmp_path / "adapter"))
    reads: Counter[int] = Counter()
    read = files.read_exact

    def counted(fd: int, buffer: memoryview, offset: int, *, path: Path, tensor: str = "") -> None:
        if "lora_A" in tensor:
            reads[offset] += 1
        read(fd, buffer, offset, path=path, tensor=tensor)

    both = base - vector - 0.5 * vector
    monkeypatch.setattr(files, "read_exact", counted)
    both.save(tmp_path / "out", fsync=False, jobs=1)
    assert set(reads.values()) == {2}  # once to see that they are finite, once to use them
