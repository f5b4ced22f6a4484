"""Whether two stored tensors are the same: byte by byte, or as numbers as far as the coarser dtype tells them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from taskvec.checkpoint import checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, same_bytes, same_values
from taskvec.checkpoint.header import StoredTensor

EXACT = torch.randn(50, generator=torch.Generator().manual_seed(3))
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def stored(folder: Path, *tensors: torch.Tensor) -> list[StoredTensor]:
    found = []
    for place, tensor in enumerate(tensors):
        path = folder / f"{place}.safetensors"
        save_file({"before": torch.ones(3), "w": tensor}, path)
        found.append(Checkpoint.open(path).tensors["w"])
    return found


@pytest.fixture(params=[1 << 20, 7])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_COMPARED", request.param)


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_a_tensor_and_its_rounding_are_the_same_values(dtype: torch.dtype, other: torch.dtype, tmp_path: Path) -> None:
    left, right = stored(tmp_path, EXACT.to(dtype), EXACT.to(dtype).to(other))
    assert same_values(left, right) and same_values(right, left)
    assert dtype != other or same_bytes(left, right)


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("place", [0, 13, 49])
def test_one_number_that_differs_is_seen(other: torch.dtype, place: int, tmp_path: Path) -> None:
    changed = EXACT.clone()
    changed[place] += 0.125 + changed[place].abs()
    left, right = stored(tmp_path, EXACT, changed.to(other))
    assert not same_values(left, right) and not same_values(right, left)
    left, right = stored(tmp_path, EXACT, changed)
    assert not same_bytes(left, right)
