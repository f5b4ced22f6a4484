from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from taskvec import (
    Checkpoint,
    CheckpointError,
    MismatchError,
    NameMismatchError,
    ShapeMismatchError,
    TaskVector,
    UsageError,
    subtract,
)
from taskvec.delta.stored import StoredVector, told

from ..run.checkpoints import Tensors, opened, write_model
from .adapters.handmade import write_adapter, write_base

SHAPES = {"model.layers.0.w": (4, 3), "model.layers.1.w": (4, 3), "model.embed_tokens.weight": (6, 3)}


def tensors(seed: int, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in (shapes or SHAPES).items()}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "base", tensors(1))


@pytest.fixture
def saved(base: Checkpoint, tmp_path: Path) -> Path:
    TaskVector.between(base, opened(tmp_path / "old", tensors(2))).save(tmp_path / "v.safetensors", fsync=False)
    return tmp_path / "v.safetensors"


def retold(path: Path, change: Any) -> Path:
    """The file with other words about itself; `change` gets its story and may return text in its place."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    story = json.loads(metadata["taskvec"])
    text = change(story)
    made = path.with_name("changed.safetensors")
    save_file(load_file(path), made, {**metadata, "taskvec": text if isinstance(text, str) else json.dumps(story)})
    return made


def test_a_saved_vector_is_opened_by_its_headers_and_reads_like_its_name(base: Checkpoint, saved: Path) -> None:
    vector = TaskVector.open(saved)
    assert repr(-0.3 * vector) == "TaskVector(− 0.3·v.safetensors)"
    assert vector == TaskVector.open(str(saved))
    assert vector != TaskVector.open(saved, force_base=True)
    assert set(vector.terms[0][1].inputs[0].tensors) == set(SHAPES)


def test_its_numbers_are_its_own_whatever_dtype_base_has_now(base: Checkpoint, saved: Path, tmp_path: Path) -> None:
    wide = opened(tmp_path / "wide", {name: tensor.double() for name, tensor in tensors(1).items()})
    (wide - TaskVector.open(saved)).save(tmp_path / "out", fsync=False)
    delta, found = load_file(saved), load_file(tmp_path / "out" / "model.safetensors")
    for name, value in tensors(1).items():
        assert found[name].equal(value.double() - delta[name].double())


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.layers.0.w": (4, 3)},
        {**SHAPES, "lm_head.weight": (6, 3)},
        {**SHAPES, "model.embed_tokens.weight": (7, 3)},
        {**SHAPES, "model.layers.1.w": (3, 4)},
        {name.removeprefix("model."): shape for name, shape in SHAPES.items()},
    ],
)
def test_a_base_of_other_names_or_shapes_is_refused(saved: Path, tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    other = opened(tmp_path / "other", tensors(3, **shapes))
    with pytest.raises(MismatchError, match=r"a vector of base, and the names or shapes of .*other are others.*--force-base"):
        (other - TaskVector.open(saved)).plan()


def test_the_order_and_the_sharding_of_a_base_do_not_matter(saved: Path, tmp_path: Path) -> None:
    turned = dict(reversed(tensors(1).items()))
    other = Checkpoint.open(write_model(tmp_path / "other", turned, shards=2))
    assert len((other - TaskVector.open(saved)).plan().edited) == 3


def test_force_base_takes_what_fits(saved: Path, tmp_path: Path) -> None:
    larger = opened(tmp_path / "larger", tensors(3, **SHAPES, **{"lm_head.weight": (6, 3)}))
    plan = (larger - TaskVector.open(saved, force_base=True)).plan()
    assert {job.name for job in plan.edited} == set(SHAPES)


def test_force_base_still_refuses_by_name_what_does_not_fit(saved: Path, tmp_path: Path) -> None:
    vector = TaskVector.open(saved, force_base=True)
    resized = opened(tmp_path / "resized", tensors(3, **{**SHAPES, "model.embed_tokens.weight": (7, 3)}))
    with pytest.raises(
        ShapeMismatchError, match=r"model.embed_tokens.weight: found F32 \[6, 3\], expected floats of \[7, 3\]"
    ):
        (resized - vector).plan()
    smaller = opened(tmp_path / "smaller", tensors(3, **{"model.layers.0.w": (4, 3)}))
    with pytest.raises(
        NameMismatchError, match=r"2 tensors that .*smaller lacks: model.embed_tokens.weight, model.layers.1.w"
    ):
        (smaller - vector).plan()
    integers = opened(tmp_path / "integers", {**tensors(3), "model.layers.0.w": torch.zeros(4, 3, dtype=torch.int32)})
    with pytest.raises(ShapeMismatchError, match=r"model.layers.0.w: found F32 .* for I32"):
        (integers - vector).plan()


def test_what_does_not_fit_can_be_left_out(saved: Path, tmp_path: Path) -> None:
    vector = TaskVector.open(saved, force_base=True)
    resized = opened(tmp_path / "resized", tensors(3, **{**SHAPES, "model.embed_tokens.weight": (7, 3)}))
    for plan in ((resized - vector).plan(exclude=["*embed*"]), (resized - vector.without("*embed*")).plan()):
        assert {job.name for job in plan.edited} == {"model.layers.0.w", "model.layers.1.w"}


def test_what_is_no_saved_vector_is_refused_with_what_to_do(base: Checkpoint, tmp_path: Path) -> None:
    (base - 0.5 * TaskVector.between(base, opened(tmp_path / "old", tensors(2)))).save(
        tmp_path / "e.safetensors", fsync=False
    )
    for path in (tmp_path / "base", tmp_path / "e.safetensors"):
        with pytest.raises(CheckpointError, match=r"not a saved task vector.*taskvec extract"):
            TaskVector.open(path)
    assert told(base) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda story: "{",
        lambda story: "[1]",
        lambda story: "null",
        lambda story: "[" * 100_000,
        lambda story: story.update(kind="edit"),
        lambda story: story.update(shapes_sha256=None),
        lambda story: story.pop("shapes_sha256"),
        lambda story: story.update(base=[1]),
        lambda story: story.pop("base"),
        lambda story: story.update(base={}),
        lambda story: story.update(added=["lm_head.weight"]),
        lambda story: story.update(added={"lm_head.weight": ["x"]}),
        lambda story: story.pop("added"),
        lambda story: story.update(config=[["a", 1]]),
        lambda story: story.pop("config"),
    ],
)
def test_damaged_metadata_are_refused_in_one_line(saved: Path, change: Any) -> None:
    with pytest.raises(CheckpointError, match=r"changed\.safetensors") as caught:
        TaskVector.open(retold(saved, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"auto_map": {"AutoModel": "evil.Model"}}, {"tie_word_embeddings": "no"}, {"quantization_config": {}}]
)
def test_a_vector_can_put_nothing_into_a_config_but_whether_the_head_is_tied(saved: Path, config: dict[str, Any]) -> None:
    def change(story: dict[str, Any]) -> None:
        story.update(config=config, added={"lm_head.weight": "model.embed_tokens.weight"})

    with pytest.raises(CheckpointError, match=r"its metadata set config.json to .*expected at most tie_word_embeddings"):
        TaskVector.open(retold(saved, change))


def test_an_added_tensor_that_starts_from_none_of_base_is_not_added(saved: Path, base: Checkpoint) -> None:
    changed = retold(saved, lambda story: story.update(added={"lm_head.weight": "nowhere"}))
    assert [job.name for job in (base - TaskVector.open(changed)).plan().jobs] == list(base.tensors)


def test_patterns_may_name_a_tensor_that_was_left_out_as_zero(base: Checkpoint, tmp_path: Path) -> None:
    tuned: Tensors = {**tensors(2), "model.embed_tokens.weight": tensors(1)["model.embed_tokens.weight"]}
    TaskVector.between(base, opened(tmp_path / "old", tuned)).save(tmp_path / "v.safetensors", fsync=False)
    vector = TaskVector.open(tmp_path / "v.safetensors")
    for view in (vector.without("*embed*"), vector.scaled({"*embed*": 0, "*": 1}), vector.scaled({"*embed*": 0})):
        assert len((base - view).plan().edited) == 2
    with pytest.raises(UsageError, match=r"'\*embde\*' chooses no tensor"):
        (base - vector.without("*embde*")).plan()


def test_a_vector_is_no_model_to_take_the_difference_of(base: Checkpoint, saved: Path) -> None:
    for pair in ((base, saved), (saved, base)):
        with pytest.raises(UsageError, match=r"v.safetensors: a saved vector.*TaskVector.open"):
            TaskVector.between(*pair)
    with pytest.raises(UsageError, match="a saved vector"):
        Checkpoint.open(saved) - base


def test_a_stored_vector_with_a_tensor_base_lacks_names_it_though_the_fingerprint_fits(base: Checkpoint, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(saved), "other": torch.ones(1)}, saved.with_name("x.safetensors"), metadata)
    with pytest.raises(CheckpointError, match="not the tensors its metadata were written for"):
        TaskVector.open(saved.with_name("x.safetensors"))
    about = json.loads(metadata["taskvec"])
    extended = {**about, "tensors_sha256": Checkpoint.open(saved.with_name("x.safetensors")).shapes_sha256}
    tensors = {**load_file(saved), "other": torch.ones(1)}
    save_file(tensors, saved.with_name("x.safetensors"), {**metadata, "taskvec": json.dumps(extended)})
    with pytest.raises(NameMismatchError, match=r"1 tensor that .*base lacks: other"):
        (base - TaskVector.open(saved.with_name("x.safetensors"))).plan()
    assert isinstance(TaskVector.open(saved).terms[0][1], StoredVector)


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[1]",
    "too deep": lambda text: "[" * 100_000,
    "another kind": lambda text: json.dumps({**json.loads(text), "kind": "model"}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_vector_whose_metadata_are_damaged_does_not_pass_for_a_model(damage: str, base: Checkpoint, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    path = saved.with_name("x.safetensors")
    save_file(load_file(saved), path, {**metadata, "taskvec": DAMAGE[damage](metadata["taskvec"])})
    for use in (lambda: subtract(base, path, alpha=1, output=saved.parent / "o"), lambda: TaskVector.open(path)):
        with pytest.raises(CheckpointError, match=r"x.safetensors.*damaged|not a saved"):
            use()
    assert not (saved.parent / "o").exists()


def test_a_part_of_a_vector_or_a_mixed_one_is_refused(base: Checkpoint, saved: Path, tmp_path: Path) -> None:
    vector = TaskVector.open(saved)
    for name, scale in (("one", 1), ("five", 5)):
        (scale * vector).save(tmp_path / name, base=base, max_shard_size=40, fsync=False)
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    assert len(shards) > 1
    with pytest.raises(CheckpointError, match="a part of a vector"):
        TaskVector.open(shards[1])
    shards[1].write_bytes((tmp_path / "five" / shards[1].name).read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        TaskVector.open(tmp_path / "one")


def test_a_coefficient_of_zero_adds_no_tensor(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", {"m.embed_tokens.weight": (5, 4), "m.q.weight": (4, 4)}, architectures=["XForCausalLM"]
    )
    adapter = write_adapter(tmp_path / "a", {"lm_head.weight": (5, 4)}, modules_to_save=["lm_head"])
    untying = TaskVector.from_adapter(adapter)
    checkpoint = Checkpoint.open(base)
    assert "lm_head.weight" in (checkpoint + untying).state_dict()
    assert "lm_head.weight" not in (checkpoint + 0 * untying).state_dict()
