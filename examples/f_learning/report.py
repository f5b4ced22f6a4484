"""What is shown: the tables on the terminal. Figures come from figures.py, the picture from picture.py."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

HEADS = {
    "reliability": "reliability", "generality": "generality", "neighbours": "kept: neighbours", "bystanders": "kept: {}",
    "old_accuracy": "old right", "old_probability": "P(old)", "perplexity": "perplexity",
}  # fmt: skip

POINTS = {
    "a": "(a) forgetting first learns more, keeps as much", "b": "(b) forgetting by LoRA does as well",
    "c": "(c) random, other facts, adding: no gain", "d": "(d) P(old) falls as λ grows", "e": "(e) files equal torch, PEFT",
}  # fmt: skip


def in_words(results: dict[str, Any]) -> str:
    """The result in three sentences, for who sees the tables for the first time."""
    scale = f"{results['settings']['scale']:g}"
    lead = {
        "direct full": "Taught the new facts as it is",
        "full>full": f"After {scale} × (what the old facts had taught) was subtracted",
        "random>full": "After as long a step in a random direction",
    }
    return "\n".join(f"{words}, the model {_achieved(results['arms'][name])}." for name, words in lead.items())


def _achieved(row: dict[str, Any]) -> str:
    learned, other, kept = (f"{row[column]['mean']:.0f} %" for column in ("reliability", "generality", "locality"))
    return f"gives {learned} of the new answers, {other} when asked in other words, and keeps {kept} of its other answers"


def arms_table(rows: dict[str, dict[str, Any]], bystanders: str, title: str) -> Table:
    """One line per arm."""
    table = _table(title, "arm", [head.format(bystanders) for head in HEADS.values()])
    for name, row in rows.items():
        table.add_row(
            name, *(_cell(row[column], 2 if column in ("old_probability", "perplexity") else 1) for column in HEADS)
        )
    return table


def paired_table(pairs: dict[str, dict[str, Any]], bystanders: str) -> Table:
    """The gain over the arm that does not forget, and in how many seeds there is one."""
    columns = ("reliability", "generality", "locality", "neighbours", "bystanders")
    table = _table(
        "Gain by forgetting first, paired by seed", "arm", ["Δ " + c.replace("bystanders", bystanders) for c in columns]
    )
    for name, row in pairs.items():
        cells = [f"{_cell(row[c], 1, '+')} ({row[c]['above']}/{len(row[c]['each'])})" for c in columns]
        table.add_row(f"{name} − {row['against']}", *cells)
    return table


def equal_table(equal: dict[str, dict[str, Any]]) -> Table:
    table = _table("At equal reliability", "arm", ["reliability", "epochs", "generality", "locality"])
    for level in sorted({level for levels in equal.values() for level in levels}, key=int):
        for name, levels in equal.items():
            if level in levels:
                cells = [_cell(levels[level][column], 1) for column in ("epochs", "generality", "locality")]
                table.add_row(name, level, *cells)
    return table


def acceptance_table(points: dict[str, dict[str, Any]], title: str) -> Table:
    table = _table(title, "point", ["met", "by"])
    for point, found in points.items():
        table.add_row(
            POINTS[point], "yes" if found["passed"] else "NO", _words({k: v for k, v in found.items() if k != "passed"})
        )
    return table


def _table(title: str, first: str, heads: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="left" if head == "by" else "right")
    return table


def _cell(value: dict[str, Any], digits: int, sign: str = "") -> str:
    mean = format(value["mean"], f"{sign}.{digits}f")
    return mean if value["sd"] is None else f"{mean}±{value['sd']:.{digits}f}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
