"""`tv.diff` against numpy float64 on whole tensors; bins of quantisers against their definitions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import taskvec as tv
from taskvec.checkpoint import files
from taskvec.insight import compare
from taskvec.insight.diff import Place

from ..run.checkpoints import Tensors, opened, write_model

# QLoRA (Dettmers et al. 2023, arXiv 2305.14314), appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
SHAPES = {
    "model.embed.weight": (40, 24), "model.layers.0.q.weight": (30, 70), "model.layers.0.q.bias": (70,),
    "model.layers.1.q.weight": (30, 70), "model.layers.1.experts.w": (3, 10, 7), "model.conv.weight": (4, 3, 5, 5),
    "model.scale": (), "model.norm.weight": (200,),
}  # fmt: skip
SETTINGS = {"one": (50, 70, 1), "blocks": (64, 1000, 3), "whole": (1 << 16, 1 << 22, 2)}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**found, "model.position_ids": torch.arange(12)}


def moved(base: Tensors, seed: int, size: float = 0.02) -> dict[str, torch.Tensor]:
    """Every second element of the floats is moved a little, the embeddings are not."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in base.items():
        noise = torch.randn(tensor.shape, generator=generator) * size * (torch.rand(tensor.shape, generator=generator) > 0.5)
        still = not tensor.is_floating_point() or "embed" in name
        found[name] = tensor if still else (tensor.float() + noise).to(tensor.dtype)
    return found


def wide(tensor: torch.Tensor) -> Any:
    return tensor.double().numpy()


def int8_codes(weight: Any) -> Any:
    rows = weight.reshape(-1, weight.shape[-1])
    top = np.abs(rows).max(axis=1, keepdims=True)
    return np.round(127 * rows / np.where(top == 0, 1, top)).reshape(weight.shape)


def nf4_codes(weight: Any) -> Any:
    codes = []
    flat = weight.reshape(-1)
    for at in range(0, len(flat), 64):
        block = flat[at : at + 64]
        codes += [np.argmin([abs(x - level) for level in NF4]) for x in block / (np.abs(block).max() or 1)]
    return np.array(codes).reshape(weight.shape)


def close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-300)


