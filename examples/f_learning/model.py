"""The models: a small GPT-2 that reads whole words, or any causal language model of transformers; PEFT adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from world import World

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}


def new_tokenizer(world: World) -> Any:
    """One token per word of the world."""
    words = sorted({word for text in world.texts() for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def new_model(vocabulary: int, width: int) -> Any:
    """A GPT-2 of two layers and four heads, head not tied, with nothing learned yet."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=64, n_embd=width, n_layer=2, n_head=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip


def load(folder: str | Path, device: str, adapter: Path | None = None) -> Any:
    """A checkpoint in float32, with `adapter` attached to it if there is one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return model.to(device).eval()


def config(folder: str | Path) -> Any:
    return AutoConfig.from_pretrained(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint on disk, of one file or of several."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load_tokenizer(folder: str | Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def with_lora(model: Any, seed: int) -> Any:
    """`model` frozen, with a fresh LoRA on every linear layer but the head: A random, B zero."""
    torch.manual_seed(seed)
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())  # GPT-2 stores [in, out]
    return get_peft_model(model, LoraConfig(**LORA, fan_in_fan_out=transposed))
