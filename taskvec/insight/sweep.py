"""`sweep`: the same edit with one α after another, each evaluated by what the user evaluates with, and the choice of one.

The rule is that of Ilharco et al. 2023 for forgetting by negation: the strongest α with which a control task keeps a given
share (95 %) of the base model's performance on it.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..delta.vector import TaskVector, finite
from ..errors import TaskvecError, UsageError, show
from ..run.edited import PathLike, edited_checkpoint
from .candidates import InMemory, OnDisk
from .evaluator import Command, check_pointer, emptied, newest_json, number_at, see
from .rule import Rule, Trial
from .sweep_folder import SweepFolder

if TYPE_CHECKING:
    import torch

_RANDOM = "random.safetensors"  # in a sweep's folder; it is gone when it was evaluated


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
            not run again for what is in it. Without it nothing is kept.
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
    with ExitStack() as stack:
        place = Path(os.path.expanduser(output)) if output is not None else None
        folder = place or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        candidates, subtracted = _candidates(model, vector, base, folder, options)
        key = None
        if command is not None:
            if place is None or not isinstance(candidates, OnDisk):
                raise UsageError("a command evaluates a checkpoint, and needs a folder for its results (output)")
            key = candidates.key(subtracted, [command.line, command.shell, metric, control])
        candidates.check(subtracted)
        measure = _measure(evaluate, metric, control) if command is None else Results(command, folder, metric, control)
        store = None if place is None else stack.enter_context(SweepFolder(place, key))
        run = _Run(candidates, subtracted, measure, store, seed, done)
        trials = [run.trial(alpha, number) for number, alpha in enumerate(wanted)]
        found = Sweep(tuple(sorted(trials, key=lambda t: t.alpha)), rule, candidates.formula(subtracted), metric, control)
        if random_control and found.chosen is not None:
            found = replace(found, random=run.random(found.chosen, len(wanted), folder))
        if store is not None:
            store.write("sweep.svg", found.svg())
        return found


Measure = Callable[[Any, Trial, int], "tuple[float, float | None]"]  # (model, the trial that is to be, its number)


@dataclass(frozen=True)
class _Run:
    candidates: OnDisk | InMemory
    vector: TaskVector
    measure: Measure
    store: SweepFolder | None
    seed: int
    done: Callable[[Trial], None]

    def trial(self, alpha: float, number: int) -> Trial:
        return self._known_or_made(Trial(alpha, math.nan, None, 0.0), number, lambda: self.vector)

    def random(self, alpha: float, number: int, folder: Path) -> Trial:
        wanted, path = Trial(alpha, math.nan, None, 0.0, random=True), folder / _RANDOM
        try:
            return self._known_or_made(wanted, number, lambda: self.candidates.random(path, self.vector, self.seed))
        finally:
            path.unlink(missing_ok=True)

    def _known_or_made(self, wanted: Trial, number: int, vector: Callable[[], TaskVector]) -> Trial:
        seed = self.seed if wanted.random else None
        known = self.store.known(wanted.alpha, seed) if self.store is not None else None
        trial = self._evaluated(wanted, number, vector()) if known is None else replace(wanted, **known)
        if self.store is not None and known is None:
            self.store.add(trial.alpha, seed, trial.target, trial.control, trial.seconds)
        self.done(trial)
        return trial

    def _evaluated(self, wanted: Trial, number: int, vector: TaskVector) -> Trial:
        started = time.perf_counter()
        with self.candidates.made(vector, wanted.alpha) as subject:
            target, control = self.measure(subject, wanted, number)
        return replace(wanted, target=target, control=control, seconds=round(time.perf_counter() - started, 3))


def _candidates(
    model: Any, vector: Any, base: Checkpoint | PathLike | None, folder: Path, options: dict[str, Any]
) -> tuple[OnDisk | InMemory, TaskVector]:
    if isinstance(model, (Checkpoint, str, os.PathLike)):
        edited = edited_checkpoint(model, vector, 1.0, base)
        return OnDisk(edited.base, folder, options), edited.vector
    if not isinstance(vector, TaskVector) or set(options) - {"jobs"}:
        raise UsageError("of a model in memory a TaskVector is subtracted, and jobs is the only option")
    opened = base if base is None or isinstance(base, Checkpoint) else Checkpoint.open(base)
    return InMemory(model, opened, options.get("jobs")), vector


def _alphas(alphas: Iterable[float]) -> list[float]:
    """The weakest first: 0, the base."""
    wanted = sorted({finite(alpha, "alpha") + 0.0 for alpha in alphas} | {0.0}, key=lambda alpha: (abs(alpha), alpha))
    if len(wanted) < 2:
        raise UsageError("no α but 0 to try", hint="Name some, as in 0:1.5:0.25")
    return wanted


def _measure(evaluate: Any, metric: str, control: str | None) -> Measure:
    def measure(subject: Any, trial: Trial, number: int) -> tuple[float, float | None]:
        content, where = evaluate(subject), f"what `evaluate` returned at α = {trial.alpha:.12g}"
        return number_at(content, metric, where), None if control is None else number_at(content, control, where)

    return measure


@dataclass(frozen=True)
class Results:
    """What a command measured: the newest JSON under a folder of its own for each trial."""

    command: Command
    folder: Path
    metric: str
    control: str | None

    def __call__(self, subject: Path, trial: Trial, number: int) -> tuple[float, float | None]:
        what = f"α = {trial.alpha:.12g}" + (" (random)" if trial.random else "")
        log, out = self.folder / "logs" / f"{trial.name}.log", self.folder / "results" / trial.name
        log.parent.mkdir(exist_ok=True)
        emptied(out)
        places = {"model": os.path.abspath(subject), "out": os.path.abspath(out)}
        self.command.run({**places, "alpha": f"{trial.alpha:.12g}", "i": str(number)}, log, what)
        path, content = newest_json(out, what, log)
        where = f"{show(path)}, at {what}"
        try:
            target = number_at(content, self.metric, where)
            return target, None if self.control is None else number_at(content, self.control, where)
        except TaskvecError as error:
            raise TaskvecError(error.message, hint=". ".join(filter(None, (error.hint, see(log))))) from error