def check(found: Any, a: Tensors, b: Tensors) -> None:
    """Every number of every tensor against numpy on the whole of it."""
    assert {t.name for t in found.tensors} == set(a)
    for tensor in found.tensors:
        one, other, sums = wide(a[tensor.name]), wide(b[tensor.name]), tensor.sums
        assert sums.elements == one.size
        assert sums.changed == np.count_nonzero(one != other)
        if not a[tensor.name].is_floating_point():
            assert sums.norm == sums.a == sums.weights == 0
            continue
        delta = other - one
        assert close(sums.norm, np.sqrt((delta**2).sum())) and sums.largest == np.abs(delta).max()
        assert close(sums.relative, np.linalg.norm(delta.reshape(-1)) / np.linalg.norm(one.reshape(-1)))
        assert close(sums.cosine, (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
        matrix = one.ndim in (2, 3)
        assert sums.weights == (one.size if matrix else 0)
        assert sums.int8 == (np.count_nonzero(int8_codes(one) != int8_codes(other)) if matrix else 0)
        assert sums.nf4 == (np.count_nonzero(nf4_codes(one) != nf4_codes(other)) if matrix else 0)


@pytest.fixture(params=SETTINGS)
def jobs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Small and large pieces, one and several threads."""
    chunk, step, threads = SETTINGS[request.param]
    monkeypatch.setattr(compare, "_CHUNK", chunk)
    monkeypatch.setattr(compare, "_STEP", step)
    return threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_number_is_that_of_numpy_on_whole_tensors(dtype: torch.dtype, jobs: int, tmp_path: Path) -> None:
    a = tensors(1, dtype)
    b = moved(a, 2)
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b), jobs=jobs)
    check(found, a, b)
    assert found.total.int8 > 50 and found.total.nf4 > 10  # the test has something to see


def test_dtypes_and_shards_may_differ(jobs: int, tmp_path: Path) -> None:
    a, b = tensors(1, torch.bfloat16), tensors(2)
    found = tv.diff(opened(tmp_path / "a", a, shards=3), opened(tmp_path / "b", b, shards=2), jobs=jobs)
    check(found, a, b)


def test_a_larger_maximum_in_a_long_row_moves_all_of_the_row(jobs: int, tmp_path: Path) -> None:
    """What is unchanged lands in another bin too, if the scale of its row grew; also in parts that are the same."""
    a = {"w": torch.randn(2, 300, generator=torch.Generator().manual_seed(1))}
    b = {"w": a["w"].clone()}
    b["w"][1, 299] = 10.0
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b), jobs=jobs)
    check(found, a, b)
    assert found.total.changed == 1 and found.total.int8 > 200


def test_rows_and_blocks_of_zeros_are_the_bin_of_zero(jobs: int, tmp_path: Path) -> None:
    a = {"w": torch.zeros(4, 128)}
    b = {"w": torch.zeros(4, 128)}
    b["w"][2, 100] = -1e-3
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b), jobs=jobs)
    assert (found.total.int8, found.total.nf4) == (1, 1)


def test_the_numbers_do_not_depend_on_the_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_CHUNK", 64)
    monkeypatch.setattr(compare, "_STEP", 128)
    a = opened(tmp_path / "a", tensors(1))
    b = opened(tmp_path / "b", moved(tensors(1), 2))
    found = {json.dumps(tv.diff(a, b, jobs=jobs).summary()) for jobs in (1, 2, 5, 8)}
    assert len(found) == 1


def test_totals_are_the_numbers_of_all_tensors_together(tmp_path: Path) -> None:
    a, b = tensors(1), moved(tensors(1), 2)
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b))
    one, other = (np.concatenate([wide(t).reshape(-1) for t in side.values() if t.is_floating_point()]) for side in (a, b))
    total = found.total
    assert close(total.norm, np.linalg.norm(other - one))
    assert close(total.relative, np.linalg.norm(other - one) / np.linalg.norm(one))
    assert close(total.cosine, one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert total.largest == np.abs(other - one).max()
    assert total.changed == np.count_nonzero(one != other) and total.elements == len(one) + 12


def test_groups_are_the_sums_of_a_layer_and_kind(tmp_path: Path) -> None:
    a, b = tensors(1), moved(tensors(1), 2)
    groups = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b)).groups
    q = groups[Place("model.layers", 0, "q")]
    names = ("model.layers.0.q.weight", "model.layers.0.q.bias")
    assert close(q.delta, sum(((wide(b[n]) - wide(a[n])) ** 2).sum() for n in names))
    assert groups[Place("", None, "model.norm")].elements == 200


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj.weight", ("model.layers", 11, "self_attn.q_proj")),
        ("encoder.layer.0.output.LayerNorm.bias", ("encoder.layer", 0, "output.LayerNorm")),
        ("model.layers.3.mlp.experts.17.w1.weight", ("model.layers", 3, "mlp.experts.*.w1")),
        ("h.2.scale", ("h", 2, "scale")),
        ("lm_head.weight", ("", None, "lm_head")),
        ("w", ("", None, "w")),
        ("model.layers.4", ("", None, "model.layers")),
        ("0.weight", ("", 0, "weight")),
        ("a.٣.weight", ("", None, "a.٣")),
    ],
)
def test_a_name_tells_the_place(name: str, place: tuple[str, int | None, str]) -> None:
    assert Place.of(name) == place


def test_a_checkpoint_is_the_same_as_itself(tmp_path: Path) -> None:
    a = opened(tmp_path / "a", tensors(1), shards=2)
    found = tv.diff(a, opened(tmp_path / "b", tensors(1)))
    assert found.same and found.total.norm == 0 and found.total.cosine == 1 and found.total.int8 == found.total.nf4 == 0


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "an element": lambda t: t["model.conv.weight"].view(-1)[-1].add_(1),
    "the sign of a zero": lambda t: t.update({"model.scale": torch.tensor(-0.0)}),
    "an integer": lambda t: t["model.position_ids"][-1:].add_(1),
    "a dtype": lambda t: t.update({"model.scale": torch.tensor(0.0, dtype=torch.float64)}),
    "a name less": lambda t: t.pop("model.scale"),
    "a name more": lambda t: t.update({"model.more": torch.ones(1)}),
    "a shape": lambda t: t.update({"model.scale": torch.zeros(1)}),
    "a kind of number": lambda t: t.update({"model.scale": torch.tensor(0)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_difference_of_any_kind_is_a_difference(change: str, tmp_path: Path) -> None:
    a = {**tensors(1), "model.scale": torch.tensor(0.0)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    CHANGES[change](b)
    assert not tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b)).same


def test_names_on_one_side_and_other_shapes_are_named(tmp_path: Path) -> None:
    a = {"both": torch.ones(2), "left": torch.ones(2), "shape": torch.ones(2, 3), "kind": torch.ones(2)}
    b = {"both": torch.ones(2), "right": torch.ones(2), "shape": torch.ones(3, 2), "kind": torch.ones(2, dtype=torch.int64)}
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b))
    assert (found.only_in_a, found.only_in_b) == (("left",), ("right",))
    assert set(found.unlike) == {("shape", "F32 [2, 3]", "F32 [3, 2]"), ("kind", "F32 [2]", "I64 [2]")}
    assert [tensor.name for tensor in found.tensors] == ["both"]


def test_inf_and_nan_are_counted_and_left_out_of_the_norms(jobs: int, tmp_path: Path) -> None:
    a, b = torch.ones(4, 100), torch.ones(4, 100)
    a[0, 0], b[0, 1], a[1, 0], b[1, 0], b[2, 5] = math.nan, math.inf, math.nan, math.nan, 1.5
    found = tv.diff(opened(tmp_path / "a", {"w": a}), opened(tmp_path / "b", {"w": b}), jobs=jobs).total
    assert found.nonfinite == 3 and found.changed == 3
    assert found.norm == 0.5 and found.a == 397 and found.largest == 0.5
    zeroed = [wide(t.clone()) for t in (a, b)]
    for side in zeroed:
        side[0, 0] = side[0, 1] = side[1, 0] = 0
    assert found.int8 == np.count_nonzero(int8_codes(zeroed[0]) != int8_codes(zeroed[1])) > 90
    assert found.nf4 == np.count_nonzero(nf4_codes(zeroed[0]) != nf4_codes(zeroed[1])) > 50


def test_numbers_whose_squares_overflow_become_null_not_nonsense(tmp_path: Path) -> None:
    a, b = {"w": torch.full((2, 2), 1e200, dtype=torch.float64)}, {"w": torch.full((2, 2), -1e200, dtype=torch.float64)}
    summary = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b)).summary()
    assert summary["totals"]["norm"] is None and summary["totals"]["cosine"] is None
    json.dumps(summary, allow_nan=False)


def test_from_zero_the_change_is_infinite_and_the_cosine_unknown(tmp_path: Path) -> None:
    found = tv.diff(opened(tmp_path / "a", {"w": torch.zeros(3)}), opened(tmp_path / "b", {"w": torch.ones(3)})).total
    assert math.isinf(found.relative) and math.isnan(found.cosine) and found.norm == math.sqrt(3)
    assert found.summary()["relative"] is None and found.summary()["cosine"] is None


def test_a_nan_of_another_dtype_is_no_change(tmp_path: Path) -> None:
    a, b = {"w": torch.tensor([math.nan, 1.0])}, {"w": torch.tensor([math.nan, 2.0], dtype=torch.bfloat16)}
    assert tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b)).total.changed == 1


def test_integers_are_compared_to_their_last(jobs: int, tmp_path: Path) -> None:
    a = {"i": torch.arange(5000), "b": torch.zeros(3000, dtype=torch.bool), "w": torch.ones(1)}
    b = {"i": torch.where(a["i"] % 7 == 0, a["i"] ^ 256, a["i"]), "b": torch.arange(3000) % 1000 == 999, "w": torch.ones(1)}
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b), jobs=jobs)
    assert {tensor.name: tensor.sums.changed for tensor in found.tensors} == {"i": 715, "b": 3, "w": 0}


def test_empty_tensors_and_float8_are_compared(tmp_path: Path) -> None:
    a = {"none": torch.ones(0, 4), "small": torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)}
    b = {"none": torch.ones(0, 4), "small": torch.tensor([[1.0, 4.0]]).to(torch.float8_e4m3fn)}
    found = tv.diff(opened(tmp_path / "a", a), opened(tmp_path / "b", b)).total
    assert found.elements == 2 and found.changed == 1 and found.norm == 2


def test_include_and_exclude_choose_by_name(tmp_path: Path) -> None:
    a, b = opened(tmp_path / "a", {**tensors(1), "left": torch.ones(1)}), opened(tmp_path / "b", tensors(2))
    found = tv.diff(a, b, include=["model.layers.*"], exclude=["*.bias"])
    assert {t.name for t in found.tensors} == {
        "model.layers.0.q.weight", "model.layers.1.q.weight", "model.layers.1.experts.w",
    }  # fmt: skip
    assert found.only_in_a == ()
    assert tv.diff(a, b, include=["left"]).only_in_a == ("left",)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(option: str, tmp_path: Path) -> None:
    a = opened(tmp_path / "a", tensors(1))
    with pytest.raises(tv.UsageError, match=rf"--{option} '\*\.mlp\.\*' matches no tensor"):
        tv.diff(a, a, **{option: ["*.mlp.*"]})  # type: ignore[arg-type]


def test_models_without_a_name_in_common_are_refused(tmp_path: Path) -> None:
    with pytest.raises(tv.NameMismatchError, match="no tensor name in common"):
        tv.diff(opened(tmp_path / "a", {"x": torch.ones(1)}), opened(tmp_path / "b", {"y": torch.ones(1)}))


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    a = opened(tmp_path / "a", {"w": torch.ones(1)})
    with pytest.raises(tv.QuantizedError, match="Compare the unquantised models"):
        tv.diff(a, opened(tmp_path / "b", {"w": torch.ones(1), "w.absmax": torch.ones(1)}))


def test_saved_vectors_have_a_cosine(tmp_path: Path) -> None:
    base = opened(tmp_path / "base", tensors(1))
    for seed in (2, 3):
        tuned = write_model(tmp_path / f"tuned{seed}", moved(tensors(1), seed))
        tv.extract(base, tuned, output=tmp_path / f"{seed}.safetensors", fsync=False)
    found = tv.diff(tmp_path / "2.safetensors", tmp_path / "3.safetensors")
    one, other = (load_file(tmp_path / f"{seed}.safetensors") for seed in (2, 3))
    both = sorted(set(one) & set(other))  # tensors that did not change are not in a vector
    flat = [np.concatenate([wide(side[name]).reshape(-1) for name in both]) for side in (one, other)]
    assert close(found.total.cosine, flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    a, b = opened(tmp_path / "a", tensors(1)), opened(tmp_path / "b", tensors(2))

    def disturb(done: int, total: int) -> None:
        if done == total:
            (tmp_path / "a" / "model.safetensors").touch()

    with pytest.raises(tv.SourceChangedError, match="changed during the run"):
        tv.diff(a, b, progress=disturb)


def test_a_file_that_changes_before_it_is_read_is_refused(tmp_path: Path) -> None:
    a, b = opened(tmp_path / "a", tensors(1)), opened(tmp_path / "b", tensors(2))
    save_file({**tensors(3), "more": torch.ones(100)}, tmp_path / "b" / "model.safetensors")
    with pytest.raises(tv.SourceChangedError, match="changed during the run"):
        tv.diff(a, b)


def test_an_error_of_one_thread_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = files.InputFiles.read

    def broken(self: Any, path: Path, buffer: memoryview, offset: int, tensor: str) -> None:
        if tensor == "model.conv.weight":
            raise tv.CheckpointError(f"{path}: tensor {tensor}: cannot read")
        read(self, path, buffer, offset, tensor)

    monkeypatch.setattr(files.InputFiles, "read", broken)
    with pytest.raises(tv.CheckpointError, match="cannot read"):
        tv.diff(opened(tmp_path / "a", tensors(1)), opened(tmp_path / "b", tensors(2)), jobs=4)


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    import tracemalloc

    a, b = ({"w": torch.full((400, 20000), value)} for value in (1.0, 2.0))  # 32 MB each, 64 MB each in float64
    one, other = opened(tmp_path / "a", a), opened(tmp_path / "b", b)
    tracemalloc.start()
    tv.diff(one, other, jobs=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_progress_ends_at_all_bytes_of_both(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    a, b = opened(tmp_path / "a", tensors(1)), opened(tmp_path / "b", tensors(1, torch.bfloat16))
    tv.diff(a, b, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (a.nbytes + b.nbytes, a.nbytes + b.nbytes)


# what an edit meant to change


def edited(tmp_path: Path, alpha: float) -> tuple[Tensors, Tensors]:
    base = tensors(1, torch.bfloat16)
    tuned = moved(tensors(1, torch.bfloat16), 2)
    write_model(tmp_path / "base", base, shards=2)
    write_model(tmp_path / "tuned", tuned)
    tv.subtract(tmp_path / "base", tmp_path / "tuned", alpha=alpha, output=tmp_path / "out", fsync=False)
    return base, tuned


def test_what_rounding_lost_of_an_edit_is_what_its_record_says(tmp_path: Path) -> None:
    base, tuned = edited(tmp_path, 0.02)
    out: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        out.update(load_file(file))
    meant = {name: base[name] != tuned[name] for name in base}
    lost = sum(int((meant[name] & (out[name] == base[name])).sum()) for name in base)
    found = tv.diff(tmp_path / "base", tmp_path / "out")
    assert found.lost == lost > 100
    assert found.lost_share == lost / sum(int(own.sum()) for own in meant.values())
    assert sum(tensor.lost or 0 for tensor in found.tensors) == lost
    some = tv.diff(tmp_path / "base", tmp_path / "out", include=["model.layers.0.*"])
    assert some.lost == sum(
        int((meant[n] & (out[n] == base[n])).sum()) for n in ("model.layers.0.q.weight", "model.layers.0.q.bias")
    )


def test_the_record_of_a_saved_vector_says_nothing_of_an_edit(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"w": torch.full((10,), 1e-3)})
    write_model(tmp_path / "tuned", {"w": torch.cat([torch.full((5,), 1.0), torch.full((5,), 1e-3 + 1e-9)])})
    tv.extract(tmp_path / "base", tmp_path / "tuned", output=tmp_path / "vector", dtype="float16", fsync=False)
    record = json.loads((tmp_path / "vector" / "taskvec.json").read_text())
    assert record["tensors"]["w"]["lost"] == 5
    assert tv.diff(tmp_path / "base", tmp_path / "vector").lost is None


def test_of_another_output_dtype_the_share_is_of_what_the_edit_meant_not_of_what_the_cast_changed(tmp_path: Path) -> None:
    base = {"w": torch.linspace(1.001, 1.9, 1000)}
    tuned = {"w": torch.cat([base["w"][:500], base["w"][500:] + 2e-4])}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", tuned)
    tv.subtract(tmp_path / "base", tmp_path / "tuned", alpha=1, output=tmp_path / "out", out_dtype="bfloat16", fsync=False)
    found = tv.diff(tmp_path / "base", tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")["w"]
    lost = int((out == base["w"].bfloat16())[500:].sum())
    assert found.total.changed > 900 and 400 < lost < 500
    assert found.lost == lost and found.lost_share == lost / 500


def test_nothing_is_said_to_be_lost_without_a_record_that_fits(tmp_path: Path) -> None:
    edited(tmp_path, 0.02)
    out = tmp_path / "out"
    write_model(tmp_path / "another", {**tensors(1, torch.bfloat16), "more": torch.ones(1)})
    assert tv.diff(tmp_path / "base", tmp_path / "tuned").lost is None
    assert tv.diff(tmp_path / "another", out).lost is None  # the record is of an edit of another base
    record = json.loads((out / "taskvec.json").read_text())
    record["shards"][0]["header_sha256"] = "0" * 64
    (out / "taskvec.json").write_text(json.dumps(record))
    assert tv.diff(tmp_path / "base", out).lost is None  # the files are not those of the record
    (out / "taskvec.json").write_text('{"base": 3, "changes": {}}')
    assert tv.diff(tmp_path / "base", out).lost is None


def altered(tmp_path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of `base`, changed: the same headers."""
    found = {key: tensor.clone() for key, tensor in tensors(1, torch.bfloat16).items()}
    change(found)
    return write_model(tmp_path / name, found, shards=2)


def one_and_a_half_times(found: dict[str, torch.Tensor]) -> None:
    for tensor in found.values():
        if tensor.is_floating_point():
            tensor.mul_(1.5)


OTHER_BASES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "1.5 times the base": one_and_a_half_times,
    "another fine-tune of it": lambda found: found.update(moved(found, 5)),
    "one kept element": lambda found: found["model.embed.weight"].view(-1)[-1:].add_(1),
    "one integer, which is copied": lambda found: found["model.position_ids"][-1:].add_(1),
}


@pytest.mark.parametrize("change", OTHER_BASES)
def test_what_was_lost_is_not_said_of_another_base_with_the_same_headers(change: str, tmp_path: Path) -> None:
    edited(tmp_path, 0.02)
    found = tv.diff(altered(tmp_path, "other", OTHER_BASES[change]), tmp_path / "out")
    assert found.lost is None and found.lost_share is None
    assert all(tensor.lost is None for tensor in found.tensors)
    assert tv.diff(tmp_path / "base", tmp_path / "out").lost is not None


def test_what_was_lost_is_not_said_of_weights_that_were_written_over(tmp_path: Path) -> None:
    edited(tmp_path, 0.02)
    headers = {path.name: opened_header(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))}
    for path in headers:
        old = load_file(tmp_path / "out" / path)
        save_file(moved(old, 9), tmp_path / "out" / path, {"format": "pt"})
        assert opened_header(tmp_path / "out" / path) == headers[path]  # nothing but the data tells
    assert tv.diff(tmp_path / "base", tmp_path / "out").lost is None


