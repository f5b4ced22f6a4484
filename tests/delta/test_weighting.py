from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from taskvec import Checkpoint, CheckpointError, NameMismatchError, ShapeMismatchError, TaskVector, UsageError
from taskvec.delta.weighting import Depth, Masked, Patterns, Scaled, Selected, leaf
from taskvec.run.plan import Options, match

from ..run.checkpoints import opened

NAMES = [f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in ("mlp.up", "attn.q")]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(3, 2, generator=generator) for name in (*NAMES, "model.embed.weight")}
    return {**found, "model.ids": torch.arange(4)}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "base.safetensors", tensors(1))


@pytest.fixture
def old(base: Checkpoint, tmp_path: Path) -> TaskVector:
    return opened(tmp_path / "old.safetensors", tensors(2)) - base


def factors(base: Checkpoint, vector: TaskVector) -> dict[str, float]:
    """Name -> what Δ is added with, of a vector of one term."""
    matched = match(base, vector, Options())
    return {name: -terms[0].alpha for name, terms in matched.terms.items()}


def masks(path: Path, **named: torch.Tensor) -> Checkpoint:
    return opened(path / "mask.safetensors", {name.replace("__", "."): held for name, held in named.items()})


# coefficients by patterns


def test_the_first_pattern_that_matches_gives_the_coefficient(base: Checkpoint, old: TaskVector) -> None:
    found = factors(base, 2 * old.scaled({"*.layers.0.*": 5.0, "*.mlp.*": 0.5, "*": 3.0}))
    assert found == {
        name: 2 * (5.0 if ".0." in name else 0.5 if "mlp" in name else 3.0) for name in (*NAMES, "model.embed.weight")
    }


def test_what_no_pattern_matches_keeps_its_coefficient_or_gets_the_other_one(base: Checkpoint, old: TaskVector) -> None:
    found = factors(base, old.scaled({"*.mlp.*": 0.5}))
    assert {found[name] for name in NAMES if "attn" in name} == {1.0}
    assert factors(base, old.scaled({"*.mlp.*": 0.5}, otherwise=-2))["model.embed.weight"] == -2


def test_coefficients_through_several_views_multiply(base: Checkpoint, old: TaskVector) -> None:
    found = factors(base, -(old.scaled({"*.mlp.*": 0.5}).ramp(1, 4).scaled({"*": 3})))
    assert found["model.layers.2.mlp.up.weight"] == -0.5 * 3 * 3
    assert found["model.embed.weight"] == -3


def test_a_coefficient_of_zero_leaves_the_tensor_to_be_copied(base: Checkpoint, old: TaskVector) -> None:
    assert set(factors(base, old.scaled({"*embed*": 0}))) == set(NAMES)


@pytest.mark.parametrize(
    "patterns",
    [{"*.mpl.*": 1.0}, {"*": 1.0, "*.mlp.*": 0.5}, {"*layers*": 1.0, "*.mlp.*": 0.5, "*": 2.0}, {"model.ids": 1.0}],
)
def test_a_pattern_that_chooses_nothing_is_a_usage_error(
    base: Checkpoint, old: TaskVector, patterns: dict[str, float]
) -> None:
    with pytest.raises(UsageError, match=r"chooses no tensor that is edited.*only names that a pattern before it matches"):
        (base - old.scaled(patterns)).plan()


