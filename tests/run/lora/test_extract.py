"""`lora extract` against PEFT: what it loads and merges is base + B @ A, and tuned within the error that was reported."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import taskvec as tv
from taskvec.checkpoint.files import InputFiles
from taskvec.errors import AdapterError, OutputExistsError, OutputOverlapError, SourceChangedError, TaskvecError, UsageError
from taskvec.run import device, verify
from taskvec.run.lora import extract as lora_extract
from taskvec.run.lora.extract import ExtractedLora, extract_lora
from taskvec.run.lora.plan import plan_lora

from ...delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

MODELS: dict[str, Callable[[], Any]] = {
    "llama": oracle.llama,
    "a tied llama": lambda: oracle.llama(tie_word_embeddings=True),
    "gpt2": oracle.gpt2,
    "bert": oracle.bert,
}
Chooses = Callable[[str, torch.Tensor], bool]


def anything(name: str, value: torch.Tensor) -> bool:
    return True


def weights_only(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 2


def linears_only(name: str, value: torch.Tensor) -> bool:
    return value.dim() == 2 and "embed" not in name and "wte" not in name and "wpe" not in name


def tune(base: Path, folder: Path, chooses: Chooses = anything, rank: int = 0, dtype: torch.dtype | None = None) -> Path:
    """A copy of the model with other values in what `chooses` says: of a random matrix, or of a product of that rank."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(5)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            if value.is_floating_point() and chooses(name, value):
                change = torch.randn(value.shape, generator=generator)
                if rank and value.dim() == 2:
                    left, right = (
                        torch.randn(shape, generator=generator) for shape in ((len(value), rank), (rank, value.shape[1]))
                    )
                    change = left @ right
                tensors[name] = (value.float() + 0.1 * change).to(dtype or value.dtype)
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: oracle.save_model(model(), root / kind.replace(" ", "-")) for kind, model in MODELS.items()}


