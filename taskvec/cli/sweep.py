"""`taskvec sweep`."""

from __future__ import annotations

import shlex
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import click

from ..checkpoint.locate import on_hub
from ..errors import UsageError, show
from ..insight.evaluator import Command
from ..insight.rule import GOALS, Trial
from ..insight.sweep import Sweep
from ..insight.sweep import sweep as run_sweep
from .main import REVISION, TOKEN, print_json

_MOST = 1000  # α's of one range: more is a typing error


@click.command(
    epilog="Example: taskvec sweep base old --alpha 0:1.5:0.25 --eval 'python score.py {model} {out}/scores.json' "
    "--metric /old --control /rest -o sweep"
)
@click.argument("model")
@click.argument("old", metavar="OLD")
@click.option("-a", "--alpha", required=True, metavar="RANGE", help="FIRST:LAST:STEP, or numbers with commas between them.")
@click.option(
    "--eval", "line", required=True, metavar="CMD", help="What evaluates: {model} in, JSON under {out}; {alpha}, {i}."
)
@click.option("--metric", required=True, metavar="POINTER", help="JSON Pointer to the target, like '/results/x/acc,none'.")
@click.option("--control", metavar="POINTER", help="JSON Pointer to what should not get worse.")
@click.option("--control-floor", type=float, default=0.95, show_default=True, help="How much of the base's is to be kept.")
@click.option("--control-goal", type=click.Choice(GOALS), default="max", show_default=True, help="min for a perplexity.")
@click.option("--goal", type=click.Choice(GOALS), default="min", show_default=True, help="What the target should become.")
@click.option("-o", "--output", required=True, metavar="DIR", help="A folder; finished α's in it are not run again.")
@click.option("--base", metavar="ORIGIN", help="What OLD was trained from; MODEL if not given.")
@click.option("--random-control", is_flag=True, help="Then a random vector of the same norms, at the chosen α.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random vector.")
@click.option("--fresh", is_flag=True, help="Evaluate every α again, also what is in DIR.")
@click.option("--shell", is_flag=True, help="Run CMD by a shell.")
@click.option("--png", is_flag=True, help="Also sweep.png, if matplotlib is installed.")
@click.option("--include", multiple=True, metavar="GLOB", help="Edit only these tensors (repeatable).")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Copy these tensors unchanged (repeatable).")
@REVISION
@TOKEN
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N or auto: of the arithmetic, not of CMD.")
@click.option("-j", "--jobs", type=int, metavar="N", help="Threads; one per processor, at most 8.")
@click.option("--memory", metavar="SIZE", help="Cap on the run's buffers, like 64MB: fewer threads fit.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def sweep(
    model: str, old: str, revision: str | None, alpha: str, line: str, output: str, shell: bool, png: bool, as_json: bool,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Evaluate MODEL − α·(OLD − MODEL) for each α, and choose one.

    CMD is any command. For each α it is run with {model}, a folder to load, and {out}, a folder for its results, of which the
    newest JSON file is read. The strongest α is chosen whose --control keeps --control-floor of what α = 0 has; without
    --control, the α of the best --metric.
    """
    if png:
        from ..insight.curve import check_png

        check_png()

    def done(trial: Trial) -> None:
        if not (quiet or as_json):
            click.echo(f"{trial.name}: {_measured(trial)}, {trial.seconds:.1f} s", err=True)

    found = run_sweep(
        on_hub(model, revision, None), old, alphas(alpha), evaluate=Command(line, shell), output=output, done=done, **options
    )
    if png:
        from ..insight.curve import save_png

        save_png(found, Path(output).expanduser() / "sweep.png")
    if as_json:
        print_json({"ok": True, "output": output, **found.summary()})
    elif not quiet:
        _print(found, output, model, old, options)


def alphas(text: str) -> list[float]:
    """0:1.5:0.25 -> 0, 0.25, …, 1.5, as far as whole steps lead; or 0.1,0.3,1. Decimal, so that 0.3 is 0.3."""
    try:
        if ":" not in text:
            return [float(_decimal(part)) for part in text.split(",")]
        first, last, step = map(_decimal, text.split(":"))
        steps = (last - first) / step if step else Decimal(-1)
    except (ArithmeticError, ValueError) as error:
        raise UsageError(
            f"--alpha {show(text)!r}, expected FIRST:LAST:STEP or numbers, as in 0:1.5:0.25 or 0.1,0.3,1"
        ) from error
    if steps < 0:
        raise UsageError(f"--alpha {show(text)!r}: steps of {step} do not lead from {first} to {last}")
    if steps >= _MOST:
        raise UsageError(f"--alpha {show(text)!r}: more than {_MOST} steps")
    return [float(first + number * step) for number in range(int(steps) + 1)]


def _decimal(text: str) -> Decimal:
    number = Decimal(text.strip())
    if not number.is_finite():
        raise InvalidOperation
    return number


def _print(found: Sweep, output: str, model: str, old: str, options: dict[str, Any]) -> None:
    """A line for each α, the choice, and the command that makes it, on stdout."""
    click.echo(show(found.formula, 2000))
    rows = [("α", "target", "control", "of α = 0", "")]
    for trial in [*found.trials, *([found.random] if found.random is not None else [])]:
        chosen = "chosen" if trial.alpha == found.chosen and not trial.random else ""
        lost = "" if found.rule.kept(trial, found.base) else "control lost"
        rows.append((f"{trial.alpha:.6g}", f"{trial.target:.6g}", *_control(trial, found), _mark(trial, chosen or lost)))
    shown = [0, 1, 2, 3, 4] if found.control is not None else [0, 1, 4]
    widths = [max(len(row[column]) for row in rows) for column in shown]
    for row in rows:
        click.echo(("  " + "  ".join(f"{row[column]:>{width}}" for column, width in zip(shown[:-1], widths))
                    + f"  {row[-1]}").rstrip())  # fmt: skip
    best = found.best
    if best is None:
        click.echo(f"no α is chosen: {_why_none(found)}")
    else:
        click.echo(f"chosen: α = {best.alpha:.6g}, {_measured(best)}; at 0 {_measured(found.base)}")
        click.echo(f"make it: {_command(model, old, best, options)}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"picture: {show(Path(output) / 'sweep.svg')}")


def _why_none(found: Sweep) -> str:
    if not found.rule.measures(found.base):
        return "the control at 0 is no measure"
    if found.control is not None and any(found.rule.kept(trial, found.base) for trial in found.trials if trial.alpha):
        return "none but 0 keeps the control and has a target"
    return "none is better than 0" if found.control is None else "none but 0 keeps the control"


def _control(trial: Trial, found: Sweep) -> tuple[str, str]:
    if trial.control is None:
        return "", ""
    base = found.base.control
    return f"{trial.control:.6g}", f"{trial.control / base:.1%}" if base else ""


def _mark(trial: Trial, mark: str) -> str:
    return ", ".join(filter(None, ("random vector" if trial.random else "", mark)))


def _measured(trial: Trial) -> str:
    return f"target {trial.target:.6g}" + ("" if trial.control is None else f", control {trial.control:.6g}")


def _command(model: str, old: str, best: Trial, options: dict[str, Any]) -> str:
    words = ["taskvec", "subtract", model, old, "--alpha", f"{best.alpha:.12g}"]
    words += ["--base", options["base"]] if options["base"] is not None else []
    for name in ("include", "exclude"):
        words += [word for pattern in options[name] for word in (f"--{name}", pattern)]
    return show(f"{shlex.join(words)} -o OUT", 2000)
