"""`taskvec diff`: totals first, then layer by kind; the same as data; exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import taskvec as tv

from .conftest import Command, random_tensors


@pytest.fixture
def near(here: Path) -> Path:
    """`near`: base, in which only the weight and bias of layer 0 differ."""
    tensors = random_tensors(1)
    (here / "near").mkdir()
    tensors["model.h.0.q.weight"] = tensors["model.h.0.q.weight"] * 1.5
    tensors["model.h.0.q.bias"] = tensors["model.h.0.q.bias"] * 1.5
    save_file(tensors, here / "near" / "model.safetensors", {"format": "pt"})
    return here


def test_totals_come_first_then_layers_by_kind(near: Path, taskvec: Command) -> None:
    outcome = taskvec("diff", "base", "near")
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0] == "base → near"
    assert re.fullmatch(r"  tensors +5 compared, 2 differ", lines[1])
    assert re.fullmatch(r"  elements changed +200 of 656 \(30\.5%\)", lines[2])
    table = lines[lines.index("") + 1 :]
    assert [line.split() for line in table[:3]] == [["model.h", "q"], ["0", "0.5"], ["1", "0"]]
    assert [line.split() for line in table[4:]] == [["outside", "of", "layers", "‖Δ‖", "/", "‖A‖"], ["model.embed", "0"]]


def test_json_is_one_object_with_the_same_numbers_as_python(near: Path, taskvec: Command) -> None:
    outcome = taskvec("diff", "base", "near", "--json")
    assert outcome.out.count("\n") == 1
    assert json.loads(outcome.out) == {"ok": True, **json.loads(json.dumps(tv.diff("base", "near").summary()))}


def test_a_plain_table_holds_no_control_characters(near: Path, taskvec: Command) -> None:
    names = ("evil\x07\u202e.0.w\x07\u202e.weight", "\x07\u202e.weight")  # click takes escape sequences away by itself
    for file, number in (("e.safetensors", 1.0), ("f.safetensors", 2.0)):
        save_file({**{name: torch.full((2,), number) for name in names}, f"{number}\x07": torch.ones(1)}, near / file)
    out = taskvec("diff", "e.safetensors", "f.safetensors", "--tensors").out
    assert "\x07" not in out and "\u202e" not in out and out.count("x07") == 8


def test_layers_are_in_the_order_of_their_numbers(near: Path, taskvec: Command) -> None:
    save_file({f"h.{layer}.w.weight": torch.ones(1) for layer in (64, 8, 1, 10)}, near / "h.safetensors")
    lines = taskvec("diff", "h.safetensors", "h.safetensors").out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["1", "8", "10", "64"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    """Makes stdout a terminal of so many columns."""

    def become(columns: int) -> Terminal:
        for name in ("NO_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        return terminal

    return become


def test_on_a_terminal_what_changed_is_shaded(near: Path, taskvec: Command, terminal: Callable[[int], Terminal]) -> None:
    screen = terminal(100)
    taskvec("diff", "base", "near")
    assert re.search(r"\x1b\[30;48;5;\d+m *0\.5", screen.getvalue())
    assert not re.search(r"\x1b\[30;48;5;\d+m *0 *\x1b", screen.getvalue())


def test_on_a_narrow_terminal_headings_are_folded_and_numbers_are_whole(
    here: Path, taskvec: Command, terminal: Callable[[int], Terminal]
) -> None:
    kinds = ("attention.output.LayerNorm", "attention.output.dense", "key", "query", "value", "dense", "output.LayerNorm")
    names = [f"encoder.layer.{layer}.{kind}.weight" for layer in (7, 8) for kind in kinds]
    for file, number in (("e.safetensors", 1.0), ("f.safetensors", 1.0123)):
        save_file({name: torch.full((2,), number) for name in names}, here / file)
    screen = terminal(60)
    taskvec("diff", "e.safetensors", "f.safetensors")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    table = [line.split() for line in lines[lines.index("") :]]
    assert ["7", *["0.012"] * 7] in table and ["8", *["0.012"] * 7] in table
    assert all(len(line) <= 60 for line in lines[lines.index("") :])


def test_exit_code_tells_whether_they_differ(near: Path, taskvec: Command) -> None:
    assert taskvec("diff", "base", "base", "--exit-code").code == 0
    assert taskvec("diff", "base", "near", "--exit-code").code == 3
    assert taskvec("diff", "base", "near").code == 0
    assert taskvec("diff", "base", "near", "--exit-code", "--include", "model.h.1.*").code == 0
    assert taskvec("diff", "base", "base").out.startswith("base → base: the same\n")


def test_what_is_on_one_side_only_is_named(near: Path, taskvec: Command) -> None:
    tensors = random_tensors(1)
    del tensors["model.embed.weight"]
    save_file({**tensors, "extra": torch.ones(2), "model.h.0.q.bias": torch.ones(9)}, near / "c.safetensors")
    out = taskvec("diff", "base", "c.safetensors").out
    assert re.search(r"^  only in A +1 tensor: model\.embed\.weight$", out, re.M)
    assert re.search(r"^  only in B +1 tensor: extra$", out, re.M)
    assert re.search(r"^  not comparable +model\.h\.0\.q\.bias: BF16 \[8\] in A, F32 \[9\] in B$", out, re.M)


def test_dtypes_that_differ_are_named(near: Path, taskvec: Command) -> None:
    save_file(random_tensors(1, torch.float32), near / "c.safetensors")
    assert re.search(r"^  dtypes +BF16 in A, F32 in B$", taskvec("diff", "base", "c.safetensors").out, re.M)


def test_of_an_edit_it_says_what_rounding_lost(here: Path, taskvec: Command) -> None:
    taskvec("subtract", "base", "old", "-a", "0.001", "-o", "out", "--no-fsync", "-q")
    out = taskvec("diff", "base", "out").out
    lost = json.loads((here / "out" / "taskvec.json").read_text())["changes"]["elements_lost_to_rounding"]
    assert lost > 0 and re.search(rf"^  lost to rounding +{lost} elements, \d+\.\d% of those", out, re.M)
    assert "lost to rounding" not in taskvec("diff", "base", "old").out


def test_verbose_edits_end_with_what_rounding_lost_by_layer_and_kind(here: Path, taskvec: Command) -> None:
    out = taskvec("subtract", "base", "old", "-a", "0.001", "-o", "out", "--no-fsync", "-v").out
    record = json.loads((here / "out" / "taskvec.json").read_text())["tensors"]
    lost, changed = (
        sum(record[f"model.h.0.q.{part}"].get(count, 0) for part in ("weight", "bias")) for count in ("lost", "changed")
    )
    table = out[out.index("share of the intended change that rounding lost") :].splitlines()
    assert table[2].split() == ["model.h", "q"] and table[3].split() == ["0", f"{lost / (lost + changed):.2g}"]
    assert lost > 0 and changed > 0
    assert "share of the intended" not in taskvec("subtract", "base", "base", "-a", "1", "-o", "b", "--no-fsync", "-v").out


def test_tensors_lists_those_that_differ(near: Path, taskvec: Command) -> None:
    lines = taskvec("diff", "base", "near", "--tensors").out.splitlines()
    listed = [line for line in lines if "cosine " in line and not line.startswith("  ")]
    assert [line.partition(":")[0] for line in listed] == ["model.h.0.q.weight", "model.h.0.q.bias"]
    assert "‖Δ‖ / ‖A‖ 0.5" in listed[1] or "‖Δ‖ / ‖A‖ 0.49" in listed[1]


REFUSED = {
    "nothing in common": (("base", "other.safetensors"), 3, "no tensor name in common"),
    "no such pattern": (("base", "old", "--include", "nothing*"), 2, "--include 'nothing*' matches no tensor"),
    "no such file": (("base", "absent"), 1, "absent"),
    "an adapter": (("base", "lora"), 1, "lora: an adapter, expected a model here"),
    "no threads": (("base", "old", "-j", "0"), 2, "-j"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line(case: str, taskvec: Command) -> None:
    arguments, code, words = REFUSED[case]
    outcome = taskvec("diff", *arguments)
    assert outcome.code == code and words in outcome.err
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("taskvec: ") and outcome.out == ""


def test_of_another_model_with_the_same_headers_it_says_nothing_lost(here: Path, taskvec: Command) -> None:
    taskvec("subtract", "base", "old", "-a", "0.001", "-o", "out", "--no-fsync", "-q")
    shutil.copytree(here / "base", here / "second")
    for file in (here / "second").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = bytes(byte ^ 1 for byte in content[start:])  # the header stays
        file.write_bytes(content)
    assert "lost to rounding" in taskvec("diff", "base", "out").out
    assert "lost to rounding" not in taskvec("diff", "second", "out").out


@pytest.mark.parametrize("options", [("old",), ("old", "--json"), ("absent", "--json")])
def test_output_that_cannot_be_printed_is_one_line_and_exit_1(options: tuple[str, ...], here: Path) -> None:
    command = [sys.executable, "-m", "taskvec", "diff", "base", *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(tv.__file__).parents[1])}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=here, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    if "absent" in options:
        assert done.stderr.startswith("taskvec: absent: ") and done.stderr.count("\n") == 1
    else:
        assert done.stderr == "taskvec: stdout: No space left on device. Free space, or send what is printed elsewhere\n"
