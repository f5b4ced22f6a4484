from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from taskvec import AdapterError, Checkpoint, NameMismatchError, QuantizedError, ShapeMismatchError
from taskvec.checkpoint.header import DTYPE_BITS
from taskvec.delta.dense import FineTune
from taskvec.delta.source import FLOATS, DenseDelta, Resolved

from ..run.checkpoints import opened, tensor

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Spec = dict[str, tuple[str, tuple[int, ...], int]]  # name -> dtype, shape, seed of its bytes
Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(name: str, spec: Spec, shards: int = 1) -> Checkpoint:
        return opened(tmp_path / name, {key: filled(*entry) for key, entry in spec.items()}, shards)

    return make


def filled(dtype: str, shape: tuple[int, ...], seed: int):  # type: ignore[no-untyped-def]
    nbytes = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, nbytes, np.uint8)
    return tensor(dtype, raw, shape)


def resolve(base: Checkpoint, tuned: Checkpoint, origin: Checkpoint | None = None, without: Iterable[str] = ()) -> Resolved:
    return FineTune(tuned, origin or base).resolve(base, lambda name: name not in set(without))


def w(seed: int, dtype: str = "BF16", shape: tuple[int, ...] = (4, 3)) -> tuple[str, tuple[int, ...], int]:
    return dtype, shape, seed


# names, shapes, kinds of numbers


