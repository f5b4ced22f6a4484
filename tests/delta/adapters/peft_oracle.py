"""Tiny models, adapters trained on them by PEFT (with random weights), and what PEFT itself makes of them.

PEFT is the oracle: Δ is its merge in float32 minus the base, and an edit must be base − α·Δ.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import taskvec as tv

Tensors = dict[str, torch.Tensor]

# what PEFT 0.21 and transformers 5 say to each other; none of it is about the adapters made here
PEFT_CHATTER = [
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:fan_in_fan_out is set to:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:.*tie_word_embeddings.*:UserWarning",
    "ignore:The following alpha_pattern keys:RuntimeWarning",
    "ignore:Adapter .default.*invalid shape:UserWarning",  # its own lora_B.bias is 1-D
]


def llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers, square q_proj and o_proj [16, 16], every other weight oblong; biases everywhere if asked for."""
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    settings = {**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}
    return random_model(LlamaForCausalLM(LlamaConfig(**settings)))


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers, weights stored [in, out]; attn.c_proj is square."""
    return random_model(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)))


def bert() -> BertForSequenceClassification:
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return random_model(BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=16, num_labels=3)))


def random_model(model: Any, seed: int = 1) -> Any:
    """Every parameter random, biases and norms too: a zero would hide an edit of the wrong tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def save_model(model: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    with quietly():
        model.to(dtype).save_pretrained(folder, **options)
    return folder


def train(model: Any, folder: Path, config: LoraConfig, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter folder as PEFT saves it, every adapter tensor random (B too). `model` is changed: pass a fresh one."""
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad or ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    with quietly():
        tuned.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    stored = load_file(weights).items()
    content = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored}
    save_file(content, weights, {"format": "pt"})
    return folder


def merged_by_peft(model: Any, base: Path, adapter: Path) -> Tensors:
    """PEFT's merge of a saved adapter into a saved base, in float32, by the names of the model in memory.

    `model` is an instance of the base's class; its weights are replaced by the saved ones.
    """
    with quietly():
        loaded = type(model).from_pretrained(base, dtype=torch.float32)
        merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def in_double(model: Any, base: Path) -> Any:
    """The model with the weights of a saved base, in float64."""
    with quietly():
        return type(model).from_pretrained(base, dtype=torch.float32).double()


def merged_in_double(model: Any, adapter: Path) -> Tensors:
    """PEFT's merge of a saved adapter into a float64 model, computed in float64."""
    with quietly():
        tuned = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
        merged = tuned.merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in merged.state_dict().items()}


def merged_on_disk(model: Any, base: Path, adapter: Path, folder: Path) -> Tensors:
    """As `merged_by_peft`, but by the names transformers saves the merged model under, in `folder`."""
    with quietly():
        loaded = type(model).from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(loaded, adapter).merge_and_unload().save_pretrained(folder)
    return weights_of(folder)


def weights_of(folder: Path) -> Tensors:
    """Every tensor of a model folder, read by safetensors' own loader."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def edited_by_taskvec(model: Path, adapter: Path, output: Path, alpha: float, **options: Any) -> Tensors:
    tv.subtract(model, adapter, alpha=alpha, output=output, fsync=False, **options)
    return weights_of(output)


def assert_is_base_minus(
    edited: Tensors, base: Tensors, merged: Tensors, alpha: float, name_of: Callable[[str], str]
) -> None:
    """edited == base − α(merged − base), within 1e-6 of the largest change of each tensor; untouched ones bit for bit.

    `name_of`: name on disk -> name in `merged`.
    """
    assert edited.keys() == base.keys()
    changed = 0
    for name, found in edited.items():
        before = base[name].double()
        delta = merged[name_of(name)].double() - before
        assert found.dtype == base[name].dtype and found.shape == base[name].shape
        largest = float(delta.abs().max())
        if largest == 0:
            assert found.equal(base[name]), name
            continue
        changed += 1
        assert_rounded(found, before - alpha * delta, 1e-6 * largest, name)
    assert changed, "the adapter changed nothing: the test proves nothing"


def assert_rounded(found: torch.Tensor, exact: torch.Tensor, tolerance: float, name: str) -> None:
    """`found` is `exact` rounded to found's dtype: within `tolerance`, or one unit in the last place of a small dtype."""
    error = (found.double() - exact).abs()
    if found.dtype == torch.float32:
        assert float(error.max()) <= tolerance, (name, float(error.max()), tolerance)
        return
    rounded = exact.to(found.dtype)
    equal = (found == rounded) | (found.isnan() & rounded.isnan())
    # a float32 result a hair beside the middle of two numbers may round to the other one
    assert float(equal.double().mean()) >= 0.98, (name, float(equal.double().mean()))
    one_ulp = torch.finfo(found.dtype).eps * exact.abs().clamp(min=torch.finfo(found.dtype).smallest_normal)
    assert bool((equal | (error <= one_ulp + tolerance)).all()), name  # near cancellation the float32 error shows


def identity(name: str) -> str:
    return name


def rewrite_tensors(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def rewrite_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """transformers draws bars on stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
