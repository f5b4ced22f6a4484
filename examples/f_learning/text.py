"""Prompts and answers as tokens: one encoding for training and for examination, so that both look at the same positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

IGNORED = -100  # what transformers' loss leaves out


class Encoded(NamedTuple):
    """A prompt and its answer. The tokens from `start` on are the answer."""

    tokens: list[int]
    start: int

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.start :]


class Batch(NamedTuple):
    """All three [rows, longest row]; padding on the right; labels only where tokens count."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


class Encoder:
    def __init__(self, tokenizer: Any, longest: int):
        self.tokenizer = tokenizer
        self.longest = longest

    def pair(self, prompt: str, target: str) -> Encoded:
        """Too long a prompt loses its beginning."""
        answer = self.tokenizer(" " + target.strip(), add_special_tokens=False).input_ids
        prompt_tokens = self.tokenizer(prompt).input_ids[-(self.longest - len(answer)) :]
        return Encoded(prompt_tokens + answer, len(prompt_tokens))

    def sentence(self, text: str) -> Encoded:
        """Every token but the first counts."""
        return Encoded(self.tokenizer(text).input_ids[: self.longest], 1)


def batch(rows: Sequence[Encoded], device: str) -> Batch:
    longest = max(len(row.tokens) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.tokens)
        ids[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
        labels[i, row.start : len(tokens)] = tokens[row.start :]
    return Batch(ids.to(device), mask.to(device), labels.to(device))
