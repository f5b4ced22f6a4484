"""One seed of the experiment, stage by stage; every stage leaves a folder, and a second run starts where the first ended.

world → pretrained → original (θ: the full fine-tune on the old facts that the paper starts from)
      → old-full, old-lora (a second pass), other-full (a pass over other facts), random-full (as far, any direction)
      → forgot-VECTOR-λ (taskvec) → learned-ARM (the new facts) → scores
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import check
import forget
import model as models
import stages
import torch
import train
import world as worlds
from evaluate import Exam
from text import Encoded, Encoder

Kind = Literal["full", "lora"]


@dataclass(frozen=True)
class Settings:
    """What a seed's numbers depend on, apart from the seed. λ is `scale`."""

    facts: str | None = None  # a file of rows; without it the world is made up
    limit: int = 400  # rows of that file; half of them change
    edits: int = 200  # facts of a made-up world that change
    model: str | None = None  # a checkpoint to start from; without it one is trained from nothing
    width: int = 128
    pretraining: train.Pretraining = field(default_factory=train.Pretraining)
    fine_tuning: train.FineTuning = field(default_factory=train.FineTuning)
    epochs_original: int = 6
    epochs_old: int = 6
    epochs_new: int = 6
    epochs_curve: int = 16  # 0: arms are not followed epoch by epoch
    scale: float = 0.75  # on seeds 100 and 101, the largest of 0.5, 0.75, 1, 1.5 at which other facts' vector did not help
    sweep: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Arm:
    """Subtract λ times a vector (or nothing), then learn the new facts (or nothing)."""

    name: str
    vector: str | None = None  # the folder that holds what was learned of the old facts
    learn: Kind | None = None
    scale: float = 0.0
    epochs: int = 0

    @property
    def against(self) -> str:
        """The arm that only leaves the forgetting out."""
        return f"direct {self.learn}"


def arms(settings: Settings, small: bool) -> list[Arm]:
    """The paper's, full>LoRA which it leaves out, and four controls; `small` leaves out what a first look does not need."""
    e, s = settings.epochs_new, settings.scale
    first = [
        Arm("original"),
        Arm("direct full", None, "full", 0.0, e),
        Arm("direct lora", None, "lora", 0.0, e),
        Arm("full>full", "old-full", "full", s, e),
        Arm("lora>full", "old-lora", "full", s, e),
        Arm("lora>lora", "old-lora", "lora", s, e),
        Arm("random>full", "random-full", "full", s, e),
    ]
    rest = [
        Arm("full>lora", "old-full", "lora", s, e),
        Arm("other>full", "other-full", "full", s, e),
        Arm("full λ=-1 >full", "old-full", "full", -1.0, e),
        Arm("direct full, 2x epochs", None, "full", 0.0, 2 * e),
        Arm("direct lora, 2x epochs", None, "lora", 0.0, 2 * e),
    ]
    return first if small else first + rest


def sweep(settings: Settings, small: bool) -> list[Arm]:
    """Forgetting alone at each λ, and (unless `small`) learning after it, after forgetting other facts too."""
    vectors = {"full": "old-full", "lora": "old-lora", "other": "other-full"}
    only = [Arm(f"{kind} forget only, λ={s:g}", vectors[kind], None, s) for kind in ("full", "lora") for s in settings.sweep]
    learnt = [
        Arm(f"{kind}>full, λ={s:g}", vector, "full", s, settings.epochs_new)
        for kind, vector in vectors.items()
        for s in settings.sweep
        if s != settings.scale
    ]
    return only if small else only + learnt


def curves(settings: Settings) -> list[Arm]:
    """The arms that are followed epoch by epoch, longer than their budget, to compare them at equal reliability."""
    chosen = ("direct full", "direct lora", "full>full", "lora>full", "lora>lora")
    followed = [arm for arm in arms(settings, small=True) if arm.name in chosen and settings.epochs_curve]
    return [replace(arm, epochs=settings.epochs_curve) for arm in followed]


