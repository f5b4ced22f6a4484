"""`taskvec subtract` and `taskvec add`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..errors import UsageError
from ..run.edited import edited_checkpoint, workers_for
from ..run.plan import OUT_DTYPES
from .main import print_json
from .progress import Progress, print_report

Command = TypeVar("Command", bound=Callable[..., Any])


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite", ctx, param)
    return value


def _options(command: Command) -> Command:
    """The arguments and options that `subtract` and `add` share, in the order of --help."""
    for decorate in reversed(
        [
            click.argument("model"),
            click.argument("old"),
            click.option(
                "-a", "--alpha", type=float, callback=_finite, required=True, help="Scaling coefficient, any finite real."
            ),
            click.option("-o", "--output", required=True, help="A folder, or one file if it ends in .safetensors."),
            click.option("--base", metavar="ORIGIN", help="What OLD was trained from; MODEL if not given."),
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, cuda:0,1, cuda:all or auto."),
            click.option("--out-dtype", type=click.Choice(list(OUT_DTYPES)), default="same", show_default=True),
            click.option("--max-shard-size", metavar="SIZE", help="Like 5GB; base's shard map if not given."),
            click.option("--include", multiple=True, metavar="GLOB", help="Edit only these tensors (repeatable)."),
            click.option("--exclude", multiple=True, metavar="GLOB", help="Copy these tensors unchanged (repeatable)."),
            click.option("--overwrite", is_flag=True, help="Replace an output that taskvec made, in one step."),
            click.option("-j", "--jobs", type=int, metavar="N", help="Threads; one per processor, at most 8."),
            click.option("--memory", metavar="SIZE", help="Cap on the run's buffers, like 64MB: fewer threads fit."),
            click.option("--no-fsync", is_flag=True, help="Do not flush to disk: faster, not safe from power loss."),
            click.option("--sha256", is_flag=True, help="Record the SHA-256 of every weight file."),
            click.option("--dry-run", is_flag=True, help="Print the plan; write nothing."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure."),
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
            click.option("-v", "--verbose", is_flag=True, help="Also list, per tensor, what changed."),
        ]
    ):
        command = decorate(command)
    return command


@click.command(epilog="Example: taskvec subtract base old-lora --alpha 1 -o edited")
@_options
def subtract(alpha: float, **options: Any) -> None:
    """MODEL − α·(OLD − MODEL): take away what OLD learned.

    MODEL is a .safetensors file or a model folder; OLD is a fine-tuned copy of it, or a PEFT LoRA adapter folder. With
    --base ORIGIN: MODEL − α·(OLD − ORIGIN).
    """
    _run(coefficient=-alpha, **options)


@click.command(epilog="Example: taskvec add base new --alpha 0.5 -o edited")
@_options
def add(alpha: float, **options: Any) -> None:
    """MODEL + α·(OLD − MODEL): put in what OLD learned.

    MODEL is a .safetensors file or a model folder; OLD is a fine-tuned copy of it, or a PEFT LoRA adapter folder. With
    --base ORIGIN: MODEL + α·(OLD − ORIGIN).
    """
    _run(coefficient=alpha, **options)


def _run(
    *, model: str, old: str, coefficient: float, base: str | None, output: str, dry_run: bool, as_json: bool, quiet: bool,
    verbose: bool, no_fsync: bool, device: str, jobs: int | None, memory: str | None, overwrite: bool, sha256: bool,
    **options: Any,
) -> None:  # fmt: skip
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    edited = edited_checkpoint(model, old, coefficient, base)
    if dry_run:
        from ..run.device import open_device

        plan = edited.plan(output=output, overwrite=overwrite, **options)
        workers_for(plan, open_device(device), jobs, memory)  # refuses what the run would
        if as_json:
            print_json({"ok": True, "dry_run": True, "plan": plan.summary()})
        elif not quiet:
            click.echo(f"{plan}\ndry run: nothing was written")
        return
    with Progress(quiet=quiet, as_json=as_json, verbose=verbose) as progress:
        report = edited.save(
            output, device=device, jobs=jobs, memory=memory, overwrite=overwrite, sha256=sha256, fsync=not no_fsync,
            planned=progress.planned, progress=progress.advance, shard_done=progress.shard_done, **options,
        )  # fmt: skip
    if as_json:
        print_json(report.summary())
    elif not quiet:
        print_report(report, verbose=verbose)
