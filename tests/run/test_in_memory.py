"""Editing a model in memory gives the bits of a run on files; leaving `applied` gives back the bits there were."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import taskvec as tv
from taskvec.checkpoint.files import IN_MEMORY
from taskvec.run import live

from ..delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The second is the way of a GPU, on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(live, "_on_host", live._on_device)
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_is_left_registered() -> Any:
    before = set(IN_MEMORY)
    yield
    assert set(IN_MEMORY) == before


def saved(folder: Path, dtype: torch.dtype, seed: int = 1, **settings: Any) -> Path:
    return oracle.save_model(oracle.random_model(oracle.llama(**settings), seed), folder, dtype)


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    with oracle.quietly():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def words(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: Any) -> dict[str, bytes]:
    held = model.state_dict() if isinstance(model, nn.Module) else model
    return {name: words(tensor) for name, tensor in held.items()}


def assert_is(model: Any, expected: Tensors) -> None:
    held = model.state_dict()
    assert all(words(held[name]) == words(tensor) for name, tensor in expected.items())


VECTORS: dict[str, Callable[[Path, Path, torch.dtype], tv.TaskVector]] = {
    "a fine-tune": lambda base, root, dtype: tv.TaskVector.between(base, saved(root / "old", dtype, 2)),
    "a lora": lambda base, root, dtype: tv.TaskVector.from_adapter(
        oracle.train(oracle.llama(), root / "a", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    ),
    "a dora of embeddings, and replaced norms": lambda base, root, dtype: tv.TaskVector.from_adapter(
        oracle.train(
            oracle.llama(),
            root / "a",
            LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=True, modules_to_save=["norm"]),
        )
    ),
    "a sum, weighted": lambda base, root, dtype: (
        tv.TaskVector.between(base, saved(root / "old", dtype, 2)).scaled({"*.mlp.*": 0.5})
        - 0.25 * tv.TaskVector.between(base, saved(root / "older", dtype, 3)).only("*self_attn*")
    ),
}


@pytest.mark.parametrize("vector", VECTORS)
def test_an_edit_in_memory_has_the_bits_of_an_edit_on_disk(
    vector: str, dtype: torch.dtype, where: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", dtype)
    change = -0.3 * VECTORS[vector](base, tmp_path, dtype)
    (tv.Checkpoint.open(base) + change).save(tmp_path / "out", fsync=False)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    model = loaded(base, dtype)
    before = snapshot(model)
    did = tv.apply_(model, change)
    assert_is(model, expected)
    changed = sum(int((words_of(expected[n]) != words_of(load_file(base / "model.safetensors")[n])).sum()) for n in expected)
    assert did.elements_changed == changed > 0
    assert {name for name, bits in snapshot(model).items() if bits != before[name]} <= set(did.tensors)


def words_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def test_a_state_dict_is_edited_as_a_model_is(dtype: torch.dtype, where: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", dtype)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", dtype, 2))
    held = load_file(base / "model.safetensors")
    tv.apply_(held, -0.3 * vector)
    assert all(words(held[name]) == words(t) for name, t in (tv.Checkpoint.open(base) - 0.3 * vector).state_dict().items())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_leaving_the_block_gives_every_bit_back(
    error: type[BaseException] | None, dtype: torch.dtype, where: str, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", dtype)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", dtype, 2))
    model = loaded(base, dtype)
    with torch.no_grad():  # a NaN with a payload, an infinity and a negative zero are bits too
        view = model.lm_head.weight.view(torch.int16 if dtype != torch.float32 else torch.int32).view(-1)
        view[:3] = torch.tensor(
            [0x7FA1, 0x7F80, -0x8000] if dtype != torch.float32 else [0x7FA00001, 0x7F800000, -0x80000000]
        )
    before = snapshot(model)
    try:
        with tv.applied(model, -0.3 * vector) as did:
            assert snapshot(model) != before and did.elements_changed
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert type(caught) is error
    assert snapshot(model) == before


def test_a_failure_while_reading_gives_every_bit_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(tmp_path / "base", torch.float32)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))
    model = loaded(base, torch.float32)
    before, real, calls = snapshot(model), live.Worker.compute, []

    def failing(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise OSError("the disk is gone")
        return real(self, *arguments)

    monkeypatch.setattr(live.Worker, "compute", failing)
    with pytest.raises(OSError, match="disk is gone"), tv.applied(model, vector, jobs=1):
        pytest.fail("the block was entered")
    assert len(calls) >= 8 and snapshot(model) == before


def test_tied_parameters_are_edited_once(dtype: torch.dtype, where: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", dtype, tie_word_embeddings=True)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", dtype, 2, tie_word_embeddings=True))
    model = loaded(base, dtype)
    did = tv.apply_(model, -0.3 * vector)
    assert "lm_head.weight" not in did.tensors and model.lm_head.weight is model.model.embed_tokens.weight
    assert_is(model, (tv.Checkpoint.open(base) - 0.3 * vector).state_dict())


def test_lora_on_tied_embeddings_changes_both_by_changing_one(where: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    adapter = oracle.train(oracle.llama(tie_word_embeddings=True), tmp_path / "a", config)
    model = loaded(base, torch.float32)
    tv.apply_(model, tv.TaskVector.from_adapter(adapter))
    merged = oracle.merged_by_peft(oracle.llama(tie_word_embeddings=True), base, adapter)
    torch.testing.assert_close(model.lm_head.weight.detach(), merged["lm_head.weight"], rtol=0, atol=1e-6)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_would_untie_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32, tie_word_embeddings=True)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = oracle.train(oracle.llama(tie_word_embeddings=True), tmp_path / "a", config)
    model = loaded(base, torch.float32)
    before = snapshot(model)
    with pytest.raises(tv.MismatchError, match=r"unties lm_head.weight"):
        tv.apply_(model, tv.TaskVector.from_adapter(adapter))
    assert snapshot(model) == before


class Odd(nn.Module):
    """Parameters that are stored in unusual ways, and buffers that are none."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.turned = nn.Parameter(torch.randn(8, 6, generator=generator).T)
        self.frozen = nn.Parameter(torch.randn(5, generator=generator), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("running", torch.randn(4, generator=generator))
        self.register_buffer("count", torch.tensor(7))


def test_unusual_parameters_and_buffers(where: str, tmp_path: Path) -> None:
    model = Odd()
    tensors = {name: t.detach().clone().contiguous() for name, t in model.state_dict().items()}
    other = {name: t + 1 for name, t in tensors.items()}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(other, tmp_path / "old.safetensors")
    vector = tv.TaskVector.between(tmp_path / "base.safetensors", tmp_path / "old.safetensors")
    assert not model.turned.is_contiguous()
    tv.apply_(model, 0.5 * vector)
    expected = (tv.Checkpoint.open(tmp_path / "base.safetensors") + 0.5 * vector).state_dict()
    assert_is(model, expected)
    assert not model.turned.is_contiguous() and model.turned.requires_grad and not model.frozen.requires_grad
    assert int(model.count) == 7


def test_an_edit_works_inside_and_outside_of_no_grad_and_autograd_sees_it(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))
    model = loaded(base, torch.float32)
    version = model.lm_head.weight._version
    loss = model(torch.tensor([[1, 2, 3]])).logits.square().sum()
    with torch.no_grad():
        tv.apply_(model, -0.3 * vector)
    assert model.lm_head.weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert model.lm_head.weight.grad is not None


