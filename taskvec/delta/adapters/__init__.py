"""From an adapter folder to the family that can read it. A family is one file beside this one and one line in FAMILIES."""

from __future__ import annotations

import os
from collections.abc import Callable

from ...checkpoint.locate import ADAPTER_CONFIG, locate_adapter
from ...errors import AdapterError, show
from ..source import AdapterSource
from .config import AdapterFolder
from .lora import LoraAdapter

# peft_type in adapter_config.json -> what reads it
FAMILIES: dict[str, Callable[[AdapterFolder], AdapterSource]] = {"LORA": LoraAdapter.open}

_NO_WEIGHTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "XLORA", "POLY", "LILY", "PEANUT", "SHADOW",
}  # fmt: skip


def open_adapter(source: str | os.PathLike[str]) -> AdapterSource:
    """Open a PEFT adapter folder (or the weight file in it). Reads its config and its header only.

    Raises AdapterError when there is no config, or naming the family when it is not one of FAMILIES.
    """
    folder = locate_adapter(source)
    if folder is None:
        raise AdapterError(
            f"{show(source)}: not an adapter folder, found no {ADAPTER_CONFIG}", hint="Name the folder PEFT saved"
        )
    adapter = AdapterFolder.open(folder)
    family = FAMILIES.get(adapter.family)
    if family is not None:
        return family(adapter)
    if adapter.family in _NO_WEIGHTS:
        reason, hint = "it changes the inputs, not the weights: there is no vector to subtract", None
    else:
        reason = f"this version reads {', '.join(FAMILIES)} only"
        hint = "Merge it with PEFT (merge_and_unload, save_pretrained) and subtract the merged model"
    raise AdapterError(f"{show(folder / ADAPTER_CONFIG)}: peft_type {show(adapter.family)}: {reason}", hint=hint)
