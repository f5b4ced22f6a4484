"""The picture: one SVG, written by hand so that nothing needs to be installed to draw it.

Left, what the arms learned and kept; right, what subtracting alone does to the old answers as λ grows. Lengths are in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

WIDTH, HEIGHT = 980, 400
TOP, BOTTOM = 84, 316  # of both plots: 100 % and 0 %
LEFT_PLOT, RIGHT_PLOT = (56, 540), (640, 950)
INK, FAINT = "#333333", "#dddddd"
BARS = {"reliability": ("new answer, as taught", "#1b6ca8"), "generality": ("new answer, other words", "#7fb6d9"),
        "locality": ("other answers kept", "#c9a227")}  # fmt: skip
SHOWN = {"direct full": "learn at once", "random>full": "after a random step", "full>full": "after forgetting, full",
         "lora>full": "after forgetting, LoRA"}  # fmt: skip
LINES = {"full": ("full", ""), "lora": ("LoRA", "6 4")}
READINGS = {
    "old_probability": ("P(old answer)", "#b03a2e", 100.0),
    "locality": ("other answers kept", "#c9a227", 1.0),
}


def draw(results: dict[str, Any]) -> str:
    """`results` as in results.json."""
    settings = results["settings"]
    count = len(results["seeds"])
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        f' font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT_PLOT[0], 26, f"Learn new facts, after forgetting the old ones at λ = {settings['scale']:g}", size=15),
        _text(RIGHT_PLOT[0], 26, "Only forget: θ − λ·Δ", size=15),
        *_bars(results["arms"]),
        *_lines(results["arms"]["original"], results["sweep"], settings["sweep"]),
        _text(LEFT_PLOT[0], HEIGHT - 10, f"Mean of {count} seed{'s' * (count > 1)}; per cent of the questions.", size=11),
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _bars(arms: dict[str, Any]) -> Iterator[str]:
    left, right = LEFT_PLOT
    yield from _grid(left, right)
    yield from _legend(left, [(label, colour, "") for label, colour in BARS.values()])
    shown = [name for name in SHOWN if name in arms]
    group = (right - left) / len(shown)
    bar = group / (len(BARS) + 1)
    for i, name in enumerate(shown):
        start = left + i * group + bar / 2
        for k, (column, (_, colour)) in enumerate(BARS.items()):
            value = arms[name][column]["mean"]
            x, y = start + k * bar, _height(value)
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 3:.1f}" height="{BOTTOM - y:.1f}" fill="{colour}"/>'
            yield _text(x + bar / 2 - 1.5, y - 4, f"{value:.0f}", "middle", 11)
        yield _text(start + 1.5 * bar, BOTTOM + 18, SHOWN[name], "middle", 11)


def _lines(original: dict[str, Any], sweep: dict[str, Any], scales: Sequence[float]) -> Iterator[str]:
    left, right = RIGHT_PLOT
    yield from _grid(left, right)
    legend = [(f"{label}, {kind}", colour, dash) for label, colour, _ in READINGS.values() for kind, dash in LINES.values()]
    yield from _legend(left, legend, across=2)
    per_scale = (right - left) / max(scales)
    for column, (_, colour, factor) in READINGS.items():
        for kind, (_, dash) in LINES.items():
            rows = [original, *(sweep[f"{kind} forget only, λ={scale:g}"] for scale in scales)]
            heights = [_height(factor * row[column]["mean"]) for row in rows]
            points = [f"{left + scale * per_scale:.1f},{y:.1f}" for scale, y in zip((0.0, *scales), heights, strict=True)]
            yield (
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"'
                f' stroke-dasharray="{dash or "none"}"/>'
            )
    for scale in (0.0, *scales):
        yield _text(left + scale * per_scale, BOTTOM + 18, f"{scale:g}", "middle", 10)
    yield _text((left + right) / 2, BOTTOM + 38, "λ", "middle")


def _grid(left: float, right: float) -> Iterator[str]:
    for value in (0, 25, 50, 75, 100):
        y = _height(value)
        yield f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{INK if value == 0 else FAINT}"/>'
        yield _text(left - 6, y + 4, str(value), "end", 11)


def _legend(left: float, entries: Sequence[tuple[str, str, str]], across: int = 3) -> Iterator[str]:
    """Short strokes with their words, `across` to a row."""
    step = 185 if across == 3 else 160
    for i, (label, colour, dash) in enumerate(entries):
        x, y = left + (i % across) * step, 44 + (i // across) * 16
        style = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash or "none"}"'
        yield f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" {style}/>'
        yield _text(x + 23, y + 4, label, size=11)


def _height(value: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / 100


def _text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escaped}</text>'
