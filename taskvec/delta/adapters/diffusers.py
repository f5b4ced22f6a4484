"""Adapters as diffusers and its relatives write them: `<component>.<module>.<suffix>`, the module named as in the model.

`unet.|transformer.|text_encoder.<module>.lora_A.weight`        diffusers, with PEFT's own suffixes
`diffusion_model.<module>.lora_A.weight`                        ComfyUI, ai-toolkit
`<component>.<module>.lora.down.weight`, `.lora_linear_layer.`  diffusers before 0.22
`<module>.processor.to_q_lora.down.weight`                      diffusers before 0.18: the layer is <module>.to_q
`<module>.lora_A.weight`                                        the state dict of one component

The settings of every component are a PEFT config in `__metadata__["lora_adapter_metadata"]`, each field after the name of
its component (`unet.lora_alpha`; diffusers 0.42, loaders/lora_base.py). Without them s = 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.locate import parse_json
from ...errors import AdapterError, listing, show
from .config import AdapterFolder
from .names import peft_name

METADATA = "lora_adapter_metadata"
_OLD_SUFFIX = re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$")
_OLD_ATTENTION = re.compile(r"(\.self_attn)?(?:\.processor)?\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_FACTOR = {"down": "lora_A.weight", "up": "lora_B.weight"}


def modern_name(key: str) -> str:
    """A key of any of these forms as `<component>.<module>.<PEFT's suffix>`."""
    if match := _OLD_ATTENTION.search(key):
        in_text_encoder, projection, factor = match.groups()
        layer = f".self_attn.{projection}_proj" if in_text_encoder else f".to_{projection}"
        layer += ".0" if layer == ".to_out" else ""  # a list of the projection and its dropout
        return f"{key[: match.start()]}{layer}.{_FACTOR[factor]}"
    if match := _OLD_SUFFIX.search(key):
        return f"{key[: match.start()]}.{_FACTOR[match[1]]}"
    return peft_name(key)


@dataclass(frozen=True)
class Settings(AdapterFolder):
    """The PEFT config of one component, out of a file's metadata."""

    component: str = ""

    def refuse(self, reason: str, hint: str | None = None) -> AdapterError:
        of = f" of {show(self.component)}" if self.component else ""
        return AdapterError(f"{show(self.weights.shards[0].path)}: {METADATA}{of}: {reason}", hint=hint)


def settings_of(weights: Checkpoint, components: Iterable[str]) -> dict[str, Settings | None]:
    """component -> its settings, None where the file has none for it. Raises AdapterError if they are not what diffusers
    writes, or are for other components only."""
    (shard,) = weights.shards
    content = _content(shard.metadata.get(METADATA), shard.path)
    found = {component: _of_component(content, component) for component in components}
    if content and not any(found.values()):
        others = dict.fromkeys(key.rpartition(".")[0] or "no component" for key in content)
        raise AdapterError(
            f"{show(shard.path)}: {METADATA} is of {listing(others)}, but its modules are of "
            f"{listing(component or 'no component' for component in found)}",
            hint="Name the modules after their component, or save the file without that metadata if s = 1",
        )
    return {
        component: Settings(shard.path, config, weights, "", component) if config else None
        for component, config in found.items()
    }


def _of_component(content: Mapping[str, Any], component: str) -> dict[str, Any]:
    """What `content` has in the form `<component>.<field>`, or `<field>` for no component."""
    split = {key: key.rpartition(".") for key in content}
    return {field: content[key] for key, (of, _, field) in split.items() if of == component}


def _content(text: str | None, path: object) -> dict[str, Any]:
    try:
        content = parse_json(text or "{}")
    except ValueError as error:
        raise AdapterError(f"{show(path)}: {METADATA} is not JSON ({show(error)})") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{show(path)}: {METADATA} is a JSON {type(content).__name__}, expected an object")
    return content