class Seed:
    """One seed's folder. `say` is told of each stage."""

    def __init__(self, settings: Settings, seed: int, out: Path, device: str, say: Callable[[str], None]):
        self.settings, self.seed, self.out, self.device, self.say = settings, seed, out, device, say

    # -- stages up to the vectors --

    @cached_property
    def world_folder(self) -> Path:
        s = self.settings

        def make(folder: Path) -> None:
            folder.mkdir(parents=True)
            made = worlds.from_file(Path(s.facts), self.seed, s.limit) if s.facts else worlds.generate(self.seed, s.edits)
            made.save(folder)

        facts = stages.described(Path(s.facts)) if s.facts else None
        return self._stage("world", {"seed": self.seed, "facts": facts, "limit": s.limit, "edits": s.edits}, [], make)

    @cached_property
    def pretrained(self) -> str | Path:
        """A small model that mostly knows the world, or the one that was given."""
        s = self.settings
        if s.model:
            return s.model

        def make(folder: Path) -> None:
            tokenizer = models.new_tokenizer(self.world)
            torch.manual_seed(self.seed)
            model = models.new_model(len(tokenizer), s.width).to(self.device)
            encoder = Encoder(tokenizer, model.config.n_positions)
            train.pretrain(model, self.world, encoder, s.pretraining, self.seed, self.device)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return self._stage("pretrained", {"width": s.width, **asdict(s.pretraining)}, [self.world_folder], make)

    @cached_property
    def original(self) -> Path:
        """θ. Easy to miss: without this pass the old facts are not the model's own, and there is less to forget."""
        return self._tuned("original", self.pretrained, "full", self._old_facts(), self.settings.epochs_original, 1)

    def vector(self, name: str) -> Path:
        """What a second pass taught, as a checkpoint or an adapter beside θ."""
        if name == "random-full":
            old = self.vector("old-full")
            make = partial(forget.random_fine_tune, self.original, old, seed=self.seed)
            return self._stage(name, {"seed": self.seed}, [self.original, old], make)
        which, kind = name.split("-")
        facts = self._old_facts() if which == "old" else self._other_facts()
        return self._tuned(name, self.original, kind, facts, self.settings.epochs_old, 2)

    # -- an arm --

    def forgotten(self, arm: Arm) -> Path:
        """θ′, by taskvec; θ itself where nothing is forgotten."""
        if arm.vector is None:
            return self.original
        old = self.vector(arm.vector)
        make = partial(forget.forget, self.original, old, arm.scale)
        return self._stage(f"forgot-{arm.vector}-{arm.scale:g}", {"scale": arm.scale}, [self.original, old], make)

    def scores(self, arm: Arm) -> dict[str, Any]:
        """The arm's row, from its file if it was made before."""
        forgotten = self.forgotten(arm)
        adapter = learned = None
        if arm.learn:
            learned = self._tuned(f"learned-{_slug(arm.name)}", forgotten, arm.learn, self._new_facts(), arm.epochs, 3)
            adapter = learned if arm.learn == "lora" else None

        def make(folder: Path) -> None:
            model = models.load(forgotten if adapter else learned or forgotten, self.device, adapter)
            _write(folder, self.exam.scores(model, self.reference, self.device))

        made = self._stage(f"scores/{_slug(arm.name)}", {"arm": arm.name}, [learned or forgotten], make)
        return dict(json.loads((made / "scores.json").read_text()))

    def curve(self, arm: Arm) -> list[dict[str, float]]:
        """Its row after every epoch."""
        forgotten = self.forgotten(arm)

        def make(folder: Path) -> None:
            model = train.trainable(forgotten, str(arm.learn), self._fresh_lora(3), self.device)
            rows: list[dict[str, float]] = []

            def look() -> None:
                rows.append(self.exam.learned(model, self.reference, self.device))

            recipe = self.settings.fine_tuning
            train.fine_tune(model, self._new_facts(), arm.epochs, recipe, self._order(3), self.device, look)
            _write(folder, rows)

        settings = {"epochs": arm.epochs, "learn": arm.learn, **asdict(self.settings.fine_tuning)}
        made = self._stage(f"curves/{_slug(arm.name)}", settings, [forgotten], make)
        return list(json.loads((made / "scores.json").read_text()))

    def checks(self, edits: list[Arm]) -> dict[str, dict[str, Any]]:
        """Every θ′ of `edits` against torch or PEFT."""
        found = {}
        for arm in edits:
            if arm.vector is not None:
                compare = check.check_lora if arm.vector.endswith("lora") else check.check_full
                forgotten = self.forgotten(arm)
                found[forgotten.name] = compare(self.original, self.vector(arm.vector), forgotten, arm.scale)
        return found

    def norms(self) -> dict[str, float]:
        """How far the second pass moved the model, ‖Δ‖ over all tensors."""
        return {name: forget.norm(self.original, self.vector(name)) for name in ("old-full", "old-lora")}

    # -- what the stages share --

    @cached_property
    def world(self) -> worlds.World:
        return worlds.World.load(self.world_folder)

    @cached_property
    def encoder(self) -> Encoder:
        longest = min(getattr(models.config(self.pretrained), "max_position_embeddings", 1024), 1024)
        return Encoder(models.load_tokenizer(self.pretrained), longest)

    @cached_property
    def exam(self) -> Exam:
        return Exam.of(self.world, self.encoder)

    @cached_property
    def reference(self) -> dict[str, list[list[int]]]:
        return self.exam.reference(models.load(self.original, self.device), self.device)

    def _old_facts(self) -> list[Encoded]:
        return [self.encoder.pair(fact.prompt, fact.target_old) for fact in self.world.edits]

    def _new_facts(self) -> list[Encoded]:
        return [self.encoder.pair(fact.prompt, fact.target_new) for fact in self.world.edits]

    def _other_facts(self) -> list[Encoded]:
        return [self.encoder.pair(said.prompt, said.target) for said in self.world.others]

    def _order(self, phase: int) -> int:
        """Seeds the order of the facts: the same for every arm of a phase."""
        return 1000 * self.seed + phase

    def _fresh_lora(self, phase: int) -> int:
        """Seeds the random factor of a LoRA: the same for every arm of a phase."""
        return 1000 * self.seed + 500 + phase

    def _tuned(self, name: str, start: str | Path, kind: str, facts: list[Encoded], epochs: int, phase: int) -> Path:
        recipe = self.settings.fine_tuning

        def make(folder: Path) -> None:
            model = train.trainable(start, kind, self._fresh_lora(phase), self.device)
            train.fine_tune(model, facts, epochs, recipe, self._order(phase), self.device)
            model.save_pretrained(folder)
            if kind == "full":
                self.encoder.tokenizer.save_pretrained(folder)

        settings = {"start": _given(start), "kind": kind, "epochs": epochs, **asdict(recipe)}
        inputs = [self.world_folder, *([start] if isinstance(start, Path) else [])]
        return self._stage(name, settings, inputs, make)

    def _stage(self, name: str, settings: dict[str, Any], inputs: list[Path], make: Callable[[Path], None]) -> Path:
        return stages.folder(self.out / name, settings, inputs, make, self.say)


def _given(start: str | Path) -> Any:
    """A model that is no stage: a name on the Hub, or what tells its folder from another one."""
    if isinstance(start, Path):
        return None
    return stages.described(Path(start)) if Path(start).exists() else start


def _slug(name: str) -> str:
    return name.replace(">", "-to-").replace("λ=", "").replace(",", "").replace(" ", "-").replace("--to", "-to")


def _write(folder: Path, rows: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(rows, indent=1) + "\n")
