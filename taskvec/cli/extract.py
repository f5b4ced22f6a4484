"""`taskvec extract`."""

from __future__ import annotations

from typing import Any

import click

from ..checkpoint.locate import on_hub
from ..delta.vector import TaskVector
from ..errors import UsageError, counted, show
from ..run.edited import edited_checkpoint
from ..run.extract import SavedVector, save_vector
from ..run.plan import human_bytes
from .main import REVISION, TOKEN, print_json
from .progress import Progress


@click.command(epilog="Example: taskvec extract base old -o old.taskvec.safetensors")
@click.argument("base")
@click.argument("tuned", nargs=-1, required=True)
@click.option("-a", "--alpha", type=float, multiple=True, help="Coefficient of each TUNED, in order; 1 if not given.")
@click.option("-o", "--output", required=True, help="A file if it ends in .safetensors, else a folder of shards.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--max-shard-size", metavar="SIZE", help="Of a folder, 5GB if not given.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only these tensors (repeatable).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Without these tensors (repeatable).")
@click.option("--force-base", is_flag=True, help="Take a saved vector for a model it was not made for.")
@click.option("--overwrite", is_flag=True, help="Replace an output that taskvec made, in one step.")
@REVISION
@TOKEN
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, cuda:0,1, cuda:all or auto.")
@click.option("-j", "--jobs", type=int, metavar="N", help="Threads; one per processor, at most 8.")
@click.option("--memory", metavar="SIZE", help="Cap on the run's buffers, like 64MB: fewer threads fit.")
@click.option("--no-fsync", is_flag=True, help="Do not flush to disk: faster, not safe from power loss.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def extract(
    base: str, revision: str | None, tuned: tuple[str, ...],
    alpha: tuple[float, ...], output: str, force_base: bool, no_fsync: bool, as_json: bool,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Save TUNED − BASE as a task vector, to be added or subtracted later.

    TUNED is a fine-tuned copy of BASE, an adapter or another saved vector. Of several, the sum is saved, each times its
    --alpha. Tensors in which nothing changed are left out. Every loader of safetensors reads the file.
    """
    if alpha and len(alpha) != len(tuned):
        raise UsageError(f"{len(alpha)} --alpha for {counted(len(tuned), 'tuned model')}, expected one for each, or none")
    scales = alpha or (1.0,) * len(tuned)
    model = on_hub(base, revision, None)
    edits = [edited_checkpoint(model, old, scale, None, force_base=force_base) for old, scale in zip(tuned, scales)]
    vector: TaskVector = sum((edited.vector for edited in edits[1:]), start=edits[0].vector)
    with Progress(quiet=quiet, as_json=as_json, verbose=False) as progress:
        saved = save_vector(
            vector, output, base=edits[0].base, fsync=not no_fsync, planned=progress.planned, progress=progress.advance,
            shard_done=progress.shard_done, **options,
        )  # fmt: skip
    if as_json:
        print_json(saved.summary())
    elif not quiet:
        progress.note(saved.notes)
        _print(saved)


def _print(saved: SavedVector) -> None:
    click.echo(show(f"{saved.output_name} = {saved.formula}", 2000))
    click.echo(f"  tensors   {len(saved.tensors)} saved, {len(saved.zero)} without a change left out")
    click.echo(f"  bytes     {human_bytes(saved.bytes_written)} written")
    click.echo(f"  time      {saved.seconds:.2f} s")
    for warning in saved.warnings:
        click.echo(f"warning: {warning}", err=True)
