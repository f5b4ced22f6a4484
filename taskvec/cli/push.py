"""`taskvec push`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import counted, show
from ..hub.push import Pushed
from ..hub.push import push as push_output
from ..run.plan import human_bytes
from .main import TOKEN, print_json


@click.command(epilog="Example: taskvec push edited me/llama-2-forgot --private")
@click.argument("output")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private; one that exists stays as it is.")
@click.option("--create-pr", is_flag=True, help="Propose it as a pull request.")
@click.option("--revision", metavar="BRANCH", help="A branch, made if it is missing.")
@click.option("--commit-message", metavar="TEXT", help="The formula, if not given.")
@click.option("--card", type=click.Path(exists=True, dir_okay=False), help="Markdown in place of the card's body.")
@click.option("--verify", "verify_checksums", is_flag=True, help="Compare what the Hub holds afterwards, file by file.")
@TOKEN
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, also on failure.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def push(output: str, repo: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Push OUTPUT, a folder that taskvec made, to REPO (org/name) on the Hub, in one commit.

    Only what its record lists goes up. Interrupted, and run again, it sends only what is missing.
    """

    def uploading(name: str, nbytes: int) -> None:
        if not (quiet or as_json):
            click.echo(f"{show(name)}: {human_bytes(nbytes)}", err=True)

    pushed = push_output(output, repo, uploading=uploading, **options)
    if as_json:
        print_json(pushed.summary())
    elif not quiet:
        print_pushed(pushed)


def print_pushed(pushed: Pushed) -> None:
    """Where it is now, on stdout; warnings on stderr."""
    place = pushed.pull_request or f"{pushed.url}/tree/{pushed.commit}"
    click.echo(f"pushed {counted(pushed.files, 'file')}, {human_bytes(pushed.nbytes)}, to {show(place)}")
    for warning in pushed.warnings:
        click.echo(f"warning: {warning}", err=True)