@pytest.mark.parametrize("name", ["lora_unet_a.lora_down.weight", "unet.a.lora.up.weight", "a.lokr_w1"])
def test_an_adapter_that_was_opened_as_a_model_is_told_apart(make: Make, name: str) -> None:
    with pytest.raises(
        AdapterError, match=rf"tuned: holds tensors of an adapter \({name}\), and is read as a model.*path"
    ) as caught:
        resolve(make("base", {"a": w(1)}), make("tuned", {name: w(2)}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_float_tensor_is_the_difference_of_its_namesakes(make: Make, dtype: str) -> None:
    base, tuned = make("base", {"a": w(1, dtype), "b": w(2, dtype)}, 2), make("tuned", {"a": w(3), "b": w(4, dtype)})
    found = resolve(base, tuned)
    assert found == Resolved(deltas={name: DenseDelta(tuned.tensors[name], base.tensors[name]) for name in ("a", "b")})


def test_the_origin_may_be_a_third_checkpoint(make: Make) -> None:
    base, tuned, origin = (make(name, {"a": w(seed)}) for seed, name in enumerate(("base", "tuned", "origin")))
    assert resolve(base, tuned, origin).deltas == {"a": DenseDelta(tuned.tensors["a"], origin.tensors["a"])}


def test_tensors_on_one_side_only_are_named_and_the_rest_is_used(make: Make) -> None:
    base, tuned = make("base", {"a": w(1), "b": w(2), "c": w(3)}), make("tuned", {"a": w(4), "x": w(5), "y": w(6)})
    found = resolve(base, tuned)
    assert (list(found.deltas), found.missing, found.unused) == (["a"], ["b", "c"], ["x", "y"])
    assert found.notes == ["2 tensors only in base, copied: b, c", "2 tensors only in tuned, not used: x, y"]


def test_a_tensor_that_the_origin_lacks_is_copied(make: Make) -> None:
    base, tuned, origin = make("base", {"a": w(1), "b": w(2)}), make("tuned", {"a": w(3), "b": w(4)}), make("o", {"a": w(5)})
    found = resolve(base, tuned, origin)
    assert (list(found.deltas), found.missing) == (["a"], ["b"])


def test_models_without_a_common_name_are_refused_with_names_of_both(make: Make) -> None:
    base, tuned = make("base", {"model.a": w(1)}), make("tuned", {"a": w(1)})
    with pytest.raises(NameMismatchError, match=r"tuned: no tensor name in common .*found a, expected model\.a.*prefix"):
        resolve(base, tuned)
    with pytest.raises(NameMismatchError, match=r"other: no tensor name in common"):
        resolve(base, base, make("other", {"a": w(1)}))


@pytest.mark.parametrize(
    ("shape", "other", "hint"),
    [((4, 3), (3, 4), "Leave it out"), ((4, 3), (12,), "Leave it out"), ((), (1,), "Leave it out"),
     ((4, 3), (5, 3), "vocabulary was resized"), ((4,), (5,), "Leave it out"), ((0, 3), (3, 0), "Leave it out")],
)  # fmt: skip
def test_another_shape_is_refused_naming_both(make: Make, shape: tuple[int, ...], other: tuple[int, ...], hint: str) -> None:
    base, tuned = make("base", {"a": w(1), "b": w(1, shape=shape)}), make("tuned", {"a": w(1), "b": w(2, shape=other)})
    with pytest.raises(ShapeMismatchError) as caught:
        resolve(base, tuned)
    expected = f"model.safetensors: tensor b: found shape {list(other)}, expected {list(shape)} as in "
    assert expected in str(caught.value) and hint in str(caught.value) and "--exclude 'b'" in str(caught.value)
    assert list(resolve(base, tuned, without=["b"]).deltas) == ["a"]
    with pytest.raises(ShapeMismatchError, match=r"origin.*tensor b"):
        resolve(base, base, make("origin", {"a": w(1), "b": w(2, shape=other)}))


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL"])
def test_integers_where_base_has_floats_are_refused(make: Make, dtype: str) -> None:
    base, tuned = make("base", {"a": w(1), "b": w(2)}), make("tuned", {"a": w(1), "b": w(2, dtype)})
    with pytest.raises(ShapeMismatchError, match=rf"tensor b: found {dtype}, expected floats .*BF16.*--exclude 'b'"):
        resolve(base, tuned)
    with pytest.raises(ShapeMismatchError, match=rf"tensor b: found {dtype}, expected floats"):
        resolve(base, base, make("origin", {"a": w(1), "b": w(2, dtype)}))


def test_tensors_that_are_not_floats_are_compared_and_never_edited(make: Make) -> None:
    base, tuned = (make(name, {"a": w(1), "n": w(2, "I64"), "m": w(3, "BOOL")}) for name in ("base", "tuned"))
    found = resolve(base, tuned)
    assert found.compared == {"n": tuned.tensors["n"], "m": tuned.tensors["m"]}
    assert list(found.deltas) == ["a"]


@pytest.mark.parametrize("dtype", ["F32", "I32"])
def test_base_s_integers_are_kept_and_named_when_tuned_has_another_dtype(make: Make, dtype: str) -> None:
    base, tuned = make("base", {"a": w(1), "n": w(2, "I64")}), make("tuned", {"a": w(1), "n": w(2, dtype)})
    found = resolve(base, tuned)
    assert found.notes == [f"n is I64 in the base and {dtype} in tuned: copied as it is"]
    assert found.compared == {}


def test_what_is_left_out_is_neither_matched_nor_named(make: Make) -> None:
    base, tuned = make("base", {"a": w(1), "b": w(2), "c": w(3)}), make("tuned", {"a": w(4), "c": w(5, "I64"), "x": w(6)})
    found = resolve(base, tuned, without=["b", "c", "x"])
    assert found == Resolved(deltas={"a": DenseDelta(tuned.tensors["a"], base.tensors["a"])})


def test_a_quantised_fine_tune_or_origin_is_refused(make: Make) -> None:
    base = make("base", {"a.weight": w(1)})
    quantised = make("quantised", {"a.weight": w(1), "a.weight_scale": w(2)})
    for tuned, origin in ((quantised, base), (base, quantised)):
        with pytest.raises(QuantizedError, match="quantised"):
            resolve(base, tuned, origin)


# heads tied to the embeddings: decided by bytes, not by a config


def llama(make: Make, name: str, embed: int, head: int | None) -> Checkpoint:
    spec = {EMBED: w(embed), "model.norm.weight": w(99, shape=(3,))}
    return make(name, spec if head is None else {**spec, HEAD: w(head)})


def test_a_tied_head_that_tuned_leaves_out_is_its_embeddings(make: Make) -> None:
    base, tuned = llama(make, "base", 1, 1), llama(make, "tuned", 2, None)
    found = resolve(base, tuned)
    assert found.deltas[HEAD] == DenseDelta(tuned.tensors[EMBED], base.tensors[HEAD])
    assert found.deltas[EMBED] == DenseDelta(tuned.tensors[EMBED], base.tensors[EMBED])
    assert (found.missing, found.notes) == ([], [])


def test_a_tied_head_that_the_origin_leaves_out_is_its_embeddings(make: Make) -> None:
    base, tuned, origin = llama(make, "base", 1, 1), llama(make, "tuned", 2, 3), llama(make, "origin", 4, None)
    assert resolve(base, tuned, origin).deltas[HEAD] == DenseDelta(tuned.tensors[HEAD], origin.tensors[EMBED])


def test_a_head_of_its_own_that_tuned_lacks_is_refused(make: Make) -> None:
    base, tuned = llama(make, "base", 1, 2), llama(make, "tuned", 3, None)
    with pytest.raises(NameMismatchError, match=rf"tuned.*no tensor {HEAD}.*has a head of its own.*--exclude '{HEAD}'"):
        resolve(base, tuned)
    assert HEAD not in resolve(base, tuned, without=[HEAD]).deltas


def test_a_head_that_only_tuned_has_is_folded_into_the_embeddings_when_it_equals_them(make: Make) -> None:
    base, tuned = llama(make, "base", 1, None), llama(make, "tuned", 2, 2)
    found = resolve(base, tuned)
    assert found.deltas[EMBED] == DenseDelta(tuned.tensors[EMBED], base.tensors[EMBED])
    assert found.notes == [f"{HEAD} of tuned equals its {EMBED} (tied): folded into it"]
    assert found.unused == []


def test_an_untied_head_that_only_tuned_has_is_refused_and_may_be_left_out(make: Make) -> None:
    base, tuned = llama(make, "base", 1, None), llama(make, "tuned", 2, 3)
    with pytest.raises(NameMismatchError, match=rf"tensor {HEAD} is untied.*--exclude '{HEAD}'"):
        resolve(base, tuned)
    assert resolve(base, tuned, without=[HEAD]).unused == []


@pytest.mark.parametrize("place", [0, 1 << 20, (1 << 20) + 1, (3 << 20) - 1])
def test_tied_means_equal_in_every_byte(make: Make, tmp_path: Path, place: int) -> None:
    """Compared block by block, so the one byte that differs may be anywhere."""
    embed = np.zeros(3 << 20, np.uint8)
    head = embed.copy()
    head[place] = 1
    base = opened(tmp_path / "base", {EMBED: tensor("BF16", embed, (3 << 9, 1 << 10))})
    for name, content, tied in (("same", embed, True), ("other", head, False)):
        tuned = opened(
            tmp_path / name, {t: tensor("BF16", raw, (3 << 9, 1 << 10)) for t, raw in ((EMBED, embed), (HEAD, content))}
        )
        if tied:
            assert "tied" in resolve(base, tuned).notes[0]
        else:
            with pytest.raises(NameMismatchError, match="untied"):
                resolve(base, tuned)


def test_a_head_is_tied_to_a_tensor_of_its_dtype_and_shape_only(make: Make) -> None:
    base = make("base", {EMBED: w(1, "F32", (3, 2)), HEAD: w(1, "BF16", (3, 4))})  # equal bytes, other numbers
    with pytest.raises(NameMismatchError, match="head of its own"):
        resolve(base, make("tuned", {EMBED: w(1, "F32", (3, 2))}))


def test_gpt_neox_calls_its_head_embed_out(make: Make) -> None:
    base, tuned = make("base", {"embed_in.weight": w(1), "embed_out.weight": w(1)}), make("tuned", {"embed_in.weight": w(2)})
    assert resolve(base, tuned).deltas["embed_out.weight"].tuned == tuned.tensors["embed_in.weight"]  # type: ignore[union-attr]


def test_other_tensors_with_equal_bytes_are_not_taken_for_tied(make: Make) -> None:
    base, tuned = make("base", {"a": w(1), "b": w(1)}), make("tuned", {"a": w(2)})
    assert resolve(base, tuned).missing == ["b"]
