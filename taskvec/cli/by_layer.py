"""A number for each layer and kind of module as a table: shaded on a terminal, in plain columns elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from ..errors import show
from ..insight.diff import Place

if TYPE_CHECKING:
    from rich.table import Table

_SHADES = ("#fff7e0", "#ffe9ad", "#ffd27a", "#ffb14d", "#ff8a3c", "#f2602e")  # black is readable on each of them
_Rows = list[tuple[str, list[float | None]]]  # the number of a layer, and its values under the headings


def print_by_layer(values: Mapping[Place, float], what: str) -> None:
    """A table for each stack of layers, then one for what is outside of them; `what` the numbers are."""
    scale = _Scale(list(values.values()))
    for stack in dict.fromkeys(place.stack for place in values if place.layer is not None):
        own = {place: value for place, value in values.items() if place.stack == stack and place.layer is not None}
        kinds = list(dict.fromkeys(place.kind for place in own))
        layers = sorted({place.layer for place in own if place.layer is not None})
        rows: _Rows = [(str(layer), [own.get(Place(stack, layer, kind)) for kind in kinds]) for layer in layers]
        _print_table(show(stack) or "layers", _short(kinds), rows, scale)
    outside: _Rows = [(show(place.kind), [value]) for place, value in values.items() if place.layer is None]
    if outside:
        _print_table("outside of layers", [what], outside, scale)


def _short(kinds: list[str]) -> list[str]:
    """Of each dotted name the shortest end that no other one has."""
    found = []
    for kind in kinds:
        parts = kind.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        mine = next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in kinds) == 1), kind)
        found.append(show(mine))
    return found


class _Scale:
    """Shades on a logarithmic scale from the smallest to the largest value there is."""

    def __init__(self, values: list[float]) -> None:
        logs = [math.log(value) for value in values if value > 0 and math.isfinite(value)]
        self._low, self._high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def style(self, value: float) -> str:
        if math.isnan(value) or value == 0:
            return ""
        if math.isinf(value) or self._high == self._low:
            return f"black on {_SHADES[-1]}"
        at = (math.log(value) - self._low) / (self._high - self._low)
        return f"black on {_SHADES[min(len(_SHADES) - 1, int(at * len(_SHADES)))]}"


def _print_table(title: str, headings: list[str], rows: _Rows, scale: _Scale) -> None:
    click.echo("")
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(_shaded(title, headings, rows, scale))
        return
    lines = [[title, *headings], *([name, *map(_cell, values)] for name, values in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join([f"{line[0]:<{widths[0]}}", *(f"{text:>{width}}" for text, width in zip(line[1:], widths[1:]))]))


def _shaded(title: str, headings: list[str], rows: _Rows, scale: _Scale) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(Text(title.replace(".", ".\n")), overflow="fold")
    for heading in headings:  # the widest are folded first: numbers are the last to be
        table.add_column(Text(heading.replace(".", ".\n")), justify="right", overflow="fold")
    for name, values in rows:
        table.add_row(Text(name), *(Text(_cell(v), style="" if v is None else scale.style(v)) for v in values))
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
