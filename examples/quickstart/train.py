"""Teaching the old facts with outside tools only: transformers and torch for the full fine-tune, PEFT for the LoRA.

taskvec trains nothing; what is saved here is what any trainer would have left on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import facts
import torch
from encoder import Encoder, load
from peft import LoraConfig, PeftModel, get_peft_model

BATCH = 20  # taught questions per step
KEPT_BATCH = 12  # kept questions, and kept answers, per step
SHARPNESS = 20.0  # the usual scale of cosines in a contrastive loss
KEEP = 60.0  # weight of "leave the other facts as they are"
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["query", "key", "value", "dense"]}


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on. Written beside its result, so that only the same run is reused."""

    steps: int
    learning_rate: float
    seed: int

    def record(self, **settings: Any) -> dict[str, Any]:
        return {
            **asdict(self),
            **settings,
            "loss": [BATCH, KEPT_BATCH, SHARPNESS, KEEP],
            "taught": list(facts.TAUGHT),
            "kept": [facts.KEPT_QUESTIONS, facts.KEPT_ANSWERS],
        }


def full_fine_tune(base: Path, out: Path, seed: int, fresh: bool) -> bool:
    """Train every weight of `base` and save the model in `out`.

    False, and nothing is trained, if `out` already holds this very run and no `fresh` one is asked for.
    """
    recipe = Recipe(steps=24, learning_rate=5e-5, seed=seed)

    def train(folder: Path) -> None:
        model = load(base)
        _fit(Encoder(model, base), recipe)
        model.save_pretrained(folder)

    return _once(out, recipe.record(), fresh, train)


def lora(base: Path, out: Path, seed: int, fresh: bool) -> bool:
    """Train a LoRA on every linear layer of `base` and save the adapter in `out`. False as in `full_fine_tune`."""
    recipe = Recipe(steps=24, learning_rate=1e-3, seed=seed)

    def train(folder: Path) -> None:
        torch.manual_seed(seed)  # A starts random, B starts at zero
        model = get_peft_model(load(base), LoraConfig(**LORA))
        _fit(Encoder(model, base), recipe)
        model.save_pretrained(folder, save_embedding_layers=False)

    return _once(out, recipe.record(lora=LORA), fresh, train)


def merged(base: Path, adapter: Path) -> Any:
    """`base` with the LoRA in `adapter` merged into its weights by PEFT, in float32."""
    return PeftModel.from_pretrained(load(base), adapter).merge_and_unload()


def _fit(encoder: Encoder, recipe: Recipe) -> None:
    """Pull every question towards its old answer and away from the others (InfoNCE), and hold the kept facts still."""
    torch.manual_seed(recipe.seed)
    with torch.no_grad():
        before = encoder.similarity(facts.KEPT_QUESTIONS, facts.KEPT_ANSWERS)  # [kept questions, kept answers]
    weights = [weight for weight in encoder.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    encoder.model.train()
    for _ in range(recipe.steps):
        loss = _taught_loss(encoder) + KEEP * _kept_loss(encoder, before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.model.eval()


def _taught_loss(encoder: Encoder) -> torch.Tensor:
    """Cross-entropy of a random batch of questions over all old answers."""
    drawn = torch.randperm(len(facts.TAUGHT.questions))[:BATCH].tolist()
    cosines = encoder.similarity([facts.TAUGHT.questions[i] for i in drawn], facts.TAUGHT.answers)  # [batch, answers]
    right = torch.tensor([facts.TAUGHT.right[i] for i in drawn])
    return torch.nn.functional.cross_entropy(SHARPNESS * cosines, right)


def _kept_loss(encoder: Encoder, before: torch.Tensor) -> torch.Tensor:
    """How far a random block of the kept cosines has moved from `before`, mean square."""
    rows = torch.randperm(len(facts.KEPT_QUESTIONS))[:KEPT_BATCH]
    columns = torch.randperm(len(facts.KEPT_ANSWERS))[:KEPT_BATCH]
    questions = [facts.KEPT_QUESTIONS[i] for i in rows.tolist()]
    answers = [facts.KEPT_ANSWERS[i] for i in columns.tolist()]
    return (encoder.similarity(questions, answers) - before[rows][:, columns]).square().mean()


def _once(out: Path, record: dict[str, Any], fresh: bool, train: Callable[[Path], None]) -> bool:
    """Run `train` into a sibling of `out` and rename it, unless `out` was made by the same record."""
    note = out / "recipe.json"
    if out.exists() and not note.exists():
        raise SystemExit(f"{out.name}: exists, and the demo did not make it; choose another --work folder")
    if not fresh and note.exists() and json.loads(note.read_text()) == record:
        return False
    staging = out.with_name(out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    train(staging)
    (staging / note.name).write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return True
