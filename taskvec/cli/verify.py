"""`taskvec verify`."""

from __future__ import annotations

import click

from ..errors import EXIT_MISMATCH, EXIT_OK, show
from ..run.verify import verify as verify_output
from .main import TOKEN, print_json


@click.command()
@click.argument("output")
@click.option("--against", multiple=True, metavar="PATH", help="Where an input lies now, here or on the Hub (repeatable).")
@TOKEN
@click.option("--sample", type=click.IntRange(min=0), metavar="N", help="Edited tensors to compute again; 3 if not given.")
@click.option("--full", is_flag=True, help="Compute all of them again, and compare all copied ones with the base.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def verify(output: str, against: tuple[str, ...], sample: int | None, full: bool, as_json: bool) -> int:
    """Check OUTPUT, made by taskvec: structure, checksums, values, side files, and tensors computed again from the inputs.

    Exit code 3 when something differs.
    """
    found = verify_output(output, against=against, sample=sample, full=full)
    if as_json:
        print_json({"ok": found.ok, "checks": found.checks, "problems": found.problems, "skipped": found.skipped})
    else:
        for line in [*(f"ok      {c}" for c in found.checks), *(f"skipped {s}" for s in found.skipped)]:
            click.echo(line)
        for problem in found.problems:
            click.echo(f"taskvec: {show(found.output)}: {problem}", err=True)
    return EXIT_OK if found.ok else EXIT_MISMATCH
