"""An adapter for a pipeline names the parts it changes; a base may be one part alone, or keep several in one file.

A module is named `<component>.<module>` (diffusers, ComfyUI) or `<prefix>_<module, its dots made underscores>` (sd-scripts,
LyCORIS). What an underscore stands for is found by flattening the base's own names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from ...errors import AdapterError, NameMismatchError, counted, listing, show
from .names import map_names
from .unet_names import second_names

_DENOISER = ("", "model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")
_CLIP = ("", "text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
         "text_encoders.clip_l.transformer.")  # fmt: skip
_SECOND = ("", "text_encoder_2.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.")
_THIRD = ("", "text_encoder_3.", "text_encoder_2.", "text_encoders.t5xxl.transformer.")
_HOMES = {  # component in the adapter -> where a base may keep it
    "unet": _DENOISER, "transformer": _DENOISER, "diffusion_model": _DENOISER, "lora_unet": _DENOISER,
    "lora_transformer": _DENOISER, "lycoris": _DENOISER, "transformer_2": ("", "transformer_2."), "prior": ("", "prior."),
    "text_encoder": _CLIP, "lora_te": _CLIP, "lora_te1": _CLIP, "text_encoder_2": _SECOND, "lora_te2": _SECOND,
    "text_encoder_3": _THIRD, "lora_te3": _THIRD,
}  # fmt: skip
_FLATTENED = re.compile(r"^(lora_unet|lora_transformer|lora_te[123]?|lycoris)_([^.]+(?:\.weight|\.bias)?)$")
_ONE_BY_ONE = "Save the tensors of each part to a file of its own, and edit each part's model with its file"


class Place(NamedTuple):
    """Where in a pipeline: `component` is empty if the name does not say; `rest` is the name within it."""

    component: str
    rest: str
    flattened: bool


def place(name: str) -> Place:
    """Of a module, or of a tensor of one."""
    if match := _FLATTENED.match(name):
        return Place(match[1], match[2], True)
    first, _, rest = name.partition(".")
    return Place(first, rest, False) if first in _HOMES else Place("", name, False)


def find(names: Iterable[str], base: Collection[str], adapter: object, path: object) -> Mapping[str, str]:
    """adapter tensor name -> base tensor name; a `Finder`. Every component is in one place of the base, as a whole.

    Raises NameMismatchError listing what is in none, AdapterError if a name, or a tensor of the base, is meant twice.
    """
    wanted = list(dict.fromkeys(names))
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(place(name).component, []).append(name)
    if list(groups) == [""]:
        return map_names(wanted, base, adapter, path)
    tables = _Tables(base)
    found: dict[str, set[str]] = {}
    for component, group in groups.items():
        found.update(tables.look_up(group, _HOMES.get(component, ("",))))
    if len(found) < len(wanted):
        raise _not_found([name for name in wanted if name not in found], wanted, adapter, path)
    for name, candidates in found.items():
        if len(candidates) > 1:
            raise AdapterError(
                f"{show(adapter)}: module {show(name.rpartition('.')[0])}: may be any of {listing(sorted(candidates))} in "
                f"{show(path)}",
                hint="Save the adapter with dots in its names, as diffusers does",
            )
    mapped = {name: min(candidates) for name, candidates in found.items()}
    _refuse_overlap(mapped, adapter, path)
    return mapped


class _Tables:
    """What a base's tensors are called, whole and flattened, in its own layout and in the other one a UNet has."""

    def __init__(self, base: Collection[str]) -> None:
        self._whole: dict[str, set[str]] = {}
        self._flat: dict[str, set[str]] = {}
        for name, stored in (*((name, name) for name in base), *second_names(base).items()):
            self._whole.setdefault(name, set()).add(stored)
            self._flat.setdefault(_flat(name), set()).add(stored)

    def look_up(self, names: list[str], homes: Iterable[str]) -> Mapping[str, set[str]]:
        """Candidates for the names of one component: in every home that has all of them, else in the one with most."""
        best: dict[str, set[str]] = {}
        for home in homes:
            mapped = {name: candidates for name in names if (candidates := self._candidates(home, place(name)))}
            if len(mapped) == len(best) == len(names):
                best = {name: best[name] | mapped[name] for name in names}
            else:
                best = max(best, mapped, key=len)
        return best

    def _candidates(self, home: str, place: Place) -> set[str]:
        name = home + place.rest
        return self._flat.get(_flat(name), set()) if place.flattened else self._whole.get(name, set())


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _not_found(left: list[str], wanted: list[str], adapter: object, path: object) -> NameMismatchError:
    parts, all_parts = ({place(name).component or "no component" for name in names} for names in (left, wanted))
    hint = "It belongs to another model, or to this one with its tensors named in another way"
    return NameMismatchError(
        f"{show(adapter)}: {len(left)} of {counted(len(wanted), 'adapted tensor')} are not in {show(path)} "
        f"(of {', '.join(sorted(parts))}): {listing(left)}",
        hint=_ONE_BY_ONE if len(all_parts) > 1 else hint,
    )


def _refuse_overlap(mapped: Mapping[str, str], adapter: object, path: object) -> None:
    """Two text encoders have layers of the same names: laid on one model, they would both seem to fit."""
    seen: dict[str, str] = {}
    for name, target in mapped.items():
        first = seen.setdefault(target, name)
        if first != name:
            raise AdapterError(
                f"{show(adapter)}: {show(first)} and {show(name)} would both change {show(target)} of {show(path)}",
                hint=_ONE_BY_ONE,
            )
