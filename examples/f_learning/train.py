"""Training, with outside tools only: transformers, PEFT and torch. taskvec has no part in this file.

One recipe for every fine-tune, as in the paper: the answer's tokens count, AdamW, a constant learning rate, and the same
order of the facts whichever model learns them. What is saved is what any trainer leaves on disk.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import model as models
import torch
from text import Encoded, Encoder, batch
from world import World


@dataclass(frozen=True)
class Pretraining:
    """From nothing to a model that knows the world, mostly: some of what it reads is wrong."""

    steps: int = 1200
    warm_up: int = 40
    batch_size: int = 128
    learning_rate: float = 4e-3
    wrong: float = 0.15  # share of statements with a random answer of the same kind: P(old) stays near 0.7
    filler: float = 0.15  # share of sentences about nothing
    answers_only: bool = False  # of statements, whether the loss counts the answer alone


@dataclass(frozen=True)
class FineTuning:
    full_learning_rate: float = 3e-4
    lora_learning_rate: float = 3e-3
    batch_size: int = 32


def pretrain(model: Any, world: World, encoder: Encoder, recipe: Pretraining, seed: int, device: str) -> None:
    """AdamW, a short warm-up, a cosine down to nothing."""
    draw = _Reader(world, encoder, recipe, random.Random(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warm_cosine, recipe))
    model.train()
    for _ in range(recipe.steps):
        _step(model, [draw() for _ in range(recipe.batch_size)], optimizer, device, longest_gradient=1.0)
        schedule.step()
    model.eval()


def fine_tune(
    model: Any,
    facts: Sequence[Encoded],
    epochs: int,
    recipe: FineTuning,
    seed: int,
    device: str,
    after_epoch: Callable[[], None] = lambda: None,
) -> None:
    """Whatever of `model` takes a gradient learns `facts`: the whole model, or the LoRA on it."""
    order = random.Random(seed)
    lora = hasattr(model, "peft_config")
    rate = recipe.lora_learning_rate if lora else recipe.full_learning_rate
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(epochs):
        model.train()
        shuffled = order.sample(facts, len(facts))
        for first in range(0, len(shuffled), recipe.batch_size):
            _step(model, shuffled[first : first + recipe.batch_size], optimizer, device)
        model.eval()
        after_epoch()


def trainable(folder: str | Path, kind: str, seed: int, device: str) -> Any:
    """The checkpoint in `folder`, ready to be fine-tuned in `full` or through a `lora`."""
    loaded = models.load(folder, device)
    return loaded if kind == "full" else models.with_lora(loaded, seed)


class _Reader:
    """Draws what is read next: a fact in any wording, sometimes with a wrong answer, or a sentence about nothing."""

    def __init__(self, world: World, encoder: Encoder, recipe: Pretraining, rng: random.Random):
        self.rng, self.recipe = rng, recipe
        self.statements = [(encoder.pair(said.prompt, said.target), said.pool) for said in world.statements]
        self.filler = [encoder.sentence(text) for text in world.filler]
        self.pools: dict[str, list[list[int]]] = {}
        for encoded, pool in self.statements:
            self.pools.setdefault(pool, []).append(encoded.answer)

    def __call__(self) -> Encoded:
        if self.rng.random() < self.recipe.filler:
            return self.rng.choice(self.filler)
        said, pool = self.rng.choice(self.statements)
        prompt = said.tokens[: said.start]
        answer = self.rng.choice(self.pools[pool]) if self.rng.random() < self.recipe.wrong else said.answer
        return Encoded(prompt + answer, said.start if self.recipe.answers_only else 1)


def _warm_cosine(recipe: Pretraining, step: int) -> float:
    return min(1, (step + 1) / recipe.warm_up) * (1 + math.cos(math.pi * step / recipe.steps)) / 2


def _step(
    model: Any, rows: Sequence[Encoded], optimizer: torch.optim.Optimizer, device: str, longest_gradient: float = math.inf
) -> None:
    loss = model(**batch(rows, device)._asdict()).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), longest_gradient)
    optimizer.step()