def refused(model: Any, vector: tv.TaskVector, kind: type[tv.TaskvecError], *parts: str) -> None:
    before = None if any(t.is_meta for t in model.parameters()) else snapshot(model)
    for edit in (lambda: tv.apply_(model, vector), lambda: tv.applied(model, vector).__enter__()):
        with pytest.raises(kind) as caught:
            edit()
        assert all(part in str(caught.value) for part in parts), str(caught.value)
        assert "\n" not in str(caught.value) and "0x" not in str(caught.value)
    assert before is None or snapshot(model) == before


def test_a_model_that_does_not_fit_is_refused_and_not_touched(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))
    refused(oracle.llama(hidden_size=32), vector, tv.ShapeMismatchError, "expected", "model in memory")
    refused(nn.Linear(3, 3), vector, tv.NameMismatchError, "no tensor name in common")


def test_a_model_without_data_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))
    with torch.device("meta"):
        model = oracle.LlamaForCausalLM(oracle.llama().config)
    refused(model, vector, tv.MismatchError, "meta device")


class Linear4bit(nn.Linear):
    """Named as bitsandbytes names its own."""


def test_a_quantised_module_is_refused_by_its_name(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))
    model = loaded(base, torch.float32)
    model.model.layers[1].mlp.up_proj = Linear4bit(16, 24, bias=False)
    refused(model, vector, tv.QuantizedError, "model.layers.1.mlp.up_proj", "Linear4bit")


