"""Llama-like checkpoints of any size, made tensor by tensor in bounded memory: a base, a fine-tune of it, a LoRA adapter.

    python benchmarks/checkpoints.py WORK --size 1.1b --dtype bfloat16 --shards 5 --seed 0

writes WORK/base, WORK/tuned (sharded alike), WORK/lora-all (r=16 on all seven projections) and WORK/lora-qv.
The values are random: base ~ N(0, 0.02²), tuned = base + N(0, 0.001²), as far apart as a short fine-tune.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# hidden, layers, heads, key-value heads, intermediate, vocabulary
SIZES = {
    "3m": (128, 4, 4, 2, 256, 4096),
    "110m": (768, 10, 12, 4, 2048, 32000),
    "1.1b": (2048, 22, 32, 4, 5632, 32000),  # TinyLlama
    "3.2b": (3200, 26, 32, 32, 8640, 32000),  # OpenLLaMA
    "7b": (4096, 32, 32, 32, 11008, 32000),
}
NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BLOCK = 1 << 22  # elements made at once


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order a Llama checkpoint stores them."""
    hidden, layers, heads, kv, inner, vocabulary = SIZES[size]
    narrow = hidden * kv // heads
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", (hidden,)
        yield at + "mlp.down_proj.weight", (hidden, inner)
        yield at + "mlp.gate_proj.weight", (inner, hidden)
        yield at + "mlp.up_proj.weight", (inner, hidden)
        yield at + "post_attention_layernorm.weight", (hidden,)
        yield at + "self_attn.k_proj.weight", (narrow, hidden)
        yield at + "self_attn.o_proj.weight", (hidden, hidden)
        yield at + "self_attn.q_proj.weight", (hidden, hidden)
        yield at + "self_attn.v_proj.weight", (narrow, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def config(size: str, dtype: str) -> dict[str, object]:
    hidden, layers, heads, kv, inner, vocabulary = SIZES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocabulary,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": dtype, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def stored(values: NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if dtype == "float16" else np.float32).tobytes()


def write(path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: str, fill: Fill) -> int:
    """One safetensors file, written block by block. Returns the bytes of tensor data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    width = 4 if dtype == "float32" else 2
    for name, shape in tensors:
        nbytes = int(np.prod(shape)) * width
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + nbytes]}  # type: ignore[assignment,dict-item]
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            count = int(np.prod(shape))
            for at in range(0, count, _BLOCK):
                file.write(stored(fill(name, at, min(_BLOCK, count - at)), dtype))
    return end


class Fill:
    """Seeded values of one checkpoint: the same for the same name and place, whatever the sharding."""

    def __init__(self, seed: int, drift: float) -> None:
        self.seed, self.drift = seed, drift

    def __call__(self, name: str, at: int, count: int) -> NDArray[np.float32]:
        key = [self.seed, at, *name.encode()]
        values = np.random.default_rng(key).standard_normal(count, np.float32) * np.float32(0.02)
        if self.drift:
            values += np.random.default_rng([*key, 1]).standard_normal(count, np.float32) * np.float32(self.drift)
        return values


def write_model(folder: Path, size: str, dtype: str, shards: int, fill: Fill) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(size, dtype), indent=2))
    everything = list(shapes(size))
    total, limit, groups = sum(int(np.prod(s)) for _, s in everything), 0.0, [[]]  # type: ignore[var-annotated]
    for name, shape in everything:
        if limit >= total / shards * len(groups) and len(groups) < shards:
            groups.append([])
        groups[-1].append((name, shape))
        limit += int(np.prod(shape))
    weight_map, nbytes = {}, 0
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        nbytes += write(folder / name, group, dtype, fill)
        weight_map.update(dict.fromkeys((tensor for tensor, _ in group), name))
    if shards > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_lora(folder: Path, size: str, targets: list[str], rank: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = []
    for name, shape in shapes(size):
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            tensors.append((f"base_model.model.{module}.lora_A.weight", (rank, shape[1])))
            tensors.append((f"base_model.model.{module}.lora_B.weight", (shape[0], rank)))
    write(folder / "adapter_model.safetensors", tensors, "float32", Fill(seed, 0.0))
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "fan_in_fan_out": False, "inference_mode": True,
        "lora_dropout": 0.0, "modules_to_save": None, "init_lora_weights": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))


def build(work: Path, size: str, dtype: str, shards: int, seed: int) -> None:
    """All four inputs under `work`; nothing is made twice."""
    done = work / "inputs.json"
    wanted = {"size": size, "dtype": dtype, "shards": shards, "seed": seed}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return
    write_model(work / "base", size, dtype, shards, Fill(seed, 0.0))
    write_model(work / "tuned", size, dtype, shards, Fill(seed, 1e-3))
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    write_lora(work / "lora-all", size, projections, 16, seed + 1)
    write_lora(work / "lora-qv", size, ["q_proj", "v_proj"], 16, seed + 2)
    done.write_text(json.dumps(wanted))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.1b")
    parser.add_argument("--dtype", choices=NAMES, default="bfloat16")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.work, arguments.size, arguments.dtype, arguments.shards, arguments.seed)
