"""`taskvec diff`."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from ..checkpoint.locate import on_hub
from ..errors import EXIT_MISMATCH, EXIT_OK, counted, listing, show
from ..insight.diff import Diff
from ..insight.diff import diff as compare
from .by_layer import print_by_layer
from .main import REVISION, TOKEN, print_json


@click.command(epilog="Example: taskvec diff base edited")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--include", multiple=True, metavar="GLOB", help="Only these tensors (repeatable).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Without these tensors (repeatable).")
@click.option("--tensors", "per_tensor", is_flag=True, help="Also a line for each tensor that differs.")
@click.option("--exit-code", is_flag=True, help="Exit with 3 if they differ.")
@REVISION
@TOKEN
@click.option("-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Threads; one per processor, at most 8.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure.")
def diff(
    a: str, b: str, revision: str | None, per_tensor: bool, exit_code: bool, as_json: bool, **options: Any
) -> int:  # fmt: skip
    """How far B is from A: norms, cosines, elements changed, and how many of them land in another int8 or NF4 bin.

    A and B are models (files, folders or names on the Hub, of any dtypes and sharded in any way) or saved task vectors. First
    the totals, then ‖Δ‖ / ‖A‖ by layer and kind of module, where Δ = B − A.
    """
    with _Bar(silent=as_json) as bar:
        found = compare(on_hub(a, revision, None), b, progress=bar.progress, **options)
    if as_json:
        print_json({"ok": True, **found.summary()})
    else:
        print_totals(found)
        print_tables(found)
        for line in _tensor_lines(found) if per_tensor else ():
            click.echo(line)
    return EXIT_MISMATCH if exit_code and not found.same else EXIT_OK


class _Bar:
    """On a terminal a bar of the bytes that are read, on stderr."""

    def __init__(self, *, silent: bool) -> None:
        self._shown = not silent and sys.stderr.isatty()
        self._bar: Any = None
        self._at = 0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    def progress(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._bar is None:
            self._bar = click.progressbar(length=total, label="comparing", file=sys.stderr)
        self._bar.update(done - self._at)
        self._at = done


def print_totals(found: Diff) -> None:
    """What differs in all, on stdout."""
    total, differing = found.total, sum(not tensor.same for tensor in found.tensors)
    click.echo(show(f"{found.a} → {found.b}", 2000) + (": the same" if found.same else ""))
    rows = [("tensors", f"{len(found.tensors):,} compared, {differing:,} differ")]
    rows += [("elements changed", _of(total.changed, total.elements))]
    rows += [("‖Δ‖, ‖Δ‖ / ‖A‖", f"{_number(total.norm)}, {_number(total.relative)} (largest |Δ| {_number(total.largest)})")]
    rows += [("cosine of A, B", "—" if math.isnan(total.cosine) else f"{total.cosine:.9g}")]
    if found.lost is not None:
        share = "—" if found.lost_share is None else f"{found.lost_share:.1%}"
        rows += [("lost to rounding", f"{found.lost:,} elements, {share} of those the edit meant to change")]
    if total.weights:
        rows += [("another int8 bin", f"{_of(total.int8, total.weights)} of weight matrices, absmax per row")]
        rows += [("another NF4 bin", f"{_of(total.nf4, total.weights)} of weight matrices, blocks of 64")]
    if total.nonfinite:
        names = [tensor.name for tensor in found.tensors if tensor.sums.nonfinite]
        rows += [("inf or NaN", f"{total.nonfinite:,}, left out of the norms, in {listing(names)}")]
    dtypes = {(t.pair.a.dtype, t.pair.b.dtype) for t in found.tensors if t.pair.a.dtype != t.pair.b.dtype}
    rows += [("dtypes", ", ".join(sorted(f"{a} in A, {b} in B" for a, b in dtypes)))] if dtypes else []
    for label, alone in (("only in A", found.only_in_a), ("only in B", found.only_in_b)):
        rows += [(label, f"{counted(len(alone), 'tensor')}: {listing(alone)}")] if alone else []
    rows += [("not comparable", f"{show(name)}: {a} in A, {b} in B") for name, a, b in found.unlike]
    for label, value in rows:
        click.echo(f"  {label:<17} {value}")


def print_tables(found: Diff) -> None:
    """‖Δ‖ / ‖A‖ by layer and kind, of what has any."""
    groups = found.groups.items()
    print_by_layer({place: sums.relative for place, sums in groups if sums.a or sums.delta}, "‖Δ‖ / ‖A‖")


def _tensor_lines(found: Diff) -> list[str]:
    lines = [""]
    for tensor in found.tensors:
        if not tensor.same:
            sums = tensor.sums
            lines.append(
                f"{show(tensor.name)}: ‖Δ‖ {_number(sums.norm)}, ‖Δ‖ / ‖A‖ {_number(sums.relative)}, "
                f"cosine {_number(sums.cosine)}, changed {_of(sums.changed, sums.elements)}"
                + (f", int8 {sums.int8:,}, NF4 {sums.nf4:,}" if sums.weights else "")
                + (f", lost {tensor.lost:,}" if tensor.lost else "")
            )
    return lines


def _number(number: float) -> str:
    return f"{number:.6g}"


def _of(count: int, whole: int) -> str:
    return f"{count:,} of {whole:,} ({count / max(1, whole):.1%})"
