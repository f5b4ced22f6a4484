"""What a run shows: a bar on a terminal, one line per file elsewhere, a table at the end. All but results on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..errors import show
from ..run.edited import Report
from ..run.plan import Plan, human_bytes

if TYPE_CHECKING:
    from ..run.stream import ShardResult


class Progress:
    """A context manager whose methods are the callbacks of `EditedCheckpoint.save`."""

    def __init__(self, *, quiet: bool, as_json: bool, verbose: bool) -> None:
        self._silent = quiet
        self._live = not quiet and not as_json and sys.stderr.isatty()
        self._plain = not quiet and not as_json and not self._live
        self._verbose = verbose
        self._bar: Any = None
        self._task: Any = None
        self._files = 0
        self._noted: set[str] = set()
        self._total = 0
        self._started = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, notes: Iterable[str]) -> None:
        """Print those that were not printed yet."""
        for note in notes if not self._silent else ():
            if note not in self._noted:
                self._noted.add(note)
                click.echo(f"note: {note}", err=True)

    def planned(self, plan: Plan) -> None:
        """Print the notes, then start the bar."""
        self.note(plan.notes)
        self._total = len(plan.shards)
        if not self._live:
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("writing", total=sum(shard.size for shard in plan.shards))
        self._bar.start()

    def advance(self, written: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=written)

    def shard_done(self, shard: ShardResult) -> None:
        self._files += 1
        if self._plain:
            elapsed = time.perf_counter() - self._started
            line = f"{shard.name}: {human_bytes(shard.nbytes)}, file {self._files} of {self._total}, {elapsed:.1f} s"
            click.echo(line, err=True)


def print_report(report: Report, *, verbose: bool) -> None:
    """The short table at the end, on stdout; a warning on stderr for what a person must know."""
    did = report.changes
    share = did["elements_changed"] / max(1, did["elements_edited"])
    moved = report.bytes_read + report.bytes_written
    rows = [
        ("tensors", f"{did['tensors_edited']:,} edited, {did['tensors_copied']:,} copied"),
        ("elements changed", f"{did['elements_changed']:,} of {did['elements_edited']:,} edited ({share:.1%})"),
        ("lost to rounding", f"{did['elements_lost_to_rounding']:,}"),
        ("overflow to inf", f"{did['elements_overflowed']:,}"),
        *([("inf or NaN", f"{did['elements_not_finite']:,}")] if did["elements_not_finite"] else []),
        ("bytes", f"{human_bytes(report.bytes_read)} read, {human_bytes(report.bytes_written)} written"),
        (
            "time",
            f"{report.seconds:.2f} s on {report.device}, {moved / report.seconds / 1e9:.2f} GB/s read and written",
        ),
    ]
    click.echo(show(report.plan.formula, 2000))
    for name, value in rows:
        click.echo(f"  {name:<17} {value}")
    click.echo(f"  {'output':<17} {show(report.output_name)}")
    if str(report.plan.code):
        click.echo(f"  {'code':<17} {report.plan.code}")
    if verbose:
        for job in report.plan.jobs:
            counts = report.tensors.get(job.name)
            if counts:
                click.echo(f"    {show(job.name)}: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
        _print_losses(report)
    for note in report.notes:
        click.echo(f"note: {note}", err=True)
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


def _print_losses(report: Report) -> None:
    """Where the change went: by layer and kind of module, the share of it that rounding lost."""
    from ..insight.diff import Place
    from .by_layer import print_by_layer

    meant: dict[Place, list[int]] = {}
    for job in report.plan.edited:
        did = report.tensors.get(job.name, {})
        lost, changed = meant.setdefault(Place.of(job.name), [0, 0])
        meant[Place.of(job.name)] = [lost + did.get("lost", 0), changed + did.get("changed", 0)]
    shares = {place: lost / (lost + changed) for place, (lost, changed) in meant.items() if lost + changed}
    if any(shares.values()):
        click.echo("\n  share of the intended change that rounding lost")
        print_by_layer(shares, "lost")