def opened_header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_an_edit_that_changed_every_element_fits_any_two_models_and_is_not_said(tmp_path: Path) -> None:
    base = {"w": torch.linspace(1, 2, 100)}
    for name, factor in (("base", 1.0), ("tuned", 3.0), ("other", 1.5)):
        write_model(tmp_path / name, {"w": base["w"] * factor})
    tv.subtract(tmp_path / "base", tmp_path / "tuned", alpha=0.3, output=tmp_path / "out", fsync=False)
    for name in ("other", "base"):
        assert tv.diff(tmp_path / name, tmp_path / "out").lost is None


def test_an_edit_that_changed_some_elements_and_lost_none_is_said_to_have_lost_none(tmp_path: Path) -> None:
    base = torch.linspace(1, 2, 100)
    write_model(tmp_path / "base", {"w": base})
    write_model(tmp_path / "tuned", {"w": torch.where(torch.arange(100) < 30, base * 2, base)})
    tv.subtract(tmp_path / "base", tmp_path / "tuned", alpha=1, output=tmp_path / "out", fsync=False)
    found = tv.diff(tmp_path / "base", tmp_path / "out")
    assert found.lost == 0 and found.lost_share == 0 and found.total.changed == 30


def test_an_edit_of_which_all_was_lost_is_said(tmp_path: Path) -> None:
    write_model(tmp_path / "base", {"w": torch.ones(50, dtype=torch.bfloat16)})
    write_model(tmp_path / "tuned", {"w": torch.full((50,), 2, dtype=torch.bfloat16)})
    tv.subtract(tmp_path / "base", tmp_path / "tuned", alpha=1e-4, output=tmp_path / "out", fsync=False)
    found = tv.diff(tmp_path / "base", tmp_path / "out")
    assert found.same and found.lost == 50 and found.lost_share == 1


