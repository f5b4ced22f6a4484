"""The random vector as it is saved: a vector like any other, that says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import taskvec as tv
from taskvec.insight import random_vector
from taskvec.insight.random_vector import save_random

from ..run.checkpoints import write_model


@pytest.fixture
def vector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tv.TaskVector:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    base = {
        name: torch.randn(shape, generator=generator) for name, shape in (("a.w", (30, 40)), ("b.w", (7,)), ("c.w", (5,)))
    }
    write_model(Path("base"), base)
    write_model(Path("old"), {name: t if name == "c.w" else t + torch.randn(t.shape) for name, t in base.items()})
    return tv.TaskVector.between("base", "old")


def test_it_is_a_saved_vector_that_says_what_it_is(vector: tv.TaskVector) -> None:
    Path("out").mkdir()
    save_random(vector, Path("out/random.safetensors"), seed=3)
    vector.save("true.safetensors")
    assert [path.name for path in Path("out").iterdir()] == ["random.safetensors"]
    with safe_open("out/random.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["taskvec"])
    assert about["formula"] == "random, as long as 1·(old − base)" and about["seed"] == 3 and "checksum" not in about
    random, true = load_file("out/random.safetensors"), load_file("true.safetensors")
    assert random.keys() == true.keys() == {"a.w", "b.w"}
    for name, tensor in random.items():
        assert torch.isclose(tensor.norm(), true[name].norm(), rtol=1e-6) and tensor.shape == true[name].shape
    (tv.Checkpoint.open("base") - tv.TaskVector.open("out/random.safetensors")).save("edited", fsync=False)


def test_it_is_normal_and_does_not_depend_on_the_size_of_the_pieces(
    vector: tv.TaskVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random(vector, Path("whole.safetensors"), seed=3)
    monkeypatch.setattr(random_vector, "_CHUNK", 100)
    save_random(vector, Path("pieces.safetensors"), seed=3)
    assert Path("whole.safetensors").read_bytes() == Path("pieces.safetensors").read_bytes()
    drawn = load_file("whole.safetensors")["a.w"]
    standard = (drawn - drawn.mean()) / drawn.std()
    assert abs(drawn.mean() / drawn.std()) < 0.1 and abs((standard**4).mean() - 3) < 0.6 and abs((standard**3).mean()) < 0.3


def test_nothing_that_is_there_is_replaced_or_removed(vector: tv.TaskVector) -> None:
    for name in ("random.safetensors", "random.delta.safetensors"):
        vector.save(name)
    before = {path: path.read_bytes() for path in Path().rglob("*.safetensors")}
    with pytest.raises(tv.OutputExistsError, match=r"^random\.safetensors: exists already"):
        stored = tv.TaskVector.open("random.safetensors")
        save_random(stored, Path("random.safetensors"), seed=3, base=tv.Checkpoint.open("base"))
    assert {path: path.read_bytes() for path in Path().rglob("*.safetensors")} == before


def test_nothing_is_left_of_one_that_failed(vector: tv.TaskVector, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise tv.OutputError("no space left")

    monkeypatch.setattr(random_vector, "write_all", full)
    Path("out").mkdir()
    with pytest.raises(tv.OutputError):
        save_random(vector, Path("out/random.safetensors"), seed=3)
    assert list(Path("out").iterdir()) == []