@pytest.fixture(scope="module")
def tuned(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tuned")
    return {kind: tune(base, root / kind.replace(" ", "-")) for kind, base in bases.items()}


def extracted(base: Path, tuned: Path, output: Path, **options: Any) -> ExtractedLora:
    return extract_lora(base, tuned, output=output, fsync=False, **options)


def merged(kind: str, base: Path, adapter: Path) -> oracle.Tensors:
    """What PEFT makes of it, every tensor of the model in memory. A key that PEFT misses is a warning, and so an error."""
    return oracle.merged_by_peft(MODELS[kind](), base, adapter)


def settings(adapter: Path) -> dict[str, Any]:
    return dict(json.loads((adapter / "adapter_config.json").read_text()))


def adapter_tensors(adapter: Path) -> oracle.Tensors:
    return load_file(adapter / "adapter_model.safetensors")


def relative(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted − base‖ in float64."""
    return float((found.double() - wanted.double()).norm() / (wanted.double() - base.double()).norm())


# --- what PEFT makes of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", MODELS)
def test_peft_merges_to_tuned_within_the_reported_error(
    kind: str, dtype: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    report = extracted(bases[kind], tuned[kind], tmp_path / "lora", rank=3, dtype=dtype)
    before, after = oracle.weights_of(bases[kind]), oracle.weights_of(tuned[kind])
    found = merged(kind, bases[kind], tmp_path / "lora")
    errors = {tensor.layer.name: tensor.error for tensor in report.tensors}
    assert errors.keys() == {name for name, value in before.items() if value.dim() == 2}
    for name, value in before.items():
        if name in errors:
            assert relative(found[name], after[name], value) == pytest.approx(errors[name], rel=1e-3, abs=1e-6), name
        else:
            assert found[name].equal(after[name]), name  # norms and biases: the values themselves
    assert 0.1 < report.median_error <= report.worst.error < 1


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_rank_gives_tuned_back_to_float32_accuracy(
    kind: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    report = extracted(bases[kind], tuned[kind], tmp_path / "lora", energy=1.0)
    assert report.worst.error < 3e-6
    found = merged(kind, bases[kind], tmp_path / "lora")
    for name, after in oracle.weights_of(tuned[kind]).items():
        torch.testing.assert_close(found[name], after, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_adding_the_adapter_gives_what_peft_merges(
    kind: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    extracted(bases[kind], tuned[kind], tmp_path / "lora", rank=3)
    tv.add(bases[kind], tmp_path / "lora", alpha=1, output=tmp_path / "added", fsync=False)
    theirs = merged(kind, bases[kind], tmp_path / "lora")
    for name, ours in oracle.weights_of(tmp_path / "added").items():
        torch.testing.assert_close(ours, theirs[name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_no_factors_of_that_rank_are_nearer(
    kind: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    """Eckart and Young 1936: the error is that of the singular values that are left out."""
    report = extracted(bases[kind], tuned[kind], tmp_path / "lora", rank=3)
    before, after = oracle.weights_of(bases[kind]), oracle.weights_of(tuned[kind])
    for tensor in report.tensors:
        name = tensor.layer.name
        squares = np.linalg.svd((after[name].double() - before[name].double()).numpy(), compute_uv=False) ** 2
        assert tensor.error == pytest.approx(np.sqrt(squares[3:].sum() / squares.sum()), abs=1e-5), name
        assert tensor.norm == pytest.approx(np.sqrt(squares.sum()), rel=1e-5)


def test_a_module_that_is_adapted_computes_with_its_factors_before_it_is_merged(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    extracted(bases["gpt2"], tuned["gpt2"], tmp_path / "lora", energy=1.0, exclude=["*wte*"])
    with oracle.quietly():
        model = PeftModel.from_pretrained(type(oracle.gpt2()).from_pretrained(bases["gpt2"]), tmp_path / "lora")
        wanted = type(oracle.gpt2()).from_pretrained(tuned["gpt2"])
        own = type(oracle.gpt2()).from_pretrained(bases["gpt2"])
    wanted.transformer.wte.weight.data.copy_(own.transformer.wte.weight)
    tokens = torch.tensor([[1, 2, 3, 5, 8]])
    torch.testing.assert_close(model(tokens).logits, wanted(tokens).logits, rtol=1e-4, atol=1e-4)


def test_models_in_bfloat16_have_their_difference_in_float32(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.llama(), tmp_path / "base", torch.bfloat16)
    after = tune(base, tmp_path / "tuned", dtype=torch.float32)
    report = extracted(base, after, tmp_path / "lora", energy=1.0)
    assert report.worst.error < 3e-6
    for name, value in oracle.weights_of(after).items():
        if value.dim() == 1:
            carried = adapter_tensors(tmp_path / "lora")[f"base_model.model.{name}"]
            assert carried.dtype == torch.float32 and carried.equal(value)


# --- ranks -------------------------------------------------------------------------------------------------------------


def test_an_energy_gives_every_weight_the_rank_it_needs(tmp_path: Path) -> None:
    base = oracle.save_model(oracle.llama(), tmp_path / "base")
    after = tune(base, tmp_path / "tuned", lambda n, v: v.dim() == 2 and ".0." in n, rank=2)
    shutil.copytree(after, tmp_path / "more")
    more = tune(after, tmp_path / "twice", lambda n, v: v.dim() == 2 and ".1." in n, rank=5)
    report = extracted(base, more, tmp_path / "lora", energy=0.999999)
    assert {t.rank for t in report.tensors if ".0." in t.layer.name} == {2}
    assert {t.rank for t in report.tensors if ".1." in t.layer.name} == {5}
    found = settings(tmp_path / "lora")
    assert found["r"] == found["lora_alpha"] == 5
    assert found["rank_pattern"] == found["alpha_pattern"] and set(found["rank_pattern"].values()) == {2}
    assert all(name.startswith("model.layers.0.") for name in found["rank_pattern"])
    theirs = merged("llama", base, tmp_path / "lora")
    for name, value in oracle.weights_of(more).items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)


def test_a_rank_is_a_cap(bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    report = extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=4, energy=0.5)
    alone = extracted(bases["llama"], tuned["llama"], tmp_path / "alone", energy=0.5)
    assert [t.rank for t in report.tensors] == [min(4, t.rank) for t in alone.tensors]
    assert len({t.rank for t in report.tensors}) > 1


# --- what PEFT and vLLM are told ---------------------------------------------------------------------------------------


def targeted(kind: str, base: Path, adapter: Path) -> set[str]:
    """The modules that PEFT puts factors beside."""
    with oracle.quietly():
        model = PeftModel.from_pretrained(type(MODELS[kind]()).from_pretrained(base), adapter)
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}


CHOICES: dict[str, tuple[str, Chooses, object]] = {
    "leaf names": (
        "llama",
        linears_only,
        ["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
    ),
    "one layer of two": ("llama", lambda n, v: n.endswith("1.mlp.up_proj.weight"), ["model.layers.1.mlp.up_proj"]),
    "dense, which is three": ("bert", lambda n, v: n.endswith("output.dense.weight"), None),
    "embeddings": (
        "gpt2",
        lambda n, v: ".wpe." in n or "0.attn.c_attn.weight" in n,
        ["transformer.h.0.attn.c_attn", "transformer.wpe"],
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_target_modules_are_exactly_those_with_factors(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, chooses, names = CHOICES[case]
    after = tune(bases[kind], tmp_path / "tuned", chooses)
    report = extracted(bases[kind], after, tmp_path / "lora", rank=2)
    assert targeted(kind, bases[kind], tmp_path / "lora") == {tensor.layer.module for tensor in report.tensors}
    assert names is None or settings(tmp_path / "lora")["target_modules"] == names


def test_an_adapter_without_norms_holds_only_what_vllm_takes(bases: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's PEFTHelper needs r, lora_alpha and target_modules, takes alpha/r for every module, refuses modules_to_save and
    bias, and knows lora_A, lora_B, lora_embedding_A and _B."""
    after = tune(bases["llama"], tmp_path / "tuned", weights_only)
    report = extracted(bases["llama"], after, tmp_path / "lora", energy=0.7, modules_to_save=False)
    found = settings(tmp_path / "lora")
    assert found.keys() == {
        "base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern",
    }  # fmt: skip
    assert found["r"] == found["lora_alpha"] == report.rank == max(t.rank for t in report.tensors)
    ends = {".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"}
    assert {end for end in ends for name in adapter_tensors(tmp_path / "lora") if name.endswith(end)} == ends
    assert len(adapter_tensors(tmp_path / "lora")) == 2 * len(report.tensors)


def test_only_a_conv1d_is_said_to_be_fan_in_fan_out(bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    """PEFT 0.21 sets it itself for a Conv1D, with a warning; who reads the config alone needs it."""
    extracted(bases["gpt2"], tuned["gpt2"], tmp_path / "conv1d", rank=2)
    extracted(bases["bert"], tuned["bert"], tmp_path / "linear", rank=2)
    assert settings(tmp_path / "conv1d")["fan_in_fan_out"] is True
    assert "fan_in_fan_out" not in settings(tmp_path / "linear")


def test_the_config_holds_no_path_of_this_machine(bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    extracted(bases["bert"], tuned["bert"], tmp_path / "lora", rank=2)
    assert settings(tmp_path / "lora")["base_model_name_or_path"] == "bert"
    for path in (tmp_path / "lora").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and str(bases["bert"].parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("kind", MODELS)
def test_what_was_extracted_is_inspected(kind: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    report = extracted(bases[kind], tuned[kind], tmp_path / "lora", rank=2)
    found = tv.inspect(tmp_path / "lora")
    assert found.refused is None and found.adapter is not None
    assert found.adapter["modules"] == len(report.tensors)


def test_a_prefix_is_put_before_the_names(bases: dict[str, Path], tmp_path: Path) -> None:
    """The GPT-2 of the Hub is stored without the `transformer.` that it has in memory."""
    for name, source in (("base", bases["gpt2"]), ("tuned", tune(bases["gpt2"], tmp_path / "with"))):
        (tmp_path / name).mkdir()
        shutil.copy(source / "config.json", tmp_path / name)
        stored = {k.removeprefix("transformer."): v for k, v in oracle.weights_of(source).items()}
        save_file(stored, tmp_path / name / "model.safetensors", {"format": "pt"})
    assert any("--prefix" in n for n in plan_lora(tmp_path / "base", tmp_path / "tuned", output=tmp_path / "x", rank=2).notes)
    report = extracted(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", energy=1.0, prefix="transformer")
    assert not any("--prefix" in note for note in report.plan.notes)
    found = merged("gpt2", bases["gpt2"], tmp_path / "lora")
    for name, after in oracle.weights_of(tmp_path / "tuned").items():
        torch.testing.assert_close(found[f"transformer.{name}"], after, rtol=0, atol=2e-6)
    tv.add(tmp_path / "base", tmp_path / "lora", alpha=1, output=tmp_path / "added", fsync=False)
    assert oracle.weights_of(tmp_path / "added").keys() == oracle.weights_of(tmp_path / "tuned").keys()


@pytest.mark.parametrize("module", ["encoder.layer.0.attention.attention.query", "model.layers.0.mlp.experts.3.up_proj"])
def test_a_note_says_which_modules_transformers_5_renames(module: str, tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, f"{module}.weight", torch.zeros(3, 4), torch.ones(3, 4))
    (note,) = plan_lora(base, tuned, output=tmp_path / "lora", rank=2).notes
    assert module in note and "transformers 5" in note
    assert not plan_lora(base, tuned, output=tmp_path / "lora", rank=2, exclude=["*.0.*"]).notes


# --- norms, biases and what no LoRA carries ----------------------------------------------------------------------------


def is_norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name


@pytest.mark.parametrize("kind", MODELS)
def test_norms_are_saved_whole_and_biases_as_such(
    kind: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    extracted(bases[kind], tuned[kind], tmp_path / "lora", rank=2)
    stored, found = adapter_tensors(tmp_path / "lora"), settings(tmp_path / "lora")
    values = {name.removeprefix("base_model.model.") for name in stored if "lora_" not in name}
    flat = {name: value for name, value in oracle.weights_of(tuned[kind]).items() if value.dim() == 1}
    assert values == {name if is_norm(name) else name.replace(".bias", ".base_layer.bias") for name in flat}
    assert found["modules_to_save"]
    assert found.get("bias", "none") == ("none" if "llama" in kind else "lora_only")


def test_one_changed_norm_takes_only_what_peft_takes_with_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves every module whose name ends so: `norm` of Llama would be `input_layernorm` too."""
    after = tune(bases["llama"], tmp_path / "tuned", lambda n, v: n in ("model.norm.weight", "lm_head.weight"))
    report = extracted(bases["llama"], after, tmp_path / "lora", energy=1.0)
    assert settings(tmp_path / "lora")["modules_to_save"] == ["model.norm"]
    assert list(report.plan.layout.values) == ["model.norm.weight"]
    found = merged("llama", bases["llama"], tmp_path / "lora")
    for name, value in oracle.weights_of(after).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


def test_modules_that_peft_would_take_along_keep_their_values(tmp_path: Path) -> None:
    shapes = {"norm.weight": (4,), "layers.0.input_norm.weight": (4,), "layers.0.q.weight": (6, 4)}
    base = write(tmp_path / "base", {name: torch.randn(shape) for name, shape in shapes.items()})
    after = tune(base, tmp_path / "tuned", lambda n, v: n != "layers.0.input_norm.weight")
    extracted(base, after, tmp_path / "lora", rank=2)
    assert settings(tmp_path / "lora")["modules_to_save"] == ["input_norm", "norm"]
    kept = adapter_tensors(tmp_path / "lora")["base_model.model.layers.0.input_norm.weight"]
    assert kept.equal(oracle.weights_of(base)["layers.0.input_norm.weight"])


def test_a_bias_whose_weight_is_unchanged_is_carried(bases: dict[str, Path], tmp_path: Path) -> None:
    after = tune(bases["bert"], tmp_path / "tuned", lambda n, v: "query.weight" in n or n.endswith("classifier.bias"))
    extracted(bases["bert"], after, tmp_path / "lora", energy=1.0)
    assert settings(tmp_path / "lora")["bias"] == "all"
    found = merged("bert", bases["bert"], tmp_path / "lora")
    for name, value in oracle.weights_of(after).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)


def refused(base: Path, tuned: Path, output: Path, **options: Any) -> TaskvecError:
    before = sorted(output.parent.iterdir())
    with pytest.raises(TaskvecError) as caught:
        extracted(base, tuned, output, **{"rank": 2, **options})
    assert sorted(output.parent.iterdir()) == before, "something was left behind"
    assert "\n" not in str(caught.value)
    return caught.value


def test_without_modules_to_save_norms_are_refused_by_name(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    error = refused(bases["llama"], tuned["llama"], tmp_path / "lora", modules_to_save=False)
    assert isinstance(error, AdapterError)
    assert "model.layers.0.input_layernorm.weight" in str(error) and "--modules-to-save" in str(error)
    report = extracted(
        bases["llama"], tuned["llama"], tmp_path / "lora", rank=2, modules_to_save=False, exclude=["*norm.weight"]
    )
    assert not report.plan.layout.values and "modules_to_save" not in settings(tmp_path / "lora")


def write(folder: Path, tensors: oracle.Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pair(root: Path, name: str, before: torch.Tensor, after: torch.Tensor) -> tuple[Path, Path]:
    """A base and a tuned model that differ in a Linear and in one more tensor."""
    plain = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return (
        write(root / "base", {"m.q.weight": plain, "m.q.bias": plain[:, 0].clone(), name: before}),
        write(root / "tuned", {"m.q.weight": plain + 1, "m.q.bias": plain[:, 0].clone(), name: after}),
    )


NOT_CARRIED = {
    "a convolution": ("m.conv.weight", torch.zeros(2, 3, 5), torch.ones(2, 3, 5)),
    "a parameter of two axes": ("m.q.table", torch.zeros(2, 3), torch.ones(2, 3)),
    "a vector beside modules": ("m.scale", torch.zeros(3), torch.ones(3)),
    "a vector of no module": ("scale", torch.zeros(3), torch.ones(3)),
    "integers": ("m.position_ids", torch.arange(3), torch.arange(3) + 1),
    "integers of another kind": ("m.position_ids", torch.arange(3), torch.arange(3, dtype=torch.int32)),
    "a weight that became inf": ("m.k.weight", torch.zeros(2, 3), torch.full((2, 3), float("inf"))),
}


@pytest.mark.parametrize("case", NOT_CARRIED)
def test_what_no_lora_carries_is_refused_by_name_unless_it_is_excluded(case: str, tmp_path: Path) -> None:
    name, before, after = NOT_CARRIED[case]
    base, tuned = pair(tmp_path, name, before, after)
    error = refused(base, tuned, tmp_path / "lora")
    assert isinstance(error, AdapterError) and error.exit_code == 3
    assert name in str(error) and "--exclude" in str(error)
    extracted(base, tuned, tmp_path / "lora", rank=2, exclude=[name])
    assert targets(tmp_path / "lora") == ["q"]


def targets(adapter: Path) -> object:
    return settings(adapter)["target_modules"]


def test_elements_that_are_nan_in_both_did_not_change(tmp_path: Path) -> None:
    before = torch.randn(4, 4)
    before[1, 2] = float("nan")
    after = before + 1
    base, tuned = pair(tmp_path, "m.k.weight", before, after)
    assert extracted(base, tuned, tmp_path / "lora", rank=2).worst.error < 1


def test_factors_outside_float16_are_refused(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path, "m.k.weight", torch.zeros(4, 3), torch.full((4, 3), 3e10))
    assert "m.k.weight" in str(refused(base, tuned, tmp_path / "lora", dtype="float16"))
    extracted(base, tuned, tmp_path / "lora", rank=2, dtype="bfloat16")


def test_unchanged_tensors_are_left_out(bases: dict[str, Path], tmp_path: Path) -> None:
    after = tune(bases["llama"], tmp_path / "tuned", lambda n, v: "q_proj" in n)
    report = extracted(bases["llama"], after, tmp_path / "lora", rank=2)
    assert {t.layer.module.rpartition(".")[2] for t in report.tensors} == {"q_proj"}
    assert len(adapter_tensors(tmp_path / "lora")) == 4
    assert len(report.plan.unchanged) == len(oracle.weights_of(bases["llama"])) - 2


def test_a_tuned_model_that_is_the_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    after = shutil.copytree(bases["llama"], tmp_path / "tuned")
    assert "no weight of two axes differs" in str(refused(bases["llama"], after, tmp_path / "lora"))


# --- tied heads --------------------------------------------------------------------------------------------------------


def test_a_tied_head_that_is_stored_gets_no_factors_of_its_own(bases: dict[str, Path], tmp_path: Path) -> None:
    def with_head(source: Path, folder: Path) -> Path:
        tensors = oracle.weights_of(source)
        shutil.copytree(source, folder)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
        return folder

    base = with_head(bases["a tied llama"], tmp_path / "base")
    after = with_head(tune(bases["a tied llama"], tmp_path / "plain"), tmp_path / "tuned")
    report = extracted(base, after, tmp_path / "lora", energy=1.0)
    assert "lm_head.weight" not in {tensor.layer.name for tensor in report.tensors}
    assert any("tied" in note for note in report.plan.notes)
    found = merged("a tied llama", base, tmp_path / "lora")
    for name, value in oracle.weights_of(after).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-6)
    tv.add(base, tmp_path / "lora", alpha=1, output=tmp_path / "added", fsync=False)
    torch.testing.assert_close(oracle.weights_of(tmp_path / "added"), oracle.weights_of(after), rtol=0, atol=2e-6)


def test_a_head_that_tuned_unties_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    tensors = oracle.weights_of(bases["a tied llama"])
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    base = write(tmp_path / "base", {**tensors, **head}, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
    after = tune(base, tmp_path / "tuned", lambda n, v: n == "lm_head.weight" or "q_proj" in n)
    assert "lm_head.weight" in str(refused(base, after, tmp_path / "lora"))


# --- the output --------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_inputs_give_the_same_bytes(bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    for name, jobs in (("one", 1), ("many", 5)):
        (tmp_path / name).mkdir()
        extracted(bases["bert"], tuned["bert"], tmp_path / name / "lora", energy=0.8, jobs=jobs, dtype="float16")
    assert files_of(tmp_path / "one" / "lora") == files_of(tmp_path / "many" / "lora")


def test_the_record_says_what_was_made_of_what_and_how_near_it_is(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    report = extracted(bases["gpt2"], tuned["gpt2"], tmp_path / "lora", rank=2, dtype="bfloat16")
    found = json.loads((tmp_path / "lora" / "taskvec.json").read_text())
    assert found["kind"] == "lora" and found["options"]["rank"] == 2 and found["options"]["dtype"] == "bfloat16"
    assert {name: entry["error"] for name, entry in found["tensors"].items()} == {
        t.layer.name: t.error for t in report.tensors
    }
    assert found["worst_error"] == report.worst.error and found["base"]["name"] == "gpt2"
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    assert found["shards"][0]["nbytes"] == weights.stat().st_size == report.bytes_written
    (shard,) = tv.Checkpoint.open(weights).shards
    checksum, _ = verify._scan(shard, InputFiles({}), None, own_record=False)
    assert found["shards"][0]["checksum"] == checksum


def test_the_plan_knows_the_size_when_the_rank_is_given(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    plan = plan_lora(bases["llama"], tuned["llama"], output=tmp_path / "lora", rank=3)
    report = extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=3)
    assert plan.bytes_to_write == report.bytes_written == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    assert plan_lora(bases["llama"], tuned["llama"], output=tmp_path / "x", energy=0.5).bytes_to_write is None


def test_an_output_that_is_there_is_replaced_only_if_asked_for(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=2)
    assert isinstance(refused(bases["llama"], tuned["llama"], tmp_path / "lora"), OutputExistsError)
    extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=3, overwrite=True)
    assert settings(tmp_path / "lora")["r"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert isinstance(refused(bases["llama"], tuned["llama"], bases["llama"] / "lora"), OutputOverlapError)


def test_a_run_that_fails_half_way_leaves_nothing(bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    def stop(tensor: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=2, extracted=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["planned", "extracted"])
def test_an_input_that_changes_meanwhile_is_noticed(
    when: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(tuned["llama"], tmp_path / "tuned")
    touch = {when: lambda what: os.utime(copied / "model.safetensors", (1, 1))}
    assert isinstance(refused(bases["llama"], copied, tmp_path / "lora", jobs=1, **touch), SourceChangedError)


def test_memory_that_holds_no_whole_weight_is_refused_before_the_run(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    error = refused(bases["llama"], tuned["llama"], tmp_path / "lora", memory="10KB")
    assert isinstance(error, UsageError) and "one weight of this run needs" in str(error)
    needed = plan_lora(bases["llama"], tuned["llama"], output=tmp_path / "lora", rank=2).worker_bytes
    extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=2, memory=needed)


USAGE: dict[str, dict[str, Any]] = {
    "neither rank nor energy": dict(rank=None),
    "rank 0": dict(rank=0),
    "energy 0": dict(energy=0.0),
    "energy 1.1": dict(energy=1.1),
    "energy nan": dict(energy=float("nan")),
    "dtype": dict(dtype="float64"),
    "jobs": dict(jobs=0),
    "device": dict(device="tpu"),
    "exclude": dict(exclude=["*nothing*"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_makes_no_sense_is_a_usage_error(
    case: str, bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    assert isinstance(refused(bases["llama"], tuned["llama"], tmp_path / "lora", **USAGE[case]), UsageError)


def test_an_adapter_a_file_and_a_saved_vector_are_refused(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path
) -> None:
    extracted(bases["llama"], tuned["llama"], tmp_path / "lora", rank=2)
    tv.extract(bases["llama"], tuned["llama"], output=tmp_path / "v.safetensors", fsync=False)
    assert "adapter already" in str(refused(bases["llama"], tmp_path / "lora", tmp_path / "x"))
    assert "saved vector" in str(refused(bases["llama"], tmp_path / "v.safetensors", tmp_path / "x"))
    assert "folder" in str(refused(bases["llama"], tuned["llama"], tmp_path / "x.safetensors"))


def test_a_device_of_torch_computes_the_same(
    bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch on the CPU in the place of two GPUs."""
    places: set[str] = set()

    def on(place: str, array: Any) -> tuple[Any, torch.Tensor]:
        places.add(place)
        assert torch.get_float32_matmul_precision() == "highest"
        return torch, torch.from_numpy(array)

    on_cpu = extracted(bases["gpt2"], tuned["gpt2"], tmp_path / "cpu", rank=3)
    torch.set_float32_matmul_precision("high")  # TF32, as a user may have it
    monkeypatch.setattr(device, "open_device", lambda name: device.Device("cuda:0,2", device.cpu_kernel, workers=16))
    monkeypatch.setattr(lora_extract, "_on", on)
    try:
        found = extracted(bases["gpt2"], tuned["gpt2"], tmp_path / "gpu", rank=3, device="cuda:0,2")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert places == {"cuda:0", "cuda:2"} and found.device == "cuda:0,2"
    assert [t.error for t in found.tensors] == pytest.approx([t.error for t in on_cpu.tensors], abs=1e-6)
    assert json.loads((tmp_path / "gpu" / "taskvec.json").read_text())["torch"] == torch.__version__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_gpu_gives_factors_as_near(bases: dict[str, Path], tuned: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        on_gpu = extracted(bases["bert"], tuned["bert"], tmp_path / name / "lora", rank=3, device="cuda")
    assert files_of(tmp_path / "one" / "lora") == files_of(tmp_path / "two" / "lora")
    on_cpu = extracted(bases["bert"], tuned["bert"], tmp_path / "lora", rank=3)
    assert [t.rank for t in on_gpu.tensors] == [t.rank for t in on_cpu.tensors]
    assert [t.error for t in on_gpu.tensors] == pytest.approx([t.error for t in on_cpu.tensors], abs=1e-5)
