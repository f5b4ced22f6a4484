"""The card of an output: what the Hub and people read of it, and that what it says to type makes the same again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save

import taskvec as tv
from taskvec.cli.main import _run

from .small_models import SHAPES, SIDE, sharded, tensors, weights
from .stand_in import Hub

NAMED = b"---\nlicense: other\nlicense_name: ours\nlicense_link: %b\n---\n"
CARDS: dict[str, tuple[bytes, str]] = {
    "Windows lines": (b"---\r\nlicense: mit\r\n---\r\nhello", "license: mit"),
    "a byte order mark": (b"\xef\xbb\xbf---\nlicense: mit\n---\n", "license: mit"),
    "a bomb": (b"---\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nlicense: [*b,*b,*b,*b]\n---\n", "library_name"),
    "a list of licences": (b"---\nlicense: [mit, apache-2.0]\n---\n", "library_name"),
    "Norwegian": (b"---\nlanguage: [no, en]\n---\n", "language:\n- 'no'\n- en"),
    "code": (b"---\nlicense: !!python/object/apply:os.system [exit]\n---\n", "library_name"),
    "other kinds": (b"---\npipeline_tag: [a]\ntags: {a: b}\nlibrary_name: [[x]]\n---\n", "tags:\n- taskvec"),
    "tags in place of text": (b"---\nlicense: !!int ''\nlanguage: !!timestamp x\ntags: [!!bool maybe, b]\n---\n", "- b"),
    "a list of tags": (b"---\ntags:\n- one\n- {a: b}\n- [c]\n- two\nlanguage: en\n---\n", "- one\n- two"),
    "no text": (
        b"---\npipeline_tag: null\nlibrary_name: ~\nlanguage:\ntags: [null, '']\n---\n",
        "library_name: transformers",
    ),
    "a list": (b"---\n- license\n- mit\n---\n", "library_name"),
    "a text": (b"---\nlicense\n---\n", "library_name"),
    "a list as a name": (b"---\nlicense: mit\n? [a]\n: b\n---\n", "library_name"),
    "a long text": (b"---\nlicense: mit\nlicense_name: " + b"x" * 9999 + b"\n---\n", "license: mit\nlibrary_name"),
    "much": (b"---\nlicense: mit\nx: [" + b"[1, 2], " * 20_000 + b"]\nlanguage: de\n---\n", "language:\n- de"),
    "nested": (b"---\nlicense: mit\nx: " + b"[" * 99 + b"]" * 99 + b"\n---\n", "license: mit"),
    "nested too deep": (b"---\nlicense: mit\nx: " + b"[" * 100 + b"]" * 100 + b"\n---\n", "library_name"),
    "deep": (b"---\nlicense: mit\nx: " + b"[" * 50_000 + b"\n---\n", "library_name"),
    "a line separator": (b"---\nlicense_name: 'a \xe2\x80\xa8 b'\n---\n", "license_name"),
    "a link": (NAMED % b"https://example.com/LICENSE", "license_link: https://example.com/LICENSE"),
    "a file of the model": (NAMED % b"LICENSE", "license_link: LICENSE"),
    "a file that is not there": (NAMED % b"LICENSE.md", "license_name: ours\nlibrary_name"),
    "a file of a machine": (NAMED % b"file:///home/me/LICENSE", "license_name: ours\nlibrary_name"),
    "a password": (NAMED % b"https://me:secret@example.com/LICENSE", "license_name: ours\nlibrary_name"),
}


WITH_LICENCE = {
    "Windows lines", "a byte order mark", "a long text", "much", "nested", "a link", "a file of the model",
    "a file that is not there", "a file of a machine", "a password",
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_whatever_the_card_of_the_base_says_the_outputs_is_valid(case: str, hub: Hub, tmp_path: Path) -> None:
    content, part = CARDS[case]
    base = {**sharded(1), "config.json": SIDE["config.json"], "LICENSE": b"yes", "README.md": content}
    for name, data in base.items():
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_bytes(data)
    hub.add_model("org/old", {"model.safetensors": save(tensors(2))})
    tv.subtract(tmp_path / "base", "org/old", alpha=1, output=tmp_path / "out", fsync=False)
    head = (tmp_path / "out/README.md").read_text().split("\n---")[0]
    assert part in head
    assert ("license:" in head) == (case in WITH_LICENCE)
    tv.extract(tmp_path / "base", "org/old", output=tmp_path / "vector", fsync=False)
    vector = yaml.safe_load((tmp_path / "vector/README.md").read_text().split("---")[1])
    assert vector.get("license_link") == ("https://example.com/LICENSE" if case == "a link" else None)
    for folder in ("out", "vector"):
        tv.push(tmp_path / folder, f"me/{folder}")  # the Hub checks it too


MADE: dict[str, tuple[str, ...]] = {
    "an edit": ("subtract", "org/base", "org/old", "--alpha", "0.3"),
    "an edit of a part": (
        "add", "org/base", "me/lora", "--alpha", "-0.1", "--base", "org/old", "--include", "*.q.*", "--exclude", "*.1.*",
        "--out-dtype", "float32", "--max-shard-size", "4900",
    ),
    "weights by name": (
        "add", "org/base", "org/old", "--alpha", "-0.3", "--alpha-for", "*.h.*=-1e-05", "--alpha-for", "[a=m]*=2",
    ),
    "weights by depth": ("subtract", "org/base", "me/lora", "--alpha", "0.1", "--alpha-layers", "-0.1:0.6"),
    "weights by name, depth and mask": (
        "subtract", "org/base", "org/old", "--alpha", "0.1", "--alpha-for", "norm*=7", "--alpha-layers", "0.3:0.7",
        "--mask", "me/mask",
    ),
    "a mask": ("add", "org/base", "org/old", "--alpha", "0.7", "--mask", "me/mask"),
    "another model, with its code": ("add", "org/other", "org/vector", "--alpha", "0.7", "--force-base"),
    "a model without its code": ("subtract", "org/other", "org/other", "--alpha", "1.0", "--no-code"),
    "a vector": ("extract", "org/base", "org/old"),
    "an adapter's vector": ("extract", "org/base", "me/lora"),
    "a sum": ("extract", "org/base", "org/old", "me/lora", "--alpha", "2", "--alpha", "-0.25"),
    "part of a vector, halved, in shards": (
        "extract", "org/base", "org/old", "--alpha", "-0.5", "--include", "model.*", "--exclude", "*.1.*",
        "--dtype", "bfloat16", "--max-shard-size", "4900",
    ),
    "a vector of a vector": ("extract", "org/other", "org/vector", "--force-base"),
    "an adapter": ("lora", "extract", "org/base", "org/old", "--rank", "2"),
    "an adapter of ranks": (
        "lora", "extract", "org/base", "org/old", "--energy", "0.7", "--rank", "5", "--dtype", "float16", "--prefix", "outer",
        "--include", "*.weight", "--exclude", "norm*", "--no-modules-to-save",
    ),
}  # fmt: skip


class Inputs(NamedTuple):
    base: tv.Checkpoint
    old: tv.TaskVector
    lora: tv.TaskVector
    kept: tv.TaskVector


MADE_IN_PYTHON: dict[str, Callable[[Inputs], Any]] = {
    "a sum": lambda of: (of.base + sum([of.old, of.lora]) / 3 - of.kept).save("first"),
    "a sum in shards": lambda of: (of.base - 0.3 * of.old + 0.1 * of.lora).save(
        "first", max_shard_size=4900, include="*.q.*", out_dtype="float32"
    ),
    "a scaled vector, scaled": lambda of: (of.base - 0.3 * of.old.scaled({"*.h.*": 0.7}, 0.1)).save("first"),
    "scaled twice": lambda of: (of.base - of.old.scaled({"*.h.*": 0.7}).ramp(0.3, 0.4)).save("first"),
    "weights of weights": lambda of: (
        of.base + of.old.scaled({"n*": 0.7}).ramp(0.1, 0.6, 2).masked("me/mask").masked("me/mask")
    ).save("first"),
    "a choice": lambda of: (of.base - of.old.only("*.h.*", "norm*").without("*[.'\"]1.*")).save("first", exclude=["*.0.*"]),
    "another origin": lambda of: (of.base + 0.5 * tv.TaskVector.between("org/old", of.base).scaled({"*": 0.3})).save("first"),
    "adapters trained on one, and on another": lambda of: (
        of.base + tv.TaskVector.from_adapter("me/lora", "org/old") - 2 * tv.TaskVector.from_adapter("me/lora")
    ).save("first"),
    "a vector of another's": lambda of: (
        tv.Checkpoint.open("org/other") - 2 * tv.TaskVector.open("org/vector", force_base=True).only("*.q.*")
    ).save("first", code=False),
    "a saved sum": lambda of: (of.old.scaled({"*.h.*": 0.5, "*": 1.0}) - 0.1 * of.kept).save("first", base=of.base),
    "forced in part": lambda of: (tv.TaskVector.open("org/vector", force_base=True) - of.old).save("first", base=of.base),
    "of shards of a number of bytes": lambda of: of.old.ramp(0, 1).save("first", max_shard_size=np.int64(500)),
    "of an adapter and its base": lambda of: of.lora.save("first"),
    "saved for another": lambda of: tv.TaskVector.between("org/old", of.base).save("first", base="org/other"),
    "a saved part": lambda of: of.old.masked("me/mask").save(
        "first", dtype="bfloat16", max_shard_size="5MB", include="model.*", exclude="*.1.*"
    ),
}


@pytest.fixture
def more(models: Hub, tmp_path: Path) -> Hub:
    """A mask and a saved vector too, and other models."""
    own = {"config.json": b'{"auto_map": {"AutoModel": "modeling_own.Own"}}', "modeling_own.py": b"class Own: ..."}
    models.add_model("org/other", {"model.safetensors": save({**tensors(4), "more": torch.ones(9)}), **own})
    masks = {name: torch.rand(shape, generator=torch.Generator().manual_seed(5)) for name, shape in SHAPES.items()}
    models.add_model("me/mask", {"model.safetensors": save(masks)})
    tv.TaskVector.between("org/base", "org/old").save(tmp_path / "v.safetensors", fsync=False)
    models.add_model("org/vector", {"model.safetensors": (tmp_path / "v.safetensors").read_bytes()})
    return models


def made_again(models: Hub) -> str:
    """What the card of `first` says is typed, on another day; the output has the same bytes, and the same card, which is
    the result."""
    here = models.client.here
    card = (here / "first/README.md").read_text()
    models.add_model("org/old", {"model.safetensors": save(tensors(3))})  # somebody pushes meanwhile: the card names commits
    lines = card.partition("## Make it again\n\n")[2].partition("\n\n`taskvec.json` holds")[0].splitlines()
    assert all(line.startswith("    ") or not line for line in lines)
    if len(lines) > 1:
        models.client.python("\n".join(line.removeprefix("    ") for line in lines))
    else:
        again = shlex.split(lines[0])
        done = models.client.run(again[0], *again[1:])
        assert done.returncode == 0, done.stderr
    (output,) = {path.parent for path in here.glob("*/README.md")} - {here / "first"}
    assert output.name in ("edited", "vector", "adapter") and weights(output) == weights(here / "first")
    assert (output / "README.md").read_text() == card
    assert {path.name for path in output.iterdir()} == {path.name for path in (here / "first").iterdir()}
    tv.push(here / "first", "me/made")
    assert models.files("me/made", "main")["README.md"].decode() == card
    return card


@pytest.mark.parametrize("case", MADE)
def test_the_command_on_a_card_makes_the_same_again(case: str, more: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(more.client.here)
    monkeypatch.setattr(sys, "argv", ["taskvec", *MADE[case], "-o", "first"])
    assert _run() == 0
    card = made_again(more)
    assert "import taskvec" not in card
    head = yaml.safe_load(card.split("---")[1])
    edit = MADE[case][0] in ("add", "subtract")
    assert head["base_model"][0] == MADE[case][2 if MADE[case][0] == "lora" else 1]
    assert head["base_model_relation"] == ("merge" if edit else "adapter")
    assert head.get("license") == ("mit" if head["base_model"][0] == "org/base" else None)
    assert head.get("library_name") == (
        "peft" if MADE[case][0] == "lora" else "transformers" if edit and "license" in head else None
    )


@pytest.mark.parametrize("case", MADE_IN_PYTHON)
def test_the_python_on_a_card_makes_the_same_again(case: str, more: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tv.Checkpoint.open("org/base")
    vectors = (
        tv.TaskVector.between(base, "org/old"),
        tv.TaskVector.from_adapter("me/lora", base),
        tv.TaskVector.open("org/vector"),
    )
    monkeypatch.chdir(more.client.here)
    MADE_IN_PYTHON[case](Inputs(base, *vectors))
    assert "import taskvec as tv" in made_again(more)


def test_the_card_of_an_adapter_says_its_ranks_and_errors(models: Hub, tmp_path: Path) -> None:
    tuned = tensors(1)
    tuned["model.embed.weight"][:, :2] += 1
    tuned["model.h.0.q.weight"][0] += torch.arange(8)  # of rank 1
    tuned["model.h.1.q.weight"] += torch.eye(8)
    models.add_model("org/old", {"model.safetensors": save(tuned)})
    made = tv.extract_lora("org/base", "org/old", output=tmp_path / "lora", energy=0.7, fsync=False)
    rows = [line for line in (tmp_path / "lora/README.md").read_text().splitlines() if line.startswith("| ")]
    found = [tensor for tensor in made.tensors if tensor.layer.name.endswith("q.weight")]
    ranks = sorted(tensor.rank for tensor in found)
    assert len(found) == 2 and ranks[0] < ranks[1]
    assert f"| h.q | 2 | {ranks[0]}–{ranks[1]} | {max(tensor.error for tensor in found):.3g} |" in rows
    (embedding,) = (tensor for tensor in made.tensors if tensor.layer.name == "model.embed.weight")
    assert f"| model.embed | 1 | {embedding.rank} | {embedding.error:.3g} |" in rows


def test_what_is_too_long_for_a_card_is_said_to_be(models: Hub, tmp_path: Path) -> None:
    old = tv.TaskVector.between("org/base", "org/old")
    for place, vector in enumerate((old, old + old)):
        output = tmp_path / f"long-{place}"
        (tv.Checkpoint.open("org/base") + vector).save(
            output, include=[f"model.h.0.q.[w{'x' * n}]eight" for n in range(100)], fsync=False
        )
        assert "too long for a card: `taskvec.json` has what it said" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("base", "old", "warned"),
    [
        (b"license: mit", b"license: gpl-3.0", "the card names that of"),
        (b"tags: [x]", b"license: gpl-3.0", "the card names none"),
        (b"license: mit", b"license: MIT", None),
        (b"license: mit", b"tags: [x]", None),
    ],
)
def test_inputs_of_one_name_have_licences_of_their_own(base: bytes, old: bytes, warned: str | None, tmp_path: Path) -> None:
    for name, seed, said in (("a", 1, base), ("b", 2, old)):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model/model.safetensors").write_bytes(save(tensors(seed)))
        (tmp_path / name / "model/README.md").write_bytes(b"---\n" + said + b"\n---\n")
    report = tv.subtract(tmp_path / "a/model", tmp_path / "b/model", alpha=1, output=tmp_path / "out", fsync=False)
    found = [warning for warning in report.warnings if "several licences" in warning]
    assert len(found) == (warned is not None) and all(str(warned) in warning for warning in found)


def test_the_licence_of_a_mask_counts(models: Hub, tmp_path: Path) -> None:
    mask = {"model.safetensors": save({"norm.weight": torch.ones(8)}), "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}
    models.add_model("me/mask", mask)
    old = tv.TaskVector.between("org/base", "org/old").masked("me/mask")
    made = old.save(tmp_path / "vector", base="org/base", fsync=False)
    assert any("cc-by-nc-4.0" in warning for warning in made.warnings)
    assert "| me/mask |" in (tmp_path / "vector/README.md").read_text()


def test_names_on_a_card_draw_nothing(tmp_path: Path) -> None:
    names = ("-a|b", "x `y` *z* <img src=x>")
    for seed, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(save(tensors(seed)))
    tv.extract_lora(tmp_path / names[0], tmp_path / names[1], output=tmp_path / "lora", rank=1, exclude="norm*", fsync=False)
    text = (tmp_path / "lora/README.md").read_text()
    assert "# x \\`y\\` \\*z\\* \\<img src=x\\> − -a\\|b, as a LoRA" in text and "| -a\\|b |" in text
    assert "taskvec lora extract './-a|b' 'x `y` *z* <img src=x>'" in text
    assert "- without tensors that match norm\\*" in text


def test_numbers_and_one_pattern_from_python_are_taken(models: Hub, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"rank": np.int64(3), "energy": np.float32(0.5), "include": "*.q.*", "fsync": False}
    made = tv.extract_lora("org/base", "org/old", output=tmp_path / "lora", **chosen)
    assert {tensor.layer.module for tensor in made.tensors} == {"model.h.0.q", "model.h.1.q"}
    text = (tmp_path / "lora/README.md").read_text()
    assert "--rank 3 --energy 0.5 --include '*.q.*'" in text and "- only tensors that match \\*.q.\\*" in text
    saved = tv.TaskVector.between("org/base", "org/old").save(tmp_path / "v", include="*.q.*", fsync=False)
    assert len(saved.tensors) == 2
    assert len(tv.diff("org/base", "org/old", include="*.q.*").tensors) == 2


def test_licences_that_differ_are_warned_of_for_vectors_and_adapters_too(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/base", {**sharded(1), "README.md": b"---\nlicense: mit\n---\n"})
    hub.add_model("org/old", {"model.safetensors": save(tensors(2)), "README.md": b"---\nlicense: gpl-3.0\n---\n"})
    made = tv.extract("org/base", "org/old", output=tmp_path / "vector", fsync=False)
    assert any("several licences" in warning and "gpl-3.0" in warning for warning in made.warnings)
    plan = tv.extract_lora("org/base", "org/old", output=tmp_path / "lora", rank=1, fsync=False).plan
    assert any("several licences" in note and "gpl-3.0" in note for note in plan.notes)
    for folder in ("vector", "lora"):
        assert "license: mit" in (tmp_path / folder / "README.md").read_text()
    one = tv.extract("org/base", "org/old", output=tmp_path / "one.safetensors", fsync=False)
    assert any("several licences" in warning and "card" not in warning for warning in one.warnings)


def test_licences_that_differ_are_warned_of(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/base", {**sharded(1), "README.md": b"---\nlicense: mit\n---\n"})
    hub.add_model("org/old", {"model.safetensors": save(tensors(2)), "README.md": b"---\nlicense: gpl-3.0\n---\n"})
    for old in ("org/old", "hf://org/old/model.safetensors"):
        report = tv.subtract("org/base", old, alpha=1, output=tmp_path / old.replace("/", "-"), fsync=False)
        assert any("several licences" in warning and "gpl-3.0" in warning for warning in report.warnings)
