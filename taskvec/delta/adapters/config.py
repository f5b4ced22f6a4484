"""An adapter folder as PEFT writes it: `adapter_config.json` and the header of `adapter_model.safetensors`."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.files import exists
from ...checkpoint.locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LARGEST_CONFIG, read_json
from ...errors import AdapterError, CheckpointError, show
from .patterns import Patterns

MERGE_FIRST = "Merge it with PEFT (merge_and_unload, save_pretrained) and subtract the merged model"


@dataclass(frozen=True)
class AdapterFolder:
    """`config` is the JSON object as it is; `weights` the tensors, by headers only."""

    path: Path
    config: dict[str, Any] = field(compare=False)
    weights: Checkpoint
    config_sha256: str

    @cached_property
    def _patterns(self) -> dict[str, Patterns]:
        return {}

    @classmethod
    def open(cls, folder: Path) -> AdapterFolder:
        """Raises AdapterError when one of the two files is missing, CheckpointError when one is malformed."""
        config_path, weights_path = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
        if not exists(config_path):
            raise AdapterError(
                f"{show(folder)}: {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}: the scale alpha/r is not in the weights",
                hint="Fetch the config that was saved with it",
            )
        if not exists(weights_path):
            pickled = exists(folder / "adapter_model.bin")
            raise AdapterError(
                f"{show(folder)}: no {ADAPTER_WEIGHTS}" + (", only a pickle (adapter_model.bin)" if pickled else ""),
                hint="taskvec never opens pickles; load it with PEFT and save it again" if pickled else None,
            )
        config = read_json(config_path, LARGEST_CONFIG)
        digest = hashlib.sha256(repr(sorted(config.items())).encode("utf-8", "backslashreplace")).hexdigest()
        weights = replace(Checkpoint.open(weights_path), path=folder, folder=folder)
        return cls(folder, config, weights, digest)

    @property
    def family(self) -> str:
        """`peft_type`, upper case. Raises CheckpointError when the config has none."""
        found = self.config.get("peft_type")
        if not isinstance(found, str):
            raise CheckpointError(f"{show(self.path / ADAPTER_CONFIG)}: no peft_type")
        return found.upper()

    @property
    def label(self) -> str:
        return self.weights.label

    @property
    def named_base(self) -> str | None:
        """The base it names; of a path on the machine that trained it, the last part."""
        name = self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            return None
        is_path = name.startswith(("/", "~", ".")) or name.count("/") > 1 or "\\" in name
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path else name

    @property
    def quantized_base(self) -> str | None:
        """The base it names, when that name says 4-bit or 8-bit: the adapter also learned that base's rounding."""
        name = self.named_base
        return name if name and re.search(r"bnb-?4bit|bnb-?8bit|-4bit$|-8bit$", name) else None

    def refuse(self, reason: str, hint: str | None = None) -> AdapterError:
        return AdapterError(f"{show(self.path / ADAPTER_CONFIG)}: {reason}", hint=hint)

    def number(self, key: str, value: object) -> float:
        """`value` of config field `key` as a number. Raises AdapterError when it is none."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise self.refuse(f"{show(key)} is {show(value)}, expected a number")
        return float(value)

    def pattern_value(self, key: str, module: str, field: str, default: object) -> float:
        """The entry of `rank_pattern` or `alpha_pattern` for a module, by PEFT's rule, else config field `field`.

        PEFT 0.21 (utils/other.py, get_pattern_key): the first key, in the order of the file, for which
        `(.*\\.)?(key)$` matches the module name.
        """
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict):
            raise self.refuse(f"{key} is {type(patterns).__name__}, expected an object")
        found = self._first_match(key, module) if patterns else None
        if found is not None:
            return self.number(f"{key}[{found}]", patterns[found])
        return self.number(field, self.config.get(field, default))

    def _first_match(self, key: str, module: str) -> str | None:
        try:
            if key not in self._patterns:
                self._patterns[key] = Patterns(self.config[key])
            return self._patterns[key].first(module)
        except ValueError as error:
            raise self.refuse(f"{key}: {error}", hint="Write out the module names") from error
