"""`taskvec lora`: the group, and `taskvec lora extract`. (`lora merge` is an edit: see edit.py.)"""

from __future__ import annotations

import sys
from typing import Any

import click

from ..checkpoint.locate import on_hub
from ..errors import UsageError, counted, show
from ..run.lora.extract import Extracted, ExtractedLora, extract_lora, lora_workers
from ..run.lora.plan import LoraPlan, plan_lora
from ..run.plan import human_bytes
from .edit import merge
from .main import REVISION, TOKEN, print_json


@click.group()
def lora() -> None:
    """Adapters of the LoRA family by the names their users know."""


lora.add_command(merge)


@lora.command(
    short_help="Make an adapter of a full fine-tune.", epilog="Example: taskvec lora extract base tuned --rank 32 -o my-lora"
)
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--output", required=True, help="A folder.")
@click.option("-r", "--rank", type=int, metavar="R", help="Of every weight, at most.")
@click.option("--energy", type=float, metavar="E", help="Share of ‖Δ‖² to keep, as 0.95: the least rank that does.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option(
    "--modules-to-save/--no-modules-to-save",
    default=True,
    show_default=True,
    help="Carry norms and biases that changed, exactly: PEFT loads them, vLLM does not. Else they are refused by name.",
)
@click.option("--prefix", default="", metavar="NAME", help="What names in memory begin with, and those of the file do not.")
@click.option("--include", multiple=True, metavar="GLOB", help="Only these tensors (repeatable).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Without these tensors (repeatable).")
@click.option("--overwrite", is_flag=True, help="Replace an output that taskvec made, in one step.")
@REVISION
@TOKEN
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, cuda:0,1, cuda:all or auto.")
@click.option("-j", "--jobs", type=int, metavar="N", help="Weights at a time; one per processor (at most 8) or GPU.")
@click.option("--memory", metavar="SIZE", help="Cap, like 8GB: fewer weights at a time. Half of the machine's if not given.")
@click.option("--no-fsync", is_flag=True, help="Do not flush to disk: faster, not safe from power loss.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Also list rank and error of every weight.")
def extract(
    base: str, tuned: str, revision: str | None,
    no_fsync: bool, dry_run: bool, as_json: bool, quiet: bool, verbose: bool, device: str,
    jobs: int | None, memory: str | None, **options: Any,
) -> None:  # fmt: skip
    """Write TUNED − BASE as a LoRA: a PEFT folder of low rank.

    Give --rank, --energy or both (then the smaller rank). The error ‖Δ − BA‖ / ‖Δ‖ of every weight is reported, and
    recorded in taskvec.json; `taskvec add BASE ADAPTER --alpha 1` gives TUNED back within it.
    """
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    model = on_hub(base, revision, None)
    if dry_run:
        from ..run.device import open_device

        plan = plan_lora(model, tuned, **options)
        lora_workers(plan, open_device(device), jobs, memory)  # refuses what the run would
        if as_json:
            print_json({"ok": True, "dry_run": True, "plan": plan.summary()})
        elif not quiet:
            click.echo(f"{plan}\ndry run: nothing was written")
        return
    with _Weights(silent=quiet or as_json) as weights:
        made = extract_lora(
            model, tuned, device=device, jobs=jobs, memory=memory, fsync=not no_fsync, planned=weights.planned,
            extracted=weights.extracted, **options,
        )  # fmt: skip
    if as_json:
        print_json(made.summary())
    elif not quiet:
        _print(made, verbose=verbose)


class _Weights:
    """The notes, and on a terminal a bar of the weights that are done: on stderr."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._bar: Any = None

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    def planned(self, plan: LoraPlan) -> None:
        if self._silent:
            return
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
        if sys.stderr.isatty():
            elements = sum(layer.shape[0] * layer.shape[1] for layer in plan.layout.layers)
            self._bar = click.progressbar(length=elements, label="factoring", file=sys.stderr)
            self._bar.render_progress()

    def extracted(self, tensor: Extracted) -> None:
        if self._bar is not None:
            self._bar.update(tensor.layer.shape[0] * tensor.layer.shape[1])


def _print(made: ExtractedLora, *, verbose: bool) -> None:
    worst = made.worst
    click.echo(f"{show(made.output_name)} ≈ {show(made.plan.tuned.label)} − {show(made.plan.base.label)}")
    click.echo(
        f"  weights   {len(made.tensors)} factored, rank {made.rank} at most; "
        f"{counted(len(made.plan.layout.values), 'tensor')} carried as they are, {len(made.plan.unchanged)} unchanged"
    )
    click.echo(f"  error     {worst.error:.3g} at worst ({show(worst.layer.name)}), {made.median_error:.3g} median")
    click.echo(f"  bytes     {human_bytes(made.bytes_written)} written")
    click.echo(f"  time      {made.seconds:.2f} s on {made.device}")
    if verbose:
        for tensor in made.tensors:
            click.echo(f"    {show(tensor.layer.name)}: rank {tensor.rank}, error {tensor.error:.3g}, {tensor.layer.kind}")
