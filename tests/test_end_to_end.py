"""The command line on real model folders, and what transformers, safetensors and PEFT make of its output."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

import taskvec as tv
from taskvec.cli.main import _run

from .delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]

SIDE_FILES = {"tokenizer.json": '{"version": "1.0"}', "tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}
Command = Callable[..., int]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def taskvec(monkeypatch: pytest.MonkeyPatch) -> Command:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["taskvec", *arguments])
        return _run()

    return run


def save(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    oracle.save_model(model, folder, dtype, **options)
    for name, content in SIDE_FILES.items():
        (folder / name).write_text(content)
    return folder


def loaded(folder: Path, kind: Any = AutoModelForCausalLM) -> dict[str, torch.Tensor]:
    """The weights as transformers loads them; nothing may be missing, unexpected or of another shape."""
    with oracle.quietly():
        model, report = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def minus(base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """base − α(tuned − base), one float32 operation at a time, rounded once to base's dtype."""
    scale = torch.tensor(alpha, dtype=torch.float32)
    return {name: (b.float() - (tuned[name].float() - b.float()) * scale).to(b.dtype) for name, b in base.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


# --- full fine-tunes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [("1GB", "1GB"), ("4KB", "1GB"), ("1GB", "4KB"), ("4KB", "6KB")])
def test_transformers_loads_the_edited_model_with_the_weights_torch_computes(
    shards: tuple[str, str], dtype: torch.dtype, taskvec: Command, here: Path
) -> None:
    base = save(oracle.llama(), here / "base", dtype, max_shard_size=shards[0])
    tuned = save(oracle.random_model(oracle.llama(), seed=5), here / "old", dtype, max_shard_size=shards[1])
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shards[0] == "4KB")
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "edited") == 0
    assert_same(loaded(here / "edited"), minus(loaded(base), loaded(tuned), 0.3))


def test_a_tied_model_stays_tied(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(tie_word_embeddings=True), here / "base")
    tuned = save(oracle.random_model(oracle.llama(tie_word_embeddings=True), seed=5), here / "old")
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "edited") == 0
    edited = loaded(here / "edited")
    assert "lm_head.weight" not in oracle.weights_of(here / "edited")
    assert edited["lm_head.weight"].equal(edited["model.embed_tokens.weight"])
    assert_same(edited, minus(loaded(base), loaded(tuned), 0.3))


def test_a_tuned_model_in_another_dtype_is_subtracted_as_the_numbers_it_holds(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(), here / "base", torch.bfloat16)
    tuned = save(oracle.random_model(oracle.llama(), seed=5), here / "old", torch.float32)
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "edited") == 0
    assert_same(loaded(here / "edited"), minus(loaded(base), loaded(tuned), 0.3))


def test_learning_and_forgetting_it_again_gives_the_base_back(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(), here / "base")
    save(oracle.random_model(oracle.llama(), seed=5), here / "old")
    assert taskvec("add", "base", "old", "--alpha", "1", "-o", "learned") == 0
    assert taskvec("subtract", "learned", "old", "--base", "base", "--alpha", "1", "-o", "back") == 0
    for name, tensor in loaded(base).items():
        torch.testing.assert_close(loaded(here / "back")[name], tensor, rtol=0, atol=1e-6)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_an_adapter_is_subtracted_and_transformers_loads_the_result(
    max_shard_size: str, taskvec: Command, here: Path
) -> None:
    base = save(oracle.llama(), here / "base", max_shard_size=max_shard_size)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"])
    adapter = oracle.train(oracle.llama(), here / "lora", config)
    assert taskvec("subtract", "base", "lora", "--alpha", "0.3", "-o", "edited") == 0
    merged = oracle.merged_by_peft(oracle.llama(), base, adapter)
    oracle.assert_is_base_minus(loaded(here / "edited"), loaded(base), merged, 0.3, oracle.identity)


def test_what_was_added_as_an_adapter_can_be_subtracted_as_a_merged_model(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(), here / "base")
    oracle.train(oracle.llama(), here / "lora", LoraConfig(r=4, target_modules=["q_proj"]))
    assert taskvec("add", "base", "lora", "--alpha", "1", "-o", "merged") == 0
    assert taskvec("subtract", "base", "lora", "--alpha", "0.5", "-o", "by-adapter") == 0
    assert taskvec("subtract", "base", "merged", "--alpha", "0.5", "-o", "by-merged") == 0
    for name, tensor in loaded(here / "by-adapter").items():
        torch.testing.assert_close(loaded(here / "by-merged")[name], tensor, rtol=0, atol=1e-6)
    assert not loaded(here / "by-adapter")["model.layers.0.self_attn.q_proj.weight"].equal(
        loaded(base)["model.layers.0.self_attn.q_proj.weight"]
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_the_base_held_and_safetensors_reads_every_file(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(), here / "base", max_shard_size="4KB")
    save(oracle.random_model(oracle.llama(), seed=5), here / "old")
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "edited") == 0
    edited = here / "edited"
    assert {path.name for path in edited.iterdir()} == {path.name for path in base.iterdir()} | {"README.md", "taskvec.json"}
    for name in (*SIDE_FILES, "config.json", "generation_config.json"):
        assert (edited / name).read_bytes() == (base / name).read_bytes()
    for shard in edited.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert list(file.keys()) == list(load_file(base / shard.name))
    index = json.loads((edited / "model.safetensors.index.json").read_text())
    stored = oracle.weights_of(edited)
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert index == json.loads((base / "model.safetensors.index.json").read_text())


