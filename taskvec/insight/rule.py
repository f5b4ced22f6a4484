"""The trials of a sweep, and the rule that chooses one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UsageError, show

GOALS = ("min", "max")


@dataclass(frozen=True)
class Trial:
    """One evaluated model, base − α·Δ. Metrics may be nan or inf; `control` is None when none is measured. `random`: Δ was
    the random vector in place of the true one. `seconds` include making the model."""

    alpha: float
    target: float
    control: float | None
    seconds: float
    random: bool = False

    @property
    def name(self) -> str:
        return f"alpha-{self.alpha:.12g}" + ("-random" if self.random else "")

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready; metrics that are no finite number are null."""
        control = None if self.control is None else _plain(self.control)
        return {**asdict(self), "target": _plain(self.target), "control": control}


@dataclass(frozen=True)
class Rule:
    """How one of the trials is chosen.

    Attributes:
        goal: whether the target is wanted small ("min", what is to be forgotten) or large ("max").
        control: whether there is a control metric, which limits the choice.
        control_floor: the share of the base's control metric that has to be kept.
        control_goal: "max", or "min" for a metric that is better when it is smaller (perplexity): then it may grow to
            (2 − floor) times the base's.
    """

    goal: str = "min"
    control: bool = False
    control_floor: float = 0.95
    control_goal: str = "max"

    def __post_init__(self) -> None:
        for name in ("goal", "control_goal"):
            if getattr(self, name) not in GOALS:
                raise UsageError(f"{name} {show(getattr(self, name))}, expected min or max")
        if not 0 <= self.control_floor <= 1:
            raise UsageError(f"control_floor {self.control_floor}, expected a share between 0 and 1")

    def measures(self, base: Trial) -> bool:
        """Whether a share of the base's control can be kept: of 0, inf or nan there is none."""
        return not self.control or (base.control is not None and math.isfinite(base.control) and base.control != 0)

    def limit(self, base: Trial) -> float:
        """The worst control metric that is still kept; nan, which none keeps, where the base's is no measure."""
        value = base.control if base.control is not None and self.measures(base) else math.nan
        keeps = (self.control_goal == "max") == (value >= 0)  # a negative metric (a log-likelihood) gets worse outwards
        return value * (self.control_floor if keeps else 2 - self.control_floor)

    def kept(self, trial: Trial, base: Trial) -> bool:
        """Whether the control metric of a trial is good enough; a nan never is."""
        if not self.control or trial.control is None:
            return True
        limit = self.limit(base)
        return trial.control >= limit if self.control_goal == "max" else trial.control <= limit

    def better(self, trial: Trial, other: Trial) -> bool:
        """Whether its target is nearer to the goal."""
        return trial.target < other.target if self.goal == "min" else trial.target > other.target

    def choose(self, trials: Iterable[Trial], base: Trial) -> Trial | None:
        """With a control the strongest α that keeps it; without, the α of the best target, of equals the weakest; never one
        whose target is nan. None when it is no α but 0."""
        allowed = (t for t in trials if t.alpha != 0 and self.kept(t, base) and not math.isnan(t.target))
        tried = sorted(allowed, key=lambda t: abs(t.alpha))
        if self.control:
            return tried[-1] if tried else None
        best = base
        for trial in tried:
            if self.better(trial, best) or math.isnan(best.target):
                best = trial
        return None if best is base else best


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
