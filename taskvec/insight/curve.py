"""A sweep as a picture: target and control against α, one above the other, the chosen α marked. SVG by hand, without a
dependency, which carries its own colours for light and dark; and the same through matplotlib for a paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.files import os_failure
from ..errors import OutputError, UsageError, show

if TYPE_CHECKING:
    from .rule import Trial
    from .sweep import Sweep

_WIDTH, _PANEL = 640, 180  # pixels: the picture, and one panel of it
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 52, 40
_GAP = 44
_STYLE = """
.back{fill:#ffffff} text{fill:#24292f;font:13px system-ui,sans-serif} .small{font-size:11px;fill:#57606a}
.axis{stroke:#afb8c1;fill:none} .target{stroke:#b3450b;fill:#b3450b} .control{stroke:#1f62b0;fill:#1f62b0}
.line{fill:none;stroke-width:2} .lost{fill:none;stroke-width:1.5} .chosen{stroke:#1a7f37;stroke-dasharray:5 4}
.limit{stroke:#57606a;stroke-dasharray:2 4} .random{fill:none;stroke-width:2} text.mark{fill:#1a7f37}
@media (prefers-color-scheme: dark){.back{fill:#0d1117} text{fill:#e6edf3} .small{fill:#9aa4af} .axis{stroke:#57606a}
.target{stroke:#ff9d5c;fill:#ff9d5c} .control{stroke:#79b8ff;fill:#79b8ff} .line,.lost,.random{fill:none}
.chosen{stroke:#56d364} text.mark{fill:#56d364} .limit{stroke:#9aa4af}}
"""


class _Series(NamedTuple):
    title: str
    css: str
    of: Callable[[Trial], float | None]
    limit: float | None


def draw(sweep: Sweep) -> str:
    """One SVG element: text, lines and points, and nothing from outside."""
    series = _series(sweep)
    height = _TOP + len(series) * (_PANEL + _GAP) - _GAP + _BOTTOM
    across = _axis([trial.alpha for trial in sweep.trials], _LEFT, _WIDTH - _RIGHT)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{_text(sweep.formula)}</title><desc id="desc">{_text(_told(sweep))}</desc>',
        f'<style>{_STYLE}</style><rect class="back" width="{_WIDTH}" height="{height}"/>',
        f'<text x="{_LEFT}" y="18">{_text(sweep.formula)}</text>',
    ]
    for place, one in enumerate(series):
        parts += _panel(sweep, one, across, _TOP + place * (_PANEL + _GAP))
    bottom = height - _BOTTOM
    parts += [
        f'<text class="small" x="{across(t.alpha):.1f}" y="{bottom + 18}" text-anchor="middle">{t.alpha:.6g}</text>'
        for t in _spaced(sweep.trials, across)
    ]
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{bottom + 34}" text-anchor="middle">α</text></svg>')
    return "\n".join(parts)


def save_png(sweep: Sweep, path: Path) -> None:
    """The same picture through matplotlib. Raises UsageError when that is not installed, OutputError when `path` cannot be
    written."""
    check_png()
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    series = _series(sweep)
    figure = Figure(figsize=(6.4, 1 + 2.2 * len(series)), layout="constrained")
    for axes, one in zip(figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0], series):
        points = [(t.alpha, one.of(t)) for t in sweep.trials]
        axes.plot(*zip(*points), marker="o", color="#b3450b" if one.css == "target" else "#1f62b0")
        if one.limit is not None:
            axes.axhline(one.limit, color="#57606a", linestyle=":")
        if sweep.chosen is not None:
            axes.axvline(sweep.chosen, color="#1a7f37", linestyle="--")
        if sweep.random is not None:
            axes.plot([sweep.random.alpha], [one.of(sweep.random)], marker="s", fillstyle="none", color="#57606a")
        axes.set_title(show(one.title), loc="left", fontsize="small", parse_math=False)
    axes.set_xlabel("α")
    try:
        figure.savefig(path, dpi=200)
    except OSError as error:
        raise os_failure(error, path, "cannot write", OutputError) from error


def check_png() -> None:
    """Raises UsageError when matplotlib is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError(
            "a PNG needs matplotlib, which is not installed", hint="pip install 'taskvec[plot]'; sweep.svg needs nothing"
        )


def _series(sweep: Sweep) -> list[_Series]:
    rule = sweep.rule
    wanted = "lower is better" if rule.goal == "min" else "higher is better"
    found = [_Series(f"target {sweep.metric} ({wanted})", "target", lambda trial: trial.target, None)]
    if sweep.control is not None:
        limit = rule.limit(sweep.base)
        share = (
            f"{rule.control_floor:.0%} of α = 0 kept above the line" if rule.control_goal == "max" else "kept below the line"
        )
        found.append(_Series(f"control {sweep.control} ({share})", "control", lambda trial: trial.control, limit))
    return found


def _told(sweep: Sweep) -> str:
    """The picture in words."""
    values = [f"α {t.alpha:.6g}: target {t.target:.6g}" + _and_control(t) for t in sweep.trials]
    chosen = "no α is chosen" if sweep.chosen is None else f"α {sweep.chosen:.6g} is chosen"
    return "; ".join([*values, chosen])


def _and_control(trial: Trial) -> str:
    return "" if trial.control is None else f", control {trial.control:.6g}"


def _panel(sweep: Sweep, one: _Series, across: Callable[[float], float], top: float) -> Iterator[str]:
    trials = [*sweep.trials, *([sweep.random] if sweep.random is not None else [])]
    values = [value for value in map(one.of, trials) if value is not None and math.isfinite(value)]
    up = _axis(
        [*values, *([one.limit] if one.limit is not None and math.isfinite(one.limit) else [])], top + _PANEL, top + 18
    )
    yield f'<text class="small" x="{_LEFT}" y="{top - 10}">{_text(one.title)}</text>'
    yield f'<path class="axis" d="M{_LEFT} {top + 10}V{top + _PANEL}H{_WIDTH - _RIGHT}"/>'
    for value in dict.fromkeys((min(values, default=0.0), max(values, default=0.0))):
        yield f'<text class="small" x="{_LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    if one.limit is not None and math.isfinite(one.limit):
        yield f'<path class="limit" d="M{_LEFT} {up(one.limit):.1f}H{_WIDTH - _RIGHT}"/>'
    if sweep.chosen is not None:
        x = across(sweep.chosen)
        yield f'<path class="chosen" d="M{x:.1f} {top + 10}V{top + _PANEL}"/>'
        yield f'<text class="mark small" x="{x:.1f}" y="{top + 7}" text-anchor="middle">{sweep.chosen:.6g} chosen</text>'
    yield from _curve(sweep, one, across, up)


def _curve(sweep: Sweep, one: _Series, across: Callable[[float], float], up: Callable[[float], float]) -> Iterator[str]:
    known = [(t, value) for t in sweep.trials if (value := one.of(t)) is not None and math.isfinite(value)]
    if known:
        points = " ".join(f"{across(t.alpha):.1f},{up(value):.1f}" for t, value in known)
        yield f'<polyline class="{one.css} line" points="{points}"/>'
    for trial, value in known:
        kept = "" if sweep.rule.kept(trial, sweep.base) else " lost"
        about = f"α = {trial.alpha:.6g}: {value:.6g}" + (", the control is lost" if kept else "")
        at = f'cx="{across(trial.alpha):.1f}" cy="{up(value):.1f}" r="4"'
        yield f'<circle class="{one.css}{kept}" {at}><title>{_text(about)}</title></circle>'
    value = None if sweep.random is None else one.of(sweep.random)
    if sweep.random is not None and value is not None and math.isfinite(value):
        at = f'x="{across(sweep.random.alpha) - 5:.1f}" y="{up(value) - 5:.1f}" width="10" height="10"'
        yield f'<rect class="{one.css} random" {at}><title>random vector: {value:.6g}</title></rect>'


def _axis(values: list[float], first: float, last: float) -> Callable[[float], float]:
    """From the smallest value at `first` to the largest at `last`, in pixels."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        return lambda value: (first + last) / 2
    return lambda value: first + (value / 2 - low / 2) / (high / 2 - low / 2) * (last - first)


def _spaced(trials: tuple[Trial, ...], across: Callable[[float], float]) -> Iterator[Trial]:
    """Those whose numbers find room under the axis."""
    free = -math.inf
    for trial in trials:
        if across(trial.alpha) >= free:
            yield trial
            free = across(trial.alpha) + 44


def _text(text: Any) -> str:
    return escape(show(text, 300))
