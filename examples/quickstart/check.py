"""Is it right: the edited files against formulas computed here with torch and PEFT, sharing no code with taskvec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from encoder import unmatched_keys
from rich import box
from rich.table import Table
from safetensors.torch import load_file
from train import merged

State = dict[str, torch.Tensor]
LORA_TOLERANCE = 1e-5  # of the largest |Δ|, beyond rounding: float32 products summed in another order


class Agreement(NamedTuple):
    """How the edited numbers compare with the formula. `largest_error` is in units of the largest |Δ|."""

    holds: bool
    words: str
    largest_error: float


@dataclass(frozen=True)
class Verdict:
    """What was found about one edited model."""

    agreement: Agreement
    same_layout: bool
    edited_tensors: int
    untouched_tensors: int
    untouched_identical: bool
    changed_elements: int
    elements: int
    unmatched: list[str]

    @property
    def passed(self) -> bool:
        return self.agreement.holds and self.same_layout and self.untouched_identical and not self.unmatched


def check_full(base: Path, tuned: Path, edited: Path, alpha: float) -> Verdict:
    """Every element of `edited` against b − f32(α)·(t − b), in float32, one rounded operation after the other."""
    b, t, e = _weights(base), _weights(tuned), _weights(edited)
    touched = {name for name in _alike(b, e) if name in t and b[name].is_floating_point()}
    scale = torch.tensor(alpha, dtype=torch.float32)
    expected = {name: b[name] - scale * (t[name] - b[name]) for name in touched}
    differing = sum(_differing(e[name], expected[name]) for name in touched)
    error = _largest(e[name] - expected[name] for name in touched) / _largest(t[name] - b[name] for name in touched)
    return _verdict(Agreement(differing == 0, f"{differing} elements", error), b, e, touched, edited)


def check_lora(base: Path, adapter: Path, edited: Path, alpha: float) -> Verdict:
    """Every targeted tensor of `edited` against b − α·(m − b), m from PEFT's merge_and_unload in float32.

    Both sides were rounded when they were stored as float32, by up to half an ulp each: at a weight of 8 that is more
    than 1e-5 of a small Δ. The tolerance is on what remains beyond that.
    """
    b, m, e = _weights(base), merged(base, adapter).state_dict(), _weights(edited)
    touched = _targets(adapter) & _alike(b, e)
    largest = _largest(m[name] - b[name] for name in touched)
    errors = {name: e[name].double() - _subtracted(b[name], m[name], alpha) for name in touched}
    rounding = {name: (_ulp(e[name]) + abs(alpha) * _ulp(m[name])) / 2 for name in touched}
    error = _largest(errors.values())
    excess = _largest((errors[name].abs() - rounding[name]).relu() for name in touched)
    holds, words = excess <= LORA_TOLERANCE * largest, f"{excess / largest:.0e} past rounding"
    return _verdict(Agreement(holds, words, error / largest), b, e, touched, edited)


def table(verdicts: dict[str, Verdict]) -> Table:
    """One line per check, one column per edited model."""
    result = Table(title="Is it right?", title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("check", no_wrap=True)
    for label in verdicts:
        result.add_column(label, justify="right", no_wrap=True)
    found = list(verdicts.values())
    result.add_row("difference from torch, PEFT", *(v.agreement.words for v in found))
    result.add_row("largest difference / max |Δ|", *(f"{v.agreement.largest_error:.1e}" for v in found))
    result.add_row("names, shapes, dtypes as in base", *(_yes(v.same_layout) for v in found))
    result.add_row("tensors edited, untouched", *(f"{v.edited_tensors}, {v.untouched_tensors}" for v in found))
    result.add_row("untouched ones identical to base", *(_yes(v.untouched_identical) for v in found))
    result.add_row("elements changed", *(f"{v.changed_elements:,}" for v in found))
    result.add_row("elements of the model", *(f"{v.elements:,}" for v in found))
    result.add_row("transformers: unmatched keys", *(", ".join(v.unmatched) or "none" for v in found))
    result.add_row("passed", *(_yes(v.passed) for v in found))
    return result


def _verdict(agreement: Agreement, base: State, edited: State, touched: set[str], folder: Path) -> Verdict:
    untouched = base.keys() - touched
    return Verdict(
        agreement=agreement,
        same_layout=_layout(base) == _layout(edited),
        edited_tensors=len(touched),
        untouched_tensors=len(untouched),
        untouched_identical=all(name in edited and _same_bits(base[name], edited[name]) for name in untouched),
        changed_elements=sum(_differing(base[name], edited[name]) for name in touched),
        elements=sum(tensor.numel() for tensor in base.values()),
        unmatched=unmatched_keys(folder),
    )


def _weights(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def _layout(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def _alike(a: State, b: State) -> set[str]:
    """The names under which both have a tensor of one shape and dtype."""
    return {name for name, _ in _layout(a).items() & _layout(b).items()}


def _targets(adapter: Path) -> set[str]:
    """The weights a PEFT LoRA acts on, from the names of its A matrices."""
    names = load_file(adapter / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    return {name.removeprefix(prefix).removesuffix(suffix) + ".weight" for name in names if name.endswith(suffix)}


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many float32 elements differ in any bit."""
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _subtracted(base: torch.Tensor, tuned: torch.Tensor, alpha: float) -> torch.Tensor:
    """base − α·(tuned − base) in float64."""
    return base.double() - alpha * (tuned.double() - base.double())


def _largest(tensors: Iterable[torch.Tensor]) -> float:
    """The largest magnitude in any of `tensors`; inf if there is a NaN, which no comparison would notice."""
    return max(tensor.abs().nan_to_num(nan=torch.inf).max().item() for tensor in tensors)


def _ulp(values: torch.Tensor) -> torch.Tensor:
    """The distance from each float32 to the next larger magnitude, in float64."""
    size = values.abs()
    return torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"
