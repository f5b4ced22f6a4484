"""Names in an adapter -> names in the base checkpoint: one place for all families.

An adapter names modules as they were in memory when it was trained; a checkpoint may have been saved with or without a
first component (`model.`, `transformer.`). ONE rule is chosen for the whole adapter, and only if it maps every name:
suffixes are never guessed tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ...errors import NameMismatchError, listing, show

_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
_PREFIX = re.compile(r"^base_model\.(?:model\.)?")


def peft_name(key: str) -> str:
    """The name PEFT gives a tensor inside the model: wrapper infixes, `base_model.model.` and `.default` stripped."""
    name = _PREFIX.sub("", _WRAPPERS.sub("", key))
    name = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
    return re.sub(r"\.default(?=\.weight$|\.bias$|$)", "", name)


def map_names(names: Iterable[str], base: Collection[str], adapter: object, path: object) -> Mapping[str, str]:
    """adapter tensor name -> base tensor name, by the first rule that maps all of them.

    Rules: as it is; first component dropped; one of base's first components added. Raises NameMismatchError listing
    what the best rule leaves unmatched.
    """
    wanted = list(dict.fromkeys(names))
    best: dict[str, str] = {}
    for rule in _rules(base):
        mapped = {name: target for name in wanted if (target := rule(name)) in base}
        if len(mapped) == len(wanted):
            return mapped
        best = max(best, mapped, key=len)
    unmatched = [name for name in wanted if name not in best]
    raise NameMismatchError(
        f"{show(adapter)}: {len(unmatched)} of {len(wanted)} adapted tensors are not in {show(path)}: {listing(unmatched)}",
        hint="The adapter belongs to another model" if not best else "Nothing is merged in part; is this its base?",
    )


class _Drop:
    def __call__(self, name: str) -> str:
        return name.partition(".")[2]


class _Add:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name


def _rules(base: Collection[str]) -> list[_Add | _Drop]:
    prefixes = dict.fromkeys(name.partition(".")[0] for name in base)
    return [_Add(""), _Drop(), *(_Add(prefix) for prefix in prefixes)]