def test_an_edited_checkpoint_hands_out_the_tensors_it_would_save(dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", dtype)
    edited = tv.Checkpoint.open(base) - 0.3 * tv.TaskVector.between(base, saved(tmp_path / "old", dtype, 2))
    edited.save(tmp_path / "out", out_dtype="float32", exclude=["*norm*"], fsync=False)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    found = edited.state_dict(out_dtype="float32", exclude=("*norm*",))
    assert list(found) == list(tv.Checkpoint.open(base).tensors)
    assert all(found[name].dtype == torch.float32 and words(found[name]) == words(t) for name, t in expected.items())
    first, tensor = next(iter(edited.tensors()))
    assert first in expected and tensor.dtype == dtype


def test_no_second_copy_of_the_model_is_made(tmp_path: Path) -> None:
    # 20 MB of one parameter: what is held beside it is tiles
    weight = torch.zeros(5_000, 1_000)
    save_file({"w": weight}, tmp_path / "base.safetensors")
    save_file({"w": weight + 1}, tmp_path / "old.safetensors")
    vector = tv.TaskVector.between(tmp_path / "base.safetensors", tmp_path / "old.safetensors")
    place = weight.data_ptr()
    import tracemalloc

    tracemalloc.start()
    try:
        tv.apply_({"w": weight}, vector)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert weight.data_ptr() == place and bool((weight == 1).all())
    assert held < 12 << 20


# --- models whose names in memory are not those of their checkpoints ------------------------------------------------------


def mixtral() -> Any:
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3))


def vit() -> Any:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


RENAMED = {"mixtral": (mixtral, "block_sparse_moe.experts.0.w1.weight"), "vit": (vit, "attention.attention.query.weight")}


@pytest.mark.parametrize("saved_first", [False, True])
@pytest.mark.parametrize("family", RENAMED)
def test_a_model_is_matched_to_its_checkpoints_names(family: str, saved_first: bool, tmp_path: Path) -> None:
    make, on_disk = RENAMED[family]
    base = oracle.save_model(oracle.random_model(make(), 1), tmp_path / "base")
    vector = tv.TaskVector.between(base, oracle.save_model(oracle.random_model(make(), 2), tmp_path / "old"))
    assert any(name.endswith(on_disk) for name in oracle.weights_of(base))
    (tv.Checkpoint.open(base) - 0.3 * vector).save(tmp_path / "out", fsync=False)
    if saved_first:
        vector.save(tmp_path / "v.safetensors", fsync=False)
        vector = tv.TaskVector.open(tmp_path / "v.safetensors")
    with oracle.quietly():
        model, expected = (type(make()).from_pretrained(tmp_path / name) for name in ("base", "out"))
    assert not any(name.endswith(on_disk) for name in model.state_dict())
    before = snapshot(model)
    with tv.applied(model, -0.3 * vector):
        assert snapshot(model) == snapshot(expected) != before
    assert snapshot(model) == before


