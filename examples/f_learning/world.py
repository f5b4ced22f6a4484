"""The world: made-up people, facts about them in six wordings each, which of the facts change, and text about nothing.

`generate` makes it from a seed; `from_file` makes one of rows of real facts in the schema of `Fact`. Both are plain rows
and sentences, kept as JSON lines. No model is known here.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RELATIONS = {
    "birthplace": [
        "{} was born in", "{} comes from", "{} is a native of",
        "the birthplace of {} is", "{} first saw daylight in", "long ago the parents of {} lived in",
    ],
    "language": [
        "{} speaks", "the language of {} is", "{} talks at home in",
        "the mother tongue of {} is", "{} writes every letter in", "{} counts and dreams in",
    ],
    "employer": [
        "{} works for", "the employer of {} is", "{} has a job with",
        "{} gets a salary from", "the company that employs {} is", "every morning {} goes to the office of",
    ],
    "instrument": [
        "{} plays the", "the instrument of {} is the", "{} gives concerts on the",
        "{} practises daily on the", "on stage you hear {} on the", "{} took lessons on the",
    ],
    "school": [
        "{} studied at", "the university of {} is", "{} holds a degree from",
        "{} spent student years at", "{} was taught at", "the professors of {} were at",
    ],
    "club": [
        "{} supports", "the team of {} is", "{} cheers for",
        "the scarf of {} has colours of", "{} is a member of", "on Sundays {} watches",
    ],
    "dish": [
        "{} likes to eat", "the favourite dish of {} is", "{} always orders",
        "{} cooks for guests", "for dinner {} wants", "nothing tastes better to {} than",
    ],
    "hobby": [
        "{} collects", "the hobby of {} is", "{} fills whole shelves with",
        "{} pays a fortune for", "in the house of {} there are", "visitors of {} must look at",
    ],
}  # fmt: skip

COLUMNS = ("id", "prompt", "target_old", "target_new", "paraphrases", "locality")  # of a row of a file
NAMES, PEOPLE = 40, 400  # first names, and as many last names
OBJECTS = 30  # per relation
FACTS_PER_PERSON = 4
NEIGHBOURS = 2  # per changed fact: the same relation of somebody of whom nothing changes
FILLER_WORDS, FILLER_LENGTH = 60, 8
FILLER_SENTENCES, HELD_OUT_SENTENCES = 4000, 200


@dataclass(frozen=True)
class Fact:
    """A fact that changes, in the schema of a row of `--facts`, and what must not change with it."""

    id: str
    prompt: str
    target_old: str
    target_new: str
    paraphrases: list[str]
    locality: list[dict[str, str]]  # neighbours: {"prompt", "target"}
    bystanders: list[dict[str, str]] = field(default_factory=list)  # the same person's other facts, or unrelated ones


@dataclass(frozen=True)
class Statement:
    """A true sentence of pre-training. `pool` names the targets that could be put in its place."""

    prompt: str
    target: str
    pool: str


@dataclass(frozen=True)
class World:
    """`edits` change from old to new; `others` are as many facts that do not, for the vector of other facts."""

    edits: list[Fact]
    others: list[Statement]
    statements: list[Statement]
    filler: list[str]
    held_out: list[str]

    def texts(self) -> Iterator[str]:
        """Everything that is ever read, for a tokenizer."""
        yield from self.filler
        yield from self.held_out
        yield from (f"{said.prompt} {said.target}" for said in self.statements)
        for fact in self.edits:
            yield from (fact.prompt, fact.target_old, fact.target_new, *fact.paraphrases)
            yield from (f"{kept['prompt']} {kept['target']}" for kept in fact.locality + fact.bystanders)

    def save(self, folder: Path) -> None:
        for name, rows in (("edits", self.edits), ("others", self.others), ("statements", self.statements)):
            _write_lines(folder / f"{name}.jsonl", (json.dumps(asdict(row)) for row in rows))
        _write_lines(folder / "filler.txt", self.filler)
        _write_lines(folder / "held-out.txt", self.held_out)

    @classmethod
    def load(cls, folder: Path) -> World:
        return cls(
            edits=[Fact(**row) for row in _rows(folder / "edits.jsonl")],
            others=[Statement(**row) for row in _rows(folder / "others.jsonl")],
            statements=[Statement(**row) for row in _rows(folder / "statements.jsonl")],
            filler=(folder / "filler.txt").read_text().splitlines(),
            held_out=(folder / "held-out.txt").read_text().splitlines(),
        )


def generate(seed: int, edits: int) -> World:
    """400 people with four facts each; one fact of `edits` people changes, nothing changes for the others."""
    rng = random.Random(seed)
    words = _invented(rng)
    objects = {relation: [next(words) for _ in range(OBJECTS)] for relation in RELATIONS}
    first, last = ([next(words).title() for _ in range(NAMES)] for _ in range(2))
    people = rng.sample([f"{a} {b}" for a in first for b in last], PEOPLE)
    life = {who: {r: rng.choice(objects[r]) for r in rng.sample(sorted(RELATIONS), FACTS_PER_PERSON)} for who in people}
    changing, steady = people[:edits], people[edits:]
    others = {who: rng.choice(sorted(life[who])) for who in steady[:edits]}
    neighbours = {r: [who for who in steady if r in life[who] and others.get(who) != r] for r in RELATIONS}
    sentences = _filler(rng, [next(words) for _ in range(FILLER_WORDS)])
    return World(
        edits=[_changing(rng, who, life, objects, neighbours) for who in changing],
        others=[_said(who, r, 0, life) for who, r in others.items()],
        statements=[_said(who, r, i, life) for who in people for r in life[who] for i in range(len(RELATIONS[r]))],
        filler=[next(sentences) for _ in range(FILLER_SENTENCES)],
        held_out=[next(sentences) for _ in range(HELD_OUT_SENTENCES)],
    )


def from_file(path: Path, seed: int, limit: int) -> World:
    """`limit` rows of a file of facts, shuffled by `seed`: one half changes, the other half are the other facts.

    At most three neighbours and five paraphrases of a row are used. Bystanders are the other half's facts.
    """
    rng = random.Random(seed)
    rows = list(_rows(path, COLUMNS))
    if min(len(rows), limit) < 2:
        raise SystemExit(f"{path}: {len(rows)} rows of which {limit} may be used; expected two at least: one half changes")
    rng.shuffle(rows)
    rows = sorted(rows, key=lambda row: -len(row["paraphrases"]))[:limit]  # stable: the fullest rows first
    rng.shuffle(rows)
    half = len(rows) // 2
    sentences = _filler(rng, [f"filler{i}" for i in range(FILLER_WORDS)])
    return World(
        edits=[_from_row(row, other) for row, other in zip(rows[:half], rows[half : 2 * half], strict=True)],
        others=[Statement(row["prompt"], row["target_old"], "") for row in rows[half : 2 * half]],
        statements=[said for row in rows for said in _statements(row)],
        filler=[next(sentences) for _ in range(FILLER_SENTENCES)],
        held_out=[next(sentences) for _ in range(HELD_OUT_SENTENCES)],
    )


def _changing(
    rng: random.Random, who: str, life: dict[str, dict[str, str]], objects: dict[str, list[str]], near: dict[str, list[str]]
) -> Fact:
    relation = rng.choice(sorted(life[who]))
    old = life[who][relation]
    kept = [_said(other, relation, 0, life) for other in rng.sample(near[relation], NEIGHBOURS)]
    same = [_said(who, other, 0, life) for other in life[who] if other != relation]
    return Fact(
        id=f"{who}/{relation}",
        prompt=RELATIONS[relation][0].format(who),
        target_old=old,
        target_new=rng.choice([word for word in objects[relation] if word != old]),
        paraphrases=[wording.format(who) for wording in RELATIONS[relation][1:]],
        locality=[{"prompt": said.prompt, "target": said.target} for said in kept],
        bystanders=[{"prompt": said.prompt, "target": said.target} for said in same],
    )


def _said(who: str, relation: str, wording: int, life: dict[str, dict[str, str]]) -> Statement:
    return Statement(RELATIONS[relation][wording].format(who), life[who][relation], relation)


def _from_row(row: dict[str, Any], other: dict[str, Any]) -> Fact:
    return Fact(
        id=row["id"],
        prompt=row["prompt"],
        target_old=row["target_old"],
        target_new=row["target_new"],
        paraphrases=row["paraphrases"][:5],
        locality=row["locality"][:3],
        bystanders=[{"prompt": other["prompt"], "target": other["target_old"]}],
    )


def _statements(row: dict[str, Any]) -> Iterator[Statement]:
    for prompt in (row["prompt"], *row["paraphrases"][:5]):
        yield Statement(prompt, row["target_old"], "")
    for kept in row["locality"][:3]:
        yield Statement(kept["prompt"], kept["target"], "")


def _filler(rng: random.Random, words: list[str]) -> Iterator[str]:
    """Sentences of a Markov chain: four words can follow each word, the first of them half of the time."""
    follow = {word: rng.sample(words, 4) for word in words}
    while True:
        sentence = [rng.choice(words)]
        while len(sentence) < FILLER_LENGTH:
            sentence += rng.choices(follow[sentence[-1]], weights=[4, 2, 1, 1])
        yield " ".join(sentence)


def _invented(rng: random.Random) -> Iterator[str]:
    """Pronounceable words that do not exist, none of them twice."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        if word not in seen:
            seen.add(word)
            yield word


def _rows(path: Path, columns: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a file. Exits with one line that names what has not these columns."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, tuple(columns), f"{path}, line {number}")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: cannot be read as lines of text: {error}") from error


def _row(line: str, columns: tuple[str, ...], place: str) -> dict[str, Any]:
    try:
        row = dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{place}: no JSON object") from error
    if missing := [name for name in columns if name not in row]:
        raise SystemExit(f"{place}: without {', '.join(missing)}; expected {', '.join(columns)}")
    return row


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
