"""The two names of every tensor of a Stable Diffusion UNet: in the layout of LDM (`input_blocks.4.1.…`, what the original
checkpoints have) and in that of diffusers (`down_blocks.1.attentions.0.…`). Adapters are trained in either.

Holds for SD 1, SD 2 and SDXL, all with two layers per block; other UNets have no second name here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "unet.")  # where a checkpoint keeps its UNet
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip


def _modules() -> Iterable[tuple[str, str]]:
    """Names of modules in LDM and in diffusers; a block of a ResNet or of attention stands for what is in it."""
    yield from _OUTSIDE.items()
    for i in range(4):
        for j in range(2):
            yield from _block(f"input_blocks.{3 * i + j + 1}", f"down_blocks.{i}", j)
        yield f"input_blocks.{3 * i + 3}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
        for j in range(3):
            yield from _block(f"output_blocks.{3 * i + j}", f"up_blocks.{i}", j)
        for place in (1, 2):  # behind the attention, where there is one
            yield f"output_blocks.{3 * i + 2}.{place}.conv", f"up_blocks.{i}.upsamplers.0.conv"
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _resnet("middle_block.2", "mid_block.resnets.1")


def _block(ldm: str, diffusers: str, number: int) -> Iterable[tuple[str, str]]:
    yield from _resnet(f"{ldm}.0", f"{diffusers}.resnets.{number}")
    yield f"{ldm}.1", f"{diffusers}.attentions.{number}"


def _resnet(ldm: str, diffusers: str) -> Iterable[tuple[str, str]]:
    for inner, name in _RESNET.items():
        yield f"{ldm}.{inner}", f"{diffusers}.{name}"


_PAIRS = tuple(_modules())


def second_names(base: Collection[str]) -> Mapping[str, str]:
    """What the tensors of a base's UNet are called in the other layout, without prefix -> what they are called in it."""
    for prefix in _PREFIXES:
        if f"{prefix}input_blocks.3.0.op.weight" in base:
            return _renamed(base, prefix, _PAIRS)
        two_layers = f"{prefix}down_blocks.0.resnets.1.conv1.weight" in base
        if two_layers and f"{prefix}down_blocks.0.resnets.2.conv1.weight" not in base:
            return _renamed(base, prefix, [(diffusers, ldm) for ldm, diffusers in _PAIRS])
    return {}


def _renamed(base: Collection[str], prefix: str, pairs: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    others: dict[str, list[str]] = {}
    for name, other in pairs:
        others.setdefault(name, []).append(other)
    deepest = 1 + max(name.count(".") for name in others)
    found = {}
    for name in base:
        parts = name.removeprefix(prefix).split(".") if name.startswith(prefix) else []
        for size in range(min(len(parts) - 1, deepest), 0, -1):  # the longest module that has a name of its own
            if (module := ".".join(parts[:size])) in others:
                found.update({".".join((other, *parts[size:])): name for other in others[module]})
                break
    return found
