"""`taskvec subtract`, `taskvec add`, and `taskvec lora merge` (whose group is in lora.py)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..checkpoint.locate import locate_adapter, on_hub
from ..delta.vector import TaskVector
from ..delta.weighting import Depth, Scaled
from ..errors import UsageError, show, tell
from ..run.edited import edited_checkpoint, workers_for
from ..run.plan import OUT_DTYPES
from .main import REVISION, TOKEN, print_json
from .progress import Progress, print_report
from .push import print_pushed

if TYPE_CHECKING:
    from ..hub.push import Pushed

Command = TypeVar("Command", bound=Callable[..., Any])


def _finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite", ctx, param)
    return value


def _arguments(old: str, alpha: float | None = None) -> Callable[[Command], Command]:
    """MODEL and what is added to it or subtracted, and --alpha, which has to be given unless it has a value here."""
    shown: dict[str, Any] = {"required": True} if alpha is None else {"default": alpha, "show_default": True}

    def decorate(command: Command) -> Command:
        scale = click.option(
            "-a", "--alpha", type=float, callback=_finite, help="Scaling coefficient, any finite real.", **shown
        )
        return click.argument("model")(click.argument("old", metavar=old)(scale(command)))

    return decorate


def _options(command: Command) -> Command:
    """The options that the verbs share, in the order of --help."""
    for decorate in reversed(
        [
            click.option(
                "-o", "--output", help="A folder, or one file if it ends in .safetensors. Of --push, its last name."
            ),
            click.option("--base", metavar="ORIGIN", help="What OLD was trained from; MODEL if not given."),
            click.option(
                "--alpha-for", multiple=True, metavar="GLOB=A", help="Another α for tensors of this name (repeatable)."
            ),
            click.option("--alpha-layers", metavar="A:B", help="α from A in the first layer to B in the last."),
            click.option("--mask", metavar="FILE", help="Multiply the difference by these tensors, element by element."),
            click.option("--force-base", is_flag=True, help="Take a saved vector for a model it was not made for."),
            REVISION,
            TOKEN,
            click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, cuda:0,1, cuda:all or auto."),
            click.option("--out-dtype", type=click.Choice(list(OUT_DTYPES)), default="same", show_default=True),
            click.option("--max-shard-size", metavar="SIZE", help="Like 5GB; base's shard map if not given."),
            click.option("--include", multiple=True, metavar="GLOB", help="Edit only these tensors (repeatable)."),
            click.option("--exclude", multiple=True, metavar="GLOB", help="Copy these tensors unchanged (repeatable)."),
            click.option("--no-code", is_flag=True, help="Leave out the Python files that came with MODEL."),
            click.option("--overwrite", is_flag=True, help="Replace an output that taskvec made, in one step."),
            click.option("-j", "--jobs", type=int, metavar="N", help="Threads; one per processor, at most 8."),
            click.option("--memory", metavar="SIZE", help="Cap on the run's buffers, like 64MB: fewer threads fit."),
            click.option("--no-fsync", is_flag=True, help="Do not flush to disk: faster, not safe from power loss."),
            click.option("--sha256", is_flag=True, help="Record the SHA-256 of every weight file."),
            click.option("--push", metavar="REPO", help="Then push it to org/name (or org/name@branch) on the Hub."),
            click.option("--private", is_flag=True, help="Make REPO private; one that exists stays as it is."),
            click.option(
                "--card", type=click.Path(exists=True, dir_okay=False), help="Markdown in place of the card's body."
            ),
            click.option("--dry-run", is_flag=True, help="Print the plan; write nothing."),
            click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure."),
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
            click.option("-v", "--verbose", is_flag=True, help="Also list, per tensor, what changed."),
        ]
    ):
        command = decorate(command)
    return command


@click.command(epilog="Example: taskvec subtract base old-lora --alpha 1 -o edited")
@_arguments("OLD")
@_options
def subtract(alpha: float, **options: Any) -> None:
    """MODEL − α·(OLD − MODEL): take away what OLD learned.

    MODEL is a .safetensors file or a model folder; OLD is a fine-tuned copy of it, or an adapter (a PEFT folder, or a
    Kohya, LyCORIS or diffusers file). With --base ORIGIN: MODEL − α·(OLD − ORIGIN).
    """
    _run(sign=-1.0, alpha=alpha, **options)


@click.command(epilog="Example: taskvec add base new --alpha 0.5 -o edited")
@_arguments("OLD")
@_options
def add(alpha: float, **options: Any) -> None:
    """MODEL + α·(OLD − MODEL): put in what OLD learned.

    MODEL is a .safetensors file or a model folder; OLD is a fine-tuned copy of it, or an adapter (a PEFT folder, or a
    Kohya, LyCORIS or diffusers file). With --base ORIGIN: MODEL + α·(OLD − ORIGIN).
    """
    _run(sign=1.0, alpha=alpha, **options)


@click.command(short_help="Add an adapter to its model.", epilog="Example: taskvec lora merge base my-lora -o merged")
@_arguments("ADAPTER", alpha=1.0)
@_options
def merge(alpha: float, old: str, **options: Any) -> None:
    """MODEL + α·ADAPTER: what the adapter's own library calls merging, with nothing loaded and one rounding.

    The same as `taskvec add`, of an adapter only. Any family that is read may be merged, not LoRA alone.
    """
    if locate_adapter(old) is None:
        raise UsageError(
            f"{show(old)}: not an adapter", hint="Name the folder PEFT saved, or add a full model with `taskvec add`"
        )
    _run(sign=1.0, alpha=alpha, old=old, **options)


def weighted(
    vector: TaskVector, alpha: float, alpha_for: tuple[str, ...], alpha_layers: str | None, mask: str | None
) -> TaskVector:
    """α·vector, where α is that of the first --alpha-for that matches, else of --alpha-layers, else --alpha."""
    patterns = tuple(_pattern(text) for text in alpha_for)
    depth = None if alpha_layers is None else _depth(alpha_layers)
    if patterns or depth:
        vector = TaskVector(tuple((c, Scaled(source, patterns, depth, alpha)) for c, source in vector.terms))
    else:
        vector = alpha * vector
    return vector.masked(mask) if mask is not None else vector


def _pattern(text: str) -> tuple[str, float]:
    pattern, equals, number = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--alpha-for {show(text)!r}, expected GLOB=A, as in '*.mlp.*=0.5'")
    return pattern, _number("--alpha-for", number)


def _depth(text: str) -> Depth:
    first, colon, last = text.partition(":")
    if not colon:
        raise UsageError(f"--alpha-layers {show(text)!r}, expected A:B, as in 0:0.6")
    return Depth(_number("--alpha-layers", first), _number("--alpha-layers", last))


def _number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{option}: {show(text)!r} is not a finite number")
    return number


def _run(
    *, model: str, old: str, sign: float, alpha: float, base: str | None, output: str | None, dry_run: bool, as_json: bool,
    quiet: bool, verbose: bool, no_fsync: bool, device: str, jobs: int | None, memory: str | None, overwrite: bool,
    sha256: bool, alpha_for: tuple[str, ...], alpha_layers: str | None, mask: str | None, force_base: bool,
    revision: str | None, push: str | None, private: bool, card: str | None, no_code: bool, **options: Any,
) -> None:  # fmt: skip
    if quiet and verbose:
        raise UsageError("--quiet and --verbose exclude each other")
    output = _output(output, push, private, card)
    options["code"] = not no_code
    edited = edited_checkpoint(on_hub(model, revision, None), old, 1.0, base, force_base=force_base)
    edited = replace(edited, vector=sign * weighted(edited.vector, alpha, alpha_for, alpha_layers, mask))
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
    if not (quiet or as_json):
        print_report(report, verbose=verbose)
    pushed = None if push is None else _push(report.output_name, push, private, card)
    if as_json:
        print_json({**report.summary(), **({} if pushed is None else {"pushed": pushed.summary()})})
    elif pushed is not None and not quiet:
        print_pushed(pushed)


def _output(output: str | None, push: str | None, private: bool, card: str | None) -> str:
    if push is None:
        if output is None:
            raise UsageError("no output", hint="Name it with -o OUT, or a repository with --push org/name")
        if private or card:
            raise UsageError("--private and --card are for --push")
        return output
    from ..hub.push import default_output, read_card

    name = default_output(push)
    if (output or name).endswith(".safetensors"):
        raise UsageError("--push needs a folder as output, not one file", hint="Name it with -o FOLDER")
    if card is not None:
        read_card(card)
    return output or name


def _push(output: str, repo: str, private: bool, card: str | None) -> Pushed:
    """Push a finished output, which stays whatever happens."""
    from ..hub.push import push

    try:
        return push(output, repo, private=private, card=card)
    except BaseException as error:
        more = ["--private"] * private + (["--card", card] if card else [])
        tell(error, f"{show(output)} is complete: push it with `{shlex.join(['taskvec', 'push', output, repo, *more])}`")
        raise