def test_an_adapter_of_a_renamed_model_is_applied_by_its_names_in_memory(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.random_model(mixtral()), tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    adapter = oracle.train(mixtral(), tmp_path / "adapter", config)
    (tv.Checkpoint.open(base) - 0.3 * tv.TaskVector.from_adapter(adapter)).save(tmp_path / "out", fsync=False)
    with oracle.quietly():
        model, expected = (MixtralForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "out"))
    tv.apply_(model, -0.3 * tv.TaskVector.from_adapter(adapter))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_model_without_its_head_takes_the_vector_of_the_whole(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", torch.float32)
    vector = tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))
    body = loaded(base, torch.float32).model
    refused(body, vector, tv.NameMismatchError, "lm_head.weight")
    tv.apply_(body, -0.3 * vector.without("lm_head*"))
    expected = (tv.Checkpoint.open(base) - 0.3 * vector).state_dict()
    assert all(words(t) == words(expected[f"model.{name}"]) for name, t in body.state_dict().items())


# --- what must not happen in silence --------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, tv.TaskVector]:
    base = saved(tmp_path / "base", torch.float32)
    return base, tv.TaskVector.between(base, saved(tmp_path / "old", torch.float32, 2))


class Two(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.policy, self.reference = (loaded(folder, torch.float32) for _ in range(2))


def test_two_models_in_one_are_not_guessed_between(pair: tuple[Path, tv.TaskVector]) -> None:
    both = Two(pair[0])
    refused(both, pair[1], tv.NameMismatchError, "of the checkpoint", "apply_(model.policy")
    tv.apply_(both.policy, pair[1])
    assert snapshot(both.policy) != snapshot(both.reference)


def test_lora_modules_of_peft_do_not_hide_the_weights_below_them(pair: tuple[Path, tv.TaskVector], tmp_path: Path) -> None:
    base, vector = pair
    plain = loaded(base, torch.float32)
    tv.apply_(plain, vector)
    expected = {name: words(tensor) for name, tensor in plain.state_dict().items()}
    for targets in (["q_proj", "v_proj"], "all-linear"):
        model = loaded(base, torch.float32)
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        did = tv.apply_(wrapped, vector)
        assert len(did.tensors) == len(expected)
        merged = wrapped.merge_and_unload().state_dict()  # B is zero: what is below is all there is
        assert all(words(merged[name]) == bits for name, bits in expected.items())


LEFT_OVER: dict[str, Callable[[Any], Any]] = {
    "a renamed key": lambda model: {name.replace("0.mlp.up", "0.mlp.upper"): t for name, t in model.state_dict().items()},
    "a shorter model": lambda model: setattr(model.model, "layers", model.model.layers[1:]) or model,
    "a pruned weight": lambda model: torch.nn.utils.prune.l1_unstructured(model.lm_head, "weight", 0.5) and model,
    "a parametrised weight": lambda model: torch.nn.utils.parametrizations.weight_norm(model.lm_head) and model,
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_a_part_of_the_vector_that_has_no_parameter_is_refused(case: str, pair: tuple[Path, tv.TaskVector]) -> None:
    model = LEFT_OVER[case](loaded(pair[0], torch.float32))
    before = snapshot(model)
    with pytest.raises(tv.NameMismatchError, match=r"no parameter for|no tensor name|has none of that name"):
        tv.apply_(model, pair[1])
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantisation_is_refused(pair: tuple[Path, tv.TaskVector]) -> None:
    model = torch.ao.quantization.quantize_dynamic(loaded(pair[0], torch.float32), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(tv.QuantizedError, match=r"model.layers.0"):
        tv.apply_(model, pair[1])


def shared_storage(kind: str) -> dict[str, torch.Tensor]:
    weight = torch.arange(16.0).reshape(4, 4)
    views = {"transposed": weight.t(), "a part": weight[:2], "reshaped": weight.view(-1), "expanded": weight[0].expand(4, 4)}
    return {"a": weight, "b": views[kind]}


@pytest.mark.parametrize("kind", ["transposed", "a part", "reshaped", "expanded"])
def test_memory_that_two_tensors_share_in_part_is_not_edited_twice(kind: str, tmp_path: Path) -> None:
    model = shared_storage(kind)
    flat = {name: tensor.clone().contiguous() for name, tensor in model.items()}
    save_file(flat, tmp_path / "base.safetensors")
    save_file({name: tensor + 1 for name, tensor in flat.items()}, tmp_path / "old.safetensors")
    vector = tv.TaskVector.between(tmp_path / "base.safetensors", tmp_path / "old.safetensors")
    before = {name: tensor.clone() for name, tensor in model.items()}
    with pytest.raises(tv.MismatchError, match=r"share memory|are one memory"):
        tv.apply_(model, vector)
    assert all(model[name].equal(tensor) for name, tensor in before.items())


def test_parts_of_one_memory_that_do_not_overlap_are_edited(tmp_path: Path) -> None:
    fused = torch.zeros(6, 4)
    parts = dict(zip("qkv", fused.chunk(3)))
    save_file({name: t.clone() for name, t in parts.items()}, tmp_path / "base.safetensors")
    save_file({name: t + i for i, (name, t) in enumerate(parts.items(), 1)}, tmp_path / "old.safetensors")
    tv.apply_(parts, tv.TaskVector.between(tmp_path / "base.safetensors", tmp_path / "old.safetensors"))
    assert fused[:, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_state_dict_of_copies_is_refused(pair: tuple[Path, tv.TaskVector]) -> None:
    model = loaded(pair[0], torch.float32)
    model._register_state_dict_hook(lambda module, held, prefix, meta: {n: t.clone() for n, t in held.items()})
    before = [words(p) for p in model.parameters()]
    with pytest.raises(tv.MismatchError, match="gives a copy"):
        tv.apply_(model, pair[1])
    assert [words(p) for p in model.parameters()] == before


@pytest.mark.parametrize("model", ["base", None, 3])
def test_what_is_no_model_is_a_type_error(model: Any, pair: tuple[Path, tv.TaskVector]) -> None:
    with pytest.raises(TypeError, match="torch module or a state dict"):
        tv.apply_(model, pair[1])


@pytest.mark.parametrize("vector", ["old", None])
def test_what_is_no_vector_is_a_type_error(vector: Any, pair: tuple[Path, tv.TaskVector]) -> None:
    with pytest.raises(TypeError, match="TaskVector"):
        tv.apply_(loaded(pair[0], torch.float32), vector)
    with pytest.raises(tv.UsageError, match="jobs 0"):
        tv.apply_(loaded(pair[0], torch.float32), pair[1], jobs=0)


def test_one_tensor_that_cannot_be_restored_does_not_keep_the_others_from_it(tmp_path: Path) -> None:
    model = {name: torch.zeros(4) for name in "abc"}
    save_file({name: t.clone() for name, t in model.items()}, tmp_path / "base.safetensors")
    save_file({name: t + 1 for name, t in model.items()}, tmp_path / "old.safetensors")
    vector = tv.TaskVector.between(tmp_path / "base.safetensors", tmp_path / "old.safetensors")
    with pytest.raises(RuntimeError), tv.applied(model, vector):
        model["a"].resize_(9)
    assert not model["b"].any() and not model["c"].any()


def test_a_run_in_memory_leaves_nothing_to_collect(pair: tuple[Path, tv.TaskVector]) -> None:
    model = loaded(pair[0], torch.float32)
    gc.collect()
    before = [found for found in gc.get_objects() if type(found) is live.Worker]  # of tests before this one
    gc.disable()
    try:
        for _ in range(3):
            with tv.applied(model, pair[1]):
                pass
        assert [found for found in gc.get_objects() if type(found) is live.Worker] == before
    finally:
        gc.enable()


def test_a_saved_vector_fits_the_model_it_was_made_for_whatever_buffers_it_has(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.bert(), tmp_path / "base")
    tensors = oracle.weights_of(base)
    save_file({**tensors, "bert.embeddings.position_ids": torch.arange(16)}, base / "model.safetensors", {"format": "pt"})
    vector = tv.TaskVector.between(base, oracle.save_model(oracle.random_model(oracle.bert(), 5), tmp_path / "old"))
    vector.only("*.1.*").save(tmp_path / "v.safetensors", fsync=False)
    with oracle.quietly():
        model = oracle.BertForSequenceClassification.from_pretrained(base)
    did = tv.apply_(model, tv.TaskVector.open(tmp_path / "v.safetensors"))
    assert did.tensors and all(".1." in name for name in did.tensors)
