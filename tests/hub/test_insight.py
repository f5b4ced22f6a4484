"""Models on the Hub compared: fetched once, and no more of them than is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save

import taskvec as tv

from .stand_in import Hub
from .test_in import FIRST, SECOND, sharded, tensors


@pytest.fixture
def models(hub: Hub) -> Hub:
    hub.add_model("org/base", sharded(1))
    hub.add_model("org/old", {"model.safetensors": save(tensors(2)), "config.json": b"{}"})
    return hub


def test_names_on_the_hub_are_compared_as_their_files_are(models: Hub, tmp_path: Path) -> None:
    found = tv.diff("org/base", "org/old")
    (tmp_path / "old.safetensors").write_bytes(save(tensors(2)))
    local = tv.diff("org/base", tmp_path / "old.safetensors")
    assert (found.a, found.b) == ("org/base", "org/old") and not found.same
    assert found.total == local.total
    one, other = tensors(1), tensors(2)
    assert found.total.changed == sum(int((one[name] != other[name]).sum()) for name in one)


def test_only_shards_with_tensors_that_are_compared_are_fetched(models: Hub, tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_bytes(save(tensors(2)))
    tv.diff("org/base", tmp_path / "old.safetensors", include=["norm.weight"])
    folder = tv.Checkpoint.open("org/base").path
    assert (folder / SECOND).exists() and not (folder / FIRST).exists()


def test_a_sweep_of_a_model_on_the_hub_evaluates_a_folder_here(models: Hub) -> None:
    def evaluate(folder: Path) -> float:
        opened = tv.Checkpoint.open(folder)
        assert opened.hub is None and set(opened.tensors) == set(tensors(1))
        return 1.0

    assert [trial.alpha for trial in tv.sweep("org/base", "org/old", [0.5], evaluate=evaluate).trials] == [0, 0.5]