@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("of", [torch.float32, torch.float64])
def test_of_another_output_dtype_it_is_said_of_the_base_and_not_of_another_one(
    of: torch.dtype, out: str, jobs: int, tmp_path: Path
) -> None:
    base = {"w": torch.linspace(1.001, 1.9, 1000, dtype=of), "x": torch.linspace(-3, 3, 70, dtype=of).reshape(7, 10)}
    base["w"][900], base["x"][2, 2], base["x"][3, 3] = math.nan, math.nan, -math.inf
    rising = torch.cat([torch.zeros(500, dtype=of), torch.logspace(-18, -2, 500, dtype=of)])
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "tuned", {"w": base["w"] + rising, "x": base["x"]})
    write_model(tmp_path / "other", {"w": torch.cat([base["w"][:499] * 1.5, base["w"][499:]]), "x": base["x"]})
    tv.subtract(tmp_path / "base", tmp_path / "tuned", alpha=1, output=tmp_path / "out", out_dtype=out, fsync=False)
    kept = load_file(tmp_path / "out" / "model.safetensors")["w"] == base["w"].to(getattr(torch, out))
    meant = rising.bool() & (base["w"] != base["w"] + rising) & ~base["w"].isnan()
    found = tv.diff(tmp_path / "base", tmp_path / "out", jobs=jobs)
    assert found.lost == int((kept & meant).sum())
    assert (found.lost or 0) > 100 or of != torch.float64
    assert tv.diff(tmp_path / "other", tmp_path / "out", jobs=jobs).lost is None
