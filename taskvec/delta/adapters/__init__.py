"""From an adapter to the family that can read it. A family is one file beside this one and one line in FAMILIES."""

from __future__ import annotations

import importlib
import os

from ...checkpoint.locate import ADAPTER_CONFIG, locate_adapter, locate_peft
from ...errors import AdapterError, show
from ..source import AdapterSource
from .config import MERGE_FIRST, AdapterFolder

FAMILIES = {  # peft_type in adapter_config.json -> the module beside this one whose FAMILY it is
    "LORA": "lora",
    "ADALORA": "adalora",
    "C3A": "c3a",
    "LOHA": "loha",
    "LOKR": "lokr",
    "MISS": "miss",
    "RANDLORA": "randlora",
    "SHIRA": "shira",
    "VERA": "vera",
    "BOFT": "boft",
    "HIRA": "hira",
    "HRA": "hra",
    "IA3": "ia3",
    "LN_TUNING": "ln_tuning",
    "OFT": "oft",
    "TRAINABLE_TOKENS": "trainable_tokens",
}

_RARE = ("VBLORA", "GRALORA", "GLORA", "PSOFT", "OSF", "DEFT", "ADAMSS", "SUPERTUNING", "BEFT", "DELORA", "ROAD")
_NOT_READ = {  # families that PEFT merges and this version does not, and why
    "FOURIERFT": "where its coefficients go is drawn from a seed, not in the file",
    "WAVEFT": "where its coefficients go is drawn from a seed, not in the file",
    "UNILORA": "its projection is drawn from a seed, not in the file",
    "TINYLORA": "its projection is drawn from a seed, not in the file",
    "PVERA": "its projection is drawn from a seed, not in the file",
    "FROD": "its projection is drawn from a seed, not in the file",
    "BONE": "PEFT has replaced it by MISS",
    **dict.fromkeys(_RARE, "it is not read here"),
}
_NO_WEIGHTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT",
    "XLORA", "POLY", "LILY", "PEANUT", "SHADOW",
}  # fmt: skip


def open_adapter(source: str | os.PathLike[str]) -> AdapterSource:
    """Open a PEFT adapter folder (or the weight file in it), or an adapter that is one file, as sd-scripts, LyCORIS and
    diffusers write them. Reads config, header and the scalars in the file only.

    Raises AdapterError when it is none of these, or naming the family when it is not one of FAMILIES.
    """
    folder = locate_peft(source)
    if folder is None and locate_adapter(source) is not None:
        from .single_file import open_single_file

        return open_single_file(source)
    if folder is None:
        raise AdapterError(
            f"{show(source)}: not an adapter folder, found no {ADAPTER_CONFIG}",
            hint="Name the folder PEFT saved, or the .safetensors file of an adapter",
        )
    adapter = AdapterFolder.open(folder)
    if adapter.family in FAMILIES:
        from .peft import open_peft

        return open_peft(adapter, importlib.import_module(f".{FAMILIES[adapter.family]}", __package__).FAMILY)
    hint: str | None = MERGE_FIRST
    if adapter.family in _NO_WEIGHTS:
        reason, hint = "it changes the inputs or the activations: there is no vector to subtract", None
    else:
        reason = _NOT_READ.get(adapter.family, "unknown")
        reason += f" (read are {', '.join(FAMILIES)})"
    raise AdapterError(f"{show(folder / ADAPTER_CONFIG)}: peft_type {show(adapter.family)}: {reason}", hint=hint)
