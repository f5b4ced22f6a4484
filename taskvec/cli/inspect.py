"""`taskvec inspect`."""

from __future__ import annotations

import click

from ..checkpoint.locate import on_hub
from ..errors import counted, show
from ..insight.inspect import Inspection
from ..insight.inspect import inspect as inspect_source
from ..run.plan import human_bytes
from .main import REVISION, TOKEN, print_json


@click.command()
@click.argument("model")
@REVISION
@TOKEN
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Names, shapes, dtypes and sizes of MODEL, a file, a folder, an adapter or a name on the Hub. Reads headers only."""
    found = inspect_source(on_hub(model, revision, None))
    if as_json:
        print_json({"ok": True, **found.summary()})
        return
    width = max((len(show(t.name)) for t in found.tensors), default=0)
    for tensor in found.tensors:
        shape = "×".join(map(str, tensor.shape)) or "scalar"
        click.echo(f"{show(tensor.name):<{width}}  {tensor.dtype:<7} {shape:>16}  {human_bytes(tensor.nbytes):>11}")
    click.echo(_totals(found))
    for line in _adapter_lines(found):
        click.echo(line)


def _totals(found: Inspection) -> str:
    parameters = sum(tensor.elements for tensor in found.tensors)
    dtypes = ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in found.dtypes.items())
    return (
        f"{show(found.label)}: {counted(len(found.tensors), 'tensor')}, {counted(parameters, 'parameter')} in "
        f"{counted(len(found.files), 'file')} ({dtypes or 'empty'})"
    )


def _adapter_lines(found: Inspection) -> list[str]:
    if found.adapter is None:
        return []
    lines = []
    for key, value in found.adapter.items():
        if isinstance(value, dict):
            value = ", ".join(f"{show(name)} ({count})" for name, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(show, value))
        if value not in (None, ""):
            lines.append(f"  {key:<9} {show(value, 2000)}")
    return lines + ([f"  refused   {found.refused}"] if found.refused else [])