def test_out_dtype_is_what_the_config_then_says_and_transformers_loads(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(), here / "base")
    save(oracle.random_model(oracle.llama(), seed=5), here / "old")
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "edited", "--out-dtype", "bfloat16") == 0
    assert {tensor.dtype for tensor in loaded(here / "edited").values()} == {torch.bfloat16}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, here / "edited"))
    assert after == {**before, "dtype": "bfloat16"} and before["dtype"] == "float32"


def test_a_model_in_the_cache_of_the_hub_is_read_through_its_links(taskvec: Command, here: Path) -> None:
    base = save(oracle.llama(), here / "plain", max_shard_size="4KB")
    save(oracle.random_model(oracle.llama(), seed=5), here / "old")
    cache = here / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for place, path in enumerate(sorted(base.iterdir())):
        os.rename(path, cache / "blobs" / f"{place:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{place:040x}")
    assert taskvec("subtract", str(snapshot.relative_to(here)), "old", "--alpha", "0.3", "-o", "edited") == 0
    assert not any(path.is_symlink() for path in (here / "edited").rglob("*"))
    assert {*SIDE_FILES} <= {path.name for path in (here / "edited").iterdir()}
    assert_same(loaded(here / "edited"), minus(loaded(snapshot), loaded(here / "old"), 0.3))
    assert tv.verify("edited").skipped == []


def test_a_pipeline_of_sentence_transformers_keeps_its_modules(taskvec: Command, here: Path) -> None:
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    for name, seed in (("base", 1), ("old", 5)):
        folder = save(oracle.random_model(BertModel(BertConfig(**sizes)), seed), here / name)
        (folder / "2_Dense").mkdir()
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        save_file({"linear.weight": torch.full((4, 16), float(seed))}, folder / "2_Dense" / "model.safetensors")
        paths = ["", "1_Pooling", "2_Dense"]
        (folder / "modules.json").write_text(json.dumps([{"idx": i, "path": path} for i, path in enumerate(paths)]))
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "edited") == 0
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (here / "edited" / name).read_bytes() == (here / "base" / name).read_bytes()
    expected = minus(loaded(here / "base", AutoModel), loaded(here / "old", AutoModel), 0.3)
    assert_same(loaded(here / "edited", AutoModel), expected)
    assert "library_name: sentence-transformers" in (here / "edited" / "README.md").read_text()


def test_a_module_of_a_pipeline_that_was_tuned_too_is_not_passed_over_in_silence(here: Path) -> None:
    for name, seed in (("base", 1), ("old", 5)):
        folder = save(oracle.random_model(oracle.llama(), seed), here / name)
        (folder / "2_Dense").mkdir()
        save_file({"linear.weight": torch.full((4, 16), float(seed))}, folder / "2_Dense" / "model.safetensors")
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "path": "2_Dense"}]))
    assert any("2_Dense" in note for note in (tv.Checkpoint.open("base") - tv.TaskVector.between("base", "old")).plan().notes)


def test_files_alone_are_edited_into_a_file_alone(taskvec: Command, here: Path) -> None:
    save(oracle.llama(), here / "base")
    save(oracle.random_model(oracle.llama(), seed=5), here / "old")
    files = ("base/model.safetensors", "old/model.safetensors")
    assert taskvec("subtract", *files, "--alpha", "0.3", "-o", "edited.safetensors") == 0
    assert_same(load_file(here / "edited.safetensors"), minus(load_file(files[0]), load_file(files[1]), 0.3))
    assert [path.name for path in here.iterdir() if "edited" in path.name] == ["edited.safetensors"]


def test_the_python_functions_make_the_bytes_of_the_command(taskvec: Command, here: Path) -> None:
    save(oracle.llama(), here / "base")
    save(oracle.random_model(oracle.llama(), seed=5), here / "old")
    assert taskvec("subtract", "base", "old", "--alpha", "0.3", "-o", "by-command") == 0
    tv.subtract("base", "old", alpha=0.3, output="by-function")
    base = tv.Checkpoint.open("base")
    (base - 0.3 * tv.TaskVector.between(base, "old")).save("by-operators")
    contents = [{path.name: path.read_bytes() for path in Path(name).iterdir()} for name in ("by-function", "by-operators")]
    expected = {path.name: path.read_bytes() for path in Path("by-command").iterdir()}
    assert contents == [expected, expected]
