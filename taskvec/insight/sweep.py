"""`sweep`: the same edit with one α after another, each evaluated by what the user evaluates with, and the choice of one.

The rule is that of Ilharco et al. 2023 for forgetting by negation: the strongest α with which a control task keeps a given
share (95 %) of the base model's performance on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..delta.vector import TaskVector, finite
from ..errors import TaskvecError, UsageError, listing, show
from ..run.edited import PathLike, edited_checkpoint
from ..run.extract import base_of
from ..run.output import Target
from ..run.plan import Plan
from .candidates import InMemory, OnDisk
from .evaluator import Command, check_pointer, json_of, newest_json, number_at, see
from .rule import Rule, Trial
from .sweep_folder import SweepFolder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sweep:
    """The trials in the order of α, 0 (the base) among them; the rule that chooses one; and what a random vector does."""

    trials: tuple[Trial, ...]
    rule: Rule
    formula: str
    metric: str = ""
    control: str | None = None
    random: Trial | None = None

    @property
    def base(self) -> Trial:
        return next(trial for trial in self.trials if trial.alpha == 0)

    @property
    def best(self) -> Trial | None:
        return self.rule.choose(self.trials, self.base)

    @property
    def chosen(self) -> float | None:
        """The chosen α; None when none but 0 fits the rule."""
        return None if self.best is None else self.best.alpha

    @property
    def warnings(self) -> list[str]:
        """What a person must know of the choice."""
        found, best = [], self.best
        if not self.rule.measures(self.base):
            found.append(
                f"the control {show(self.control)} is {self.base.control} at α = 0, of which no share can be kept: no α is "
                "chosen. Look at what the evaluator wrote, or name another control"
            )
        if lost := [f"{trial.alpha:.6g}" for trial in self.trials if math.isnan(trial.target)]:
            found.append(f"the target is NaN at α = {listing(lost)}: such an α is never chosen")
        if best is not None and not (self.rule.better(best, self.base) or math.isnan(self.base.target)):
            found.append(f"the target is no better at α = {best.alpha:.6g} than at α = 0")
        return found

    def summary(self) -> dict[str, Any]:
        """Everything as plain data, JSON-ready."""
        return {
            "formula": self.formula,
            "chosen": self.chosen,
            "metric": self.metric,
            "control": self.control,
            **{key: value for key, value in asdict(self.rule).items() if key != "control"},
            "trials": [{**trial.summary(), "kept": self.rule.kept(trial, self.base)} for trial in self.trials],
            "random": None if self.random is None else self.random.summary(),
            "warnings": self.warnings,
        }

    def svg(self) -> str:
        """Target and control against α as a picture, the choice marked: one SVG element, readable in light and dark."""
        from .curve import draw

        return draw(self)

    def _repr_html_(self) -> str:
        return self.svg()


def sweep(
    model: torch.nn.Module | Mapping[str, torch.Tensor] | Checkpoint | PathLike,
    vector: TaskVector | Checkpoint | PathLike,
    alphas: Iterable[float],
    *,
    evaluate: Callable[[Any], Any] | Command | str,
    metric: str = "",
    control: str | None = None,
    control_floor: float = 0.95,
    control_goal: str = "max",
    goal: str = "min",
    random_control: bool = False,
    seed: int = 0,
    base: Checkpoint | PathLike | None = None,
    output: PathLike | None = None,
    fresh: bool = False,
    done: Callable[[Trial], None] = lambda trial: None,
    **options: Any,
) -> Sweep:
    """Evaluate model − α·vector for each α, and for α = 0, and choose one.

    Args:
        model: a module or a state dict, edited in memory and restored each time, or a checkpoint, of which a candidate folder
            is made for each α.
        vector: what is subtracted; of a checkpoint also a tuned model or an adapter, as in `subtract`.
        evaluate: is given the edited module (or the path of the candidate) and returns a number, or a mapping. Or a command
            line with {model} and {out} in it, run without a shell, whose newest JSON file under {out} is read.
        metric, control: JSON Pointers to the numbers in that mapping; metric is "" where a number is returned.
        goal, control_floor, control_goal: how one α is chosen, see `Rule`. Without a control the best target is chosen.
        random_control: evaluate a random vector too, at the chosen α, each of its tensors as long as the vector's, drawn
            with `seed`.
        base: what the vector is the difference from, where it does not say so itself.
        output: a folder for `sweep.jsonl` and `sweep.svg`, and logs and results of a command; it is kept, and a command is
            not run again for what is in it, unless `fresh`: metrics are read from the JSON it wrote then. Without it nothing
            is kept.
        done: called with each trial.
        options: of `EditedCheckpoint.save`: device, jobs, memory, include, exclude, out_dtype.

    Raises UsageError, MismatchError and so on before the first evaluation, what `evaluate` raises, and TaskvecError with the
    path of the log when a command fails.
    """
    check_pointer("metric", metric)
    check_pointer("control", control or "")
    rule = Rule(goal, control is not None, control_floor, control_goal)
    wanted = _alphas(alphas)
    command = Command(evaluate) if isinstance(evaluate, str) else evaluate if isinstance(evaluate, Command) else None
    candidates, subtracted = _candidates(model, vector, base, random_control, options)
    if command is not None and (output is None or not isinstance(candidates, OnDisk)):
        raise UsageError("a command evaluates a checkpoint, and needs a folder for its results (output)")
    if output is not None:
        Target.of(output)  # is it a name at all
    plan, title = candidates.plan(subtracted), candidates.formula(subtracted)
    with ExitStack() as stack:
        store = None
        if output is not None:
            key = None if command is None or plan is None else _key(plan, command)
            about = {"formula": title, "eval": None if command is None else command.line}
            kept = SweepFolder(Path(os.path.expanduser(output)), key, about, candidates.inputs(subtracted))
            store = stack.enter_context(kept)
        scratch = store.scratch if store is not None else _temporary(stack)
        evaluator: ByFunction | ByCommand = ByFunction(evaluate)
        if command is not None and store is not None:
            evaluator = ByCommand(command, store, fresh)
        run = _Run(candidates, subtracted, evaluator, store, scratch, metric, control, seed, done)
        trials = [run.trial(alpha, number) for number, alpha in enumerate(wanted)]
        found = Sweep(tuple(sorted(trials, key=lambda t: t.alpha)), rule, title, metric, control)
        if random_control and found.chosen is not None:
            found = replace(found, random=run.random(found.chosen, len(wanted)))
        if store is not None:
            store.write("sweep.svg", found.svg())
        return found


@dataclass(frozen=True)
class _Run:
    candidates: OnDisk | InMemory
    vector: TaskVector
    evaluator: ByFunction | ByCommand
    store: SweepFolder | None
    scratch: Callable[[], Path]
    metric: str
    control: str | None
    seed: int
    done: Callable[[Trial], None]

    def trial(self, alpha: float, number: int) -> Trial:
        return self._tried(Trial(alpha, math.nan, None, 0.0), None, number, lambda: self.vector)

    def random(self, alpha: float, number: int) -> Trial:
        def drawn() -> TaskVector:
            return self.candidates.random(self.scratch() / "random.safetensors", self.vector, self.seed)

        return self._tried(Trial(alpha, math.nan, None, 0.0, random=True), self.seed, number, drawn)

    def _tried(self, wanted: Trial, seed: int | None, number: int, vector: Callable[[], TaskVector]) -> Trial:
        found = self.evaluator.known(wanted, seed)
        if found is None:
            found = self._evaluated(wanted, number, vector())
            if self.store is not None:  # before a pointer is found to lead nowhere: the evaluation was done
                metrics = found.numbers(pointer for pointer in (self.metric, self.control) if pointer is not None)
                self.store.add(wanted.alpha, seed, found.seconds, metrics, found.result)
        control = None if self.control is None else found.number(self.control)
        trial = replace(wanted, target=found.number(self.metric), control=control, seconds=found.seconds)
        self.done(trial)
        return trial

    def _evaluated(self, wanted: Trial, number: int, vector: TaskVector) -> Found:
        started = time.perf_counter()
        with self.candidates.made(vector, wanted.alpha, lambda: self.scratch() / str(number)) as subject:
            found = self.evaluator.run(subject, wanted, number)
        return found._replace(seconds=round(time.perf_counter() - started, 3))


def _key(plan: Plan, command: Command) -> str:
    """What pins everything that is evaluated: results of other inputs, or of another evaluator, are not results of these."""
    from . import pins

    text = json.dumps([pins.of_plan(plan), command.line, command.shell, pins.of_words(command.line)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _temporary(stack: ExitStack) -> Callable[[], Path]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return lambda: folder


def _candidates(
    model: Any, vector: Any, base: Checkpoint | PathLike | None, random_control: bool, options: dict[str, Any]
) -> tuple[OnDisk | InMemory, TaskVector]:
    if isinstance(model, (Checkpoint, str, os.PathLike)):
        edited = edited_checkpoint(model, vector, 1.0, base)
        return OnDisk(edited.base, options), edited.vector
    if not isinstance(vector, TaskVector) or set(options) - {"jobs"}:
        raise UsageError("of a model in memory a TaskVector is subtracted, and jobs is the only option")
    opened = base if base is None or isinstance(base, Checkpoint) else Checkpoint.open(base)
    if opened is None and random_control:  # whose base is not known is refused here, not after the last α
        opened = base_of(vector)
    return InMemory(model, opened, options.get("jobs")), vector


def _alphas(alphas: Iterable[float]) -> list[float]:
    """The weakest first: 0, the base."""
    wanted = sorted({finite(alpha, "alpha") + 0.0 for alpha in alphas} | {0.0}, key=lambda alpha: (abs(alpha), alpha))
    if len(wanted) < 2:
        raise UsageError("no α but 0 to try", hint="Name some, as in 0:1.5:0.25")
    return wanted


class Found(NamedTuple):
    """What one evaluation gave: the content that numbers are taken from, how messages call it, where more is to be seen; the
    file it is from, if it is, and the seconds it took."""

    content: Any
    where: str
    hint: str | None = None
    result: Path | None = None
    seconds: float = 0.0

    def number(self, pointer: str) -> float:
        try:
            return number_at(self.content, pointer, self.where)
        except TaskvecError as error:
            raise TaskvecError(error.message, hint=". ".join(filter(None, (error.hint, self.hint)))) from error

    def numbers(self, pointers: Iterable[str]) -> dict[str, float]:
        """Of those pointers that lead to one."""
        held = {}
        for pointer in pointers:
            with suppress(TaskvecError):
                held[pointer] = self.number(pointer)
        return held


@dataclass(frozen=True)
class ByFunction:
    """Nothing that was measured by a function is known: it may be another one by now."""

    function: Any

    def known(self, wanted: Trial, seed: int | None) -> Found | None:
        return None

    def run(self, subject: Any, wanted: Trial, number: int) -> Found:
        return Found(self.function(subject), f"what `evaluate` returned at α = {wanted.alpha:.12g}")


@dataclass(frozen=True)
class ByCommand:
    """What a command measured: the newest JSON in a folder of its own for every run."""

    command: Command
    store: SweepFolder
    fresh: bool

    def known(self, wanted: Trial, seed: int | None) -> Found | None:
        kept = None if self.fresh else self.store.known(wanted.alpha, seed)
        if kept is None:
            return None
        try:
            content = json_of(kept.result)
        except (ValueError, RecursionError, OSError):  # no longer there: it is evaluated anew
            return None
        return Found(content, f"{show(kept.result)}, at {_at(wanted)}", None, kept.result, kept.seconds)

    def run(self, subject: Path, wanted: Trial, number: int) -> Found:
        what = _at(wanted)
        out, log = self.store.places(wanted.name)
        places = {"model": os.path.abspath(subject), "out": os.path.abspath(out)}
        self.command.run({**places, "alpha": f"{wanted.alpha:.12g}", "i": str(number)}, log, what, (self.store.fd,))
        path, content = newest_json(out, what, log)
        return Found(content, f"{show(path)}, at {what}", see(log), path)


def _at(trial: Trial) -> str:
    return f"α = {trial.alpha:.12g}" + (" (random)" if trial.random else "")
