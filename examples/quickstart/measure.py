"""What a model knows: for every group of questions, how near the right answer is and how often it is the nearest."""

from __future__ import annotations

from typing import NamedTuple

import facts
import torch
from encoder import Encoder
from rich import box
from rich.table import Table


class Score(NamedTuple):
    """Mean cosine of question and right answer, and the share of questions whose nearest answer is the right one."""

    similarity: float
    found: float


class Knowledge(NamedTuple):
    """One model's score on every group of questions."""

    taught: Score
    rephrased: Score
    country: Score
    capital: Score
    ordinary: Score


def knowledge(encoder: Encoder) -> Knowledge:
    encoder.model.eval()
    groups = (facts.TAUGHT, facts.REPHRASED, facts.COUNTRY, facts.CAPITAL, facts.ORDINARY)
    return Knowledge(*(_score(encoder, group) for group in groups))


@torch.no_grad()
def _score(encoder: Encoder, quiz: facts.Quiz) -> Score:
    cosines = encoder.similarity(quiz.questions, quiz.answers)  # [questions, answers]
    right = torch.tensor(quiz.right)
    nearest = cosines.argmax(dim=1) == right
    return Score(cosines[torch.arange(len(right)), right].mean().item(), nearest.float().mean().item())


def table(rows: dict[str, Knowledge]) -> Table:
    """One line per model; similarity and the share found for the old names, then the three control groups."""
    result = Table(title="What each model knows", title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    result.caption = (
        "cosine of question and right answer, and how often that answer is the nearest;\n"
        "the last three columns are controls: they should stay as they are in base"
    )
    result.add_column("model", no_wrap=True)
    for heading in (
        "old names\nas taught",
        "old names\nrephrased",
        "same cities\ncountry",
        "\ncapitals",
        "sentence\npairs",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for label, known in rows.items():
        answered = (f"{score.similarity:.2f} {score.found:4.0%}" for score in known[:4])
        result.add_row(label, *answered, f"{known.ordinary.similarity:.2f}")
    return result