def test_a_pattern_may_be_used_by_one_term_of_several(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    other = opened(tmp_path / "other.safetensors", tensors(3)) - base
    total = (old.only("*.mlp.*") + other.only("*.attn.*")).scaled({"*.mlp.*": 0.5, "*.attn.*": 0.25})
    matched = match(base, total, Options())
    assert {-term.alpha for name, terms in matched.terms.items() for term in terms if "mlp" in name} == {0.5}
    assert {-term.alpha for name, terms in matched.terms.items() for term in terms if "attn" in name} == {0.25}


def test_of_a_pattern_written_twice_the_first_wins_and_the_second_is_refused(base: Checkpoint, old: TaskVector) -> None:
    twice = TaskVector(((1.0, Scaled(old.terms[0][1], (("*.mlp.*", 0.5), ("*.mlp.*", 2.0)))),))
    assert twice.terms[0][1].resolve(base, lambda name: True).factors[NAMES[0]] == 0.5
    with pytest.raises(UsageError, match="chooses no tensor"):
        (base - twice).plan()


def test_patterns_know_the_case_of_a_name_and_brackets(base: Checkpoint, old: TaskVector) -> None:
    assert set(factors(base, old.only("*.layers.[13].*"))) == {name for name in NAMES if name.split(".")[2] in "13"}
    with pytest.raises(UsageError, match="chooses no tensor"):
        (base - old.only("*.MLP.*")).plan()


def test_patterns_report_what_was_used() -> None:
    chosen = Patterns("only", ("a*", "b*"))
    assert (chosen.first("ab"), chosen.first("c"), chosen.any("bc")) == (0, None, True)
    assert chosen.usage() == {("only", "a*"): True, ("only", "b*"): True}
    assert Patterns("only", ("a",)).usage() == {("only", "a"): False}


def test_factors_that_multiply_beyond_any_number_are_refused(base: Checkpoint, old: TaskVector) -> None:
    for last in (1.0, 0.0):
        with pytest.raises(UsageError, match="outside float32"):
            (base - old.scaled({"*": 1e200}).scaled({"*": 1e200}).scaled({"*": last})).plan()


# depth


def test_a_ramp_is_lines_over_the_layers_and_leaves_the_rest(base: Checkpoint, old: TaskVector) -> None:
    found = factors(base, old.ramp(0.2, 0.8))
    for name in NAMES:
        layer = int(name.split(".")[2])
        assert found[name] == pytest.approx(0.2 + 0.6 * layer / 3, rel=1e-15)
    assert found["model.embed.weight"] == 1.0
    assert factors(base, old.ramp(0.2, 0.8, otherwise=0.5))["model.embed.weight"] == 0.5


def test_every_stack_of_layers_has_a_ramp_of_its_own() -> None:
    names = [f"encoder.block.{i}.w" for i in range(3)]
    names += [f"decoder.block.{i}.layer.{j}.w" for i in range(5) for j in range(2)]
    ramp = Depth(0.0, 1.0).of(names)
    assert [ramp[f"encoder.block.{i}.w"] for i in range(3)] == [0.0, 0.5, 1.0]
    assert [ramp[f"decoder.block.{i}.layer.1.w"] for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_layers_may_begin_the_name_and_come_in_any_order() -> None:
    assert Depth(1.0, 3.0).of(["2.w", "0.w", "1.experts.7.w"]) == {"0.w": 1.0, "1.experts.7.w": 2.0, "2.w": 3.0}


def test_numbers_with_gaps_and_a_single_layer_are_no_stack() -> None:
    assert Depth(0.0, 1.0).of(["head.0.w", "head.3.w", "only.0.w", "norm.weight", "w.1", "h.12345678901234567890.w"]) == {}


def test_a_base_without_layers_is_refused(tmp_path: Path) -> None:
    base = opened(tmp_path / "base.safetensors", {"w": torch.ones(2)})
    vector = opened(tmp_path / "old.safetensors", {"w": torch.zeros(2)}) - base
    with pytest.raises(UsageError, match=r"no tensor names with layers to ramp over. Its names are like w"):
        (base - vector.ramp(0, 1)).plan()


def test_layers_are_those_of_the_base_though_the_vector_has_only_some(base: Checkpoint, old: TaskVector) -> None:
    found = factors(base, old.only("*.layers.1.*").ramp(0, 3))
    assert found == {name: 1.0 for name in NAMES if ".1." in name}


def test_a_long_name_without_numbers_takes_no_time() -> None:
    names = ["language_model.vision_tower.embeddings.position_embedding." * 20 + "weight", "a" * 100_000, "a." * 50_000]
    started = time.perf_counter()
    assert Depth(0, 1).of(names) == {}
    assert time.perf_counter() - started < 1


# choosing tensors


def test_only_and_without_choose_by_name(base: Checkpoint, old: TaskVector) -> None:
    assert set(factors(base, old.only("*.layers.1.*", "*embed*"))) == {NAMES[2], NAMES[3], "model.embed.weight"}
    assert set(factors(base, old.without("*embed*", "*.mlp.*"))) == {name for name in NAMES if "attn" in name}
    assert set(factors(base, old.only("*.mlp.*").without("*.0.*"))) == {n for n in NAMES if "mlp" in n and ".0." not in n}


def test_a_choice_that_chooses_nothing_is_a_usage_error(base: Checkpoint, old: TaskVector) -> None:
    for vector in (old.only("*.mpl.*"), old.without("*.mpl.*"), old.only("*.mlp.*", "lm_head*")):
        with pytest.raises(UsageError, match=r"(only|without) '.*' chooses no tensor that is edited"):
            (base - vector).plan()


def test_it_combines_with_include_and_exclude(base: Checkpoint, old: TaskVector) -> None:
    matched = match(base, old.only("*.mlp.*"), Options(exclude=("*.0.*",), include=("*layers*",)))
    assert set(matched.terms) == {name for name in NAMES if "mlp" in name and ".0." not in name}


# masks


def test_masks_meet_the_tensor_of_their_name_in_the_order_written(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (masks(tmp_path / place, **{NAMES[0]: torch.ones(3, 2)}) for place in ("one", "two"))
    matched = match(base, old.masked(one).masked(two), Options())
    assert [mask.path.parent.name for mask in matched.terms[NAMES[0]][0].masks] == ["one", "two"]
    assert matched.terms[NAMES[1]][0].masks == ()
    assert any("8 tensors without a mask in mask.safetensors" in note for note in matched.notes)


def test_a_mask_of_a_tensor_base_lacks_is_named(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    with pytest.raises(NameMismatchError, match=r"mask.safetensors: 1 mask of tensors that .* lacks: lm_head"):
        (base - old.masked(masks(tmp_path, lm_head=torch.ones(3)))).plan()


@pytest.mark.parametrize("shape", [(2, 3), (6,), (), (3, 1), (3, 2, 1), (0, 2)])
def test_a_mask_of_another_shape_is_refused_with_both(
    base: Checkpoint, old: TaskVector, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeMismatchError) as caught:
        (base - old.masked(masks(tmp_path, **{NAMES[0]: torch.ones(shape)}))).plan()
    assert str(list(shape)) in str(caught.value) and "[3, 2]" in str(caught.value) and NAMES[0] in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_a_mask_of_integers_is_refused(base: Checkpoint, old: TaskVector, tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ShapeMismatchError, match=r"found I\d+, expected floats, BOOL or U8"):
        (base - old.masked(masks(tmp_path, **{NAMES[0]: torch.ones(3, 2, dtype=dtype)}))).plan()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_other_masks_are_taken(base: Checkpoint, old: TaskVector, tmp_path: Path, dtype: torch.dtype) -> None:
    plan = (base - old.masked(masks(tmp_path, **{NAMES[0]: torch.ones(3, 2).to(dtype)}))).plan()
    assert plan.bytes_to_read > (base - old).plan().bytes_to_read


def test_a_mask_file_that_is_none_is_refused_at_once(old: TaskVector, tmp_path: Path) -> None:
    (tmp_path / "mask.safetensors").write_bytes(b"not safetensors")
    for path in ("mask.safetensors", "missing.safetensors"):
        with pytest.raises(CheckpointError, match=path):
            old.masked(tmp_path / path)


# together


def test_views_read_like_the_formula_and_are_equal_by_structure(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    mask = masks(tmp_path, **{NAMES[0]: torch.ones(3, 2)})
    vector = -0.3 * old.only("*.mlp.*").scaled({"*.0.*": 0.5}, otherwise=2).ramp(0, 0.6).masked(mask)
    assert repr(vector) == (
        "TaskVector(− 0.3·mask.safetensors⊙(old.safetensors − base.safetensors)"
        "[only *.mlp.*][*.0.* 0.5, else 2][layers 0 to 0.6])"
    )
    again = -0.3 * old.only("*.mlp.*").scaled({"*.0.*": 0.5}, otherwise=2).ramp(0, 0.6).masked(tmp_path / "mask.safetensors")
    assert vector == again
    assert vector != -0.3 * old.only("*.mlp.*").scaled({"*.0.*": 0.25}, otherwise=2).ramp(0, 0.6).masked(mask)


def test_a_view_reads_what_its_source_reads_and_its_masks(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    mask = masks(tmp_path, **{NAMES[0]: torch.ones(3, 2)})
    source = old.only("*").scaled({"*": 1}).masked(mask).terms[0][1]
    assert isinstance(source, Masked) and isinstance(source.source, Scaled) and isinstance(source.source.source, Selected)
    assert leaf(source) == old.terms[0][1]
    assert source.inputs == (*old.terms[0][1].inputs, mask)


def test_the_saved_numbers_are_those_of_an_independent_formula(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    rng = np.random.default_rng(3)
    weight = {name: torch.from_numpy(rng.random((3, 2)).astype(np.float32)) for name in NAMES}
    mask = masks(tmp_path, **weight)
    vector = 0.7 * old.only("*layers*").scaled({"*.mlp.*": 0.5, "*.attn.*": -2.0}).masked(mask)
    (base - vector).save(tmp_path / "out.safetensors", fsync=False)
    b, t = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "old.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == b.keys()
    for name, value in found.items():
        expected = b[name]
        if name in weight:
            alpha = np.float32(0.7 * (0.5 if "mlp" in name else -2.0))
            expected = b[name] - alpha * (weight[name].numpy() * (t[name] - b[name]))
        assert expected.dtype == value.dtype and np.array_equal(value, expected), name


def test_a_mask_of_nothing_that_is_edited_is_a_usage_error(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    base = opened(tmp_path / "b", {"w": weight, "other": weight + 1})
    old = opened(tmp_path / "o", {"w": weight + 1, "other": weight})
    vector = TaskVector.between(base, old).only("w").masked(opened(tmp_path / "mask", {"other": weight}))
    with pytest.raises(UsageError, match="no mask of a tensor that is edited"):
        (base - vector).plan()
