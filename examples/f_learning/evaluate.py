"""The examination: what a model answers, teacher-forced, and how often that is right, or what θ answered.

Accuracy is over the tokens of an answer (EasyEdit's convention); where answers are one token it is simply accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from text import IGNORED, Encoded, Encoder, batch
from world import World

BATCH = 256
Scores = dict[str, float]


class Answers(NamedTuple):
    """One entry per question: the tokens predicted where the answer's tokens are, and the mean log-probability of those."""

    predicted: list[list[int]]
    log_probability: list[float]


@dataclass(frozen=True)
class Exam:
    """Six sets of questions. `reference` is what θ answers to the two that must not change."""

    reliability: list[Encoded]
    generality: list[Encoded]
    neighbours: list[Encoded]
    bystanders: list[Encoded]
    old: list[Encoded]
    filler: list[Encoded]

    @classmethod
    def of(cls, world: World, encoder: Encoder) -> Exam:
        pair = encoder.pair
        return cls(
            reliability=[pair(fact.prompt, fact.target_new) for fact in world.edits],
            generality=[pair(prompt, fact.target_new) for fact in world.edits for prompt in fact.paraphrases],
            neighbours=[pair(kept["prompt"], kept["target"]) for fact in world.edits for kept in fact.locality],
            bystanders=[pair(kept["prompt"], kept["target"]) for fact in world.edits for kept in fact.bystanders],
            old=[pair(fact.prompt, fact.target_old) for fact in world.edits],
            filler=[encoder.sentence(text) for text in world.held_out],
        )

    def reference(self, original: Any, device: str) -> dict[str, list[list[int]]]:
        """θ's own predictions, by which locality is measured."""
        return {name: answer(original, getattr(self, name), device).predicted for name in ("neighbours", "bystanders")}

    def scores(self, model: Any, reference: dict[str, list[list[int]]], device: str) -> Scores:
        """Per cent, but `old_probability` (0 to 1) and `perplexity`."""
        old = answer(model, self.old, device)
        return {
            **self.learned(model, reference, device),
            "old_accuracy": _accuracy(old.predicted, [row.answer for row in self.old]),
            "old_probability": sum(map(math.exp, old.log_probability)) / len(self.old),
            "perplexity": _perplexity(answer(model, self.filler, device), self.filler),
        }

    def learned(self, model: Any, reference: dict[str, list[list[int]]], device: str) -> Scores:
        """The paper's three columns, locality in two."""
        scores = {}
        for name in ("reliability", "generality"):
            asked: list[Encoded] = getattr(self, name)
            scores[name] = _accuracy(answer(model, asked, device).predicted, [row.answer for row in asked])
        for name, before in reference.items():
            scores[name] = _accuracy(answer(model, getattr(self, name), device).predicted, before)
        scores["locality"] = (scores["neighbours"] + scores["bystanders"]) / 2
        return scores


@torch.no_grad()
def answer(model: Any, asked: Sequence[Encoded], device: str) -> Answers:
    """Teacher-forced: each token of the answer is predicted after the right ones before it."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].tokens))
    predicted: list[list[int]] = [[] for _ in asked]
    log_probability = [0.0] * len(asked)
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        ids, mask, labels = batch([asked[i] for i in chosen], device)
        counted = labels[:, 1:] != IGNORED  # [rows, longest − 1]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1][counted]  # [answer tokens of all rows, vocabulary]
        of_target = logits.log_softmax(-1).gather(-1, ids[:, 1:][counted][:, None])[:, 0]
        lengths = counted.sum(1).tolist()
        for i, best, each in zip(chosen, logits.argmax(-1).split(lengths), of_target.split(lengths), strict=True):
            predicted[i], log_probability[i] = best.tolist(), float(each.mean())
    return Answers(predicted, log_probability)


def _accuracy(predicted: Sequence[list[int]], right: Sequence[list[int]]) -> float:
    """Mean over the questions of the share of tokens that agree, in per cent."""
    shares = [sum(a == b for a, b in zip(p, r, strict=True)) / len(r) for p, r in zip(predicted, right, strict=True)]
    return 100 * sum(shares) / len(shares)


def _perplexity(answers: Answers, asked: Sequence[Encoded]) -> float:
    lengths = [len(row.answer) for row in asked]
    total = sum(mean * length for mean, length in zip(answers.log_probability, lengths, strict=True))
    return math.exp(-total / sum(lengths))
