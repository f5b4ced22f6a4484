"""Hostile configs beside good weights, and hostile records of outputs: read, judged, and never believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..checkpoint.craft import framed
from .conftest import Command, everything
from .good import files, link, one, pipe, sparse
from .test_headers import expect_refusal

CONFIGS: dict[str, tuple[bytes | str, tuple[str, ...], int]] = {  # what it is, what is said, the exit code
    "cut off": ('{"model_type": "ll', ("bad/config.json", "not JSON"), 1),
    "a list": ("[]", ("bad/config.json", "list", "expected an object"), 1),
    "in UTF-16": ("{}".encode("utf-16"), ("bad/config.json", "not JSON"), 1),
    "lists in each other": ("[" * 10**6, ("bad/config.json", "not JSON", "deep"), 1),
    "configs in each other": ('{"a_config":' * 3000 + "{}" + "}" * 3000, ("bad/config.json", "not JSON", "deep"), 1),
    "deeper than is walked": ('{"a_config":' * 150 + "{}" + "}" * 150, ("bad/config.json", "not JSON", "deep"), 1),
    "a number of 5000 digits": ('{"x":' + "9" * 5000 + "}", ("bad/config.json", "not JSON"), 1),
    "quantised": ('{"quantization_config":{"quant_method":"\\u001b[2J"}}', ("bad: config.json", "unquantised"), 3),
    "quantised inside": ('{"text_config":{"quantization_config":{"bits":4}}}', ("bad: config.json", "unquantised"), 3),
    "weights elsewhere": ('{"transformers_weights":"../x.safetensors"}', ("bad/config.json", "transformers_weights"), 3),
    "code elsewhere": ('{"auto_map":{"AutoModel":"../../x.Model"}}', ("config.json", "AutoModel", "../../x.Model"), 1),
}


@pytest.mark.parametrize("options", [(), ("--out-dtype", "float16")])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config_is_one_line_and_no_output(
    case: str, options: tuple[str, ...], taskvec: Command, here: Path
) -> None:
    content, words, code = CONFIGS[case]
    files({"model.safetensors": one(1), "config.json": content})(here)
    before = everything(here).keys()
    expect_refusal(taskvec("subtract", "bad", "old.safetensors", "-a", "1", "-o", "out", *options), words, code)
    assert everything(here).keys() == before


HARMLESS: dict[str, dict[str, bytes | str]] = {
    "numbers that are none": {"config.json": '{"x": NaN, "y": -Infinity, "quantization_config": null}'},
    "half a character": {"config.json": '{"x": "\\ud800", "\\udfff": 1}'},
    "a key twice": {"config.json": '{"a": 1, "a": 2}'},
    "fields of other kinds": {"config.json": '{"model_type": ["x"], "dtype": {}, "architectures": 7, "text_config": []}'},
    "a place that is a list": {"config.json": '{"_name_or_path": ["/x"], "a_config": {"_name_or_path": 7}}'},
    "a tokenizer of brackets": {"config.json": "{}", "tokenizer_config.json": "[" * 10**5},
    "modules that are none": {"config.json": "{}", "modules.json": '[{"path": "../up"}, {"path": 5}, 7, null]'},
    "modules of brackets": {"config.json": "{}", "modules.json": "[" * 10**5},
}


@pytest.mark.parametrize("options", [(), ("--out-dtype", "float64")])
@pytest.mark.parametrize("case", HARMLESS)
def test_an_odd_config_is_no_reason_to_refuse(case: str, options: tuple[str, ...], taskvec: Command, here: Path) -> None:
    files({"model.safetensors": one(1), **HARMLESS[case]})(here)
    assert taskvec("subtract", "bad", "old.safetensors", "-a", "1", "-o", "out", *options).code == 0
    same = HARMLESS[case].keys() - ({"config.json"} if options else set())
    assert all((here / "out" / name).read_bytes() == (here / "bad" / name).read_bytes() for name in same)


@pytest.mark.parametrize("make", [pipe("bad/config.json"), link("bad/config.json", "/dev/zero")])
def test_a_config_that_is_no_file_is_not_waited_for(make: Callable[[Path], object], taskvec: Command, here: Path) -> None:
    files({"model.safetensors": one(1)})(here)
    make(here)
    told = taskvec("subtract", "bad", "old.safetensors", "-a", "1", "-o", "out")
    expect_refusal(told, ("bad/config.json", "not a regular file"))


# --- records ----------------------------------------------------------------------------------------------------------


def changed(**fields: Any) -> Callable[[Path], None]:
    """`taskvec.json` with some fields of it replaced."""

    def change(out: Path) -> None:
        record = json.loads((out / "taskvec.json").read_text())
        (out / "taskvec.json").write_text(json.dumps({**record, **fields}))

    return change


def written(content: bytes | str) -> Callable[[Path], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda out: (out / "taskvec.json").write_bytes(raw)


RECORDS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[int, ...]]] = {
    "cut off": (written('{"format": 2'), ("taskvec.json", "not JSON"), (1,)),
    "empty": (written(""), ("taskvec.json", "not JSON"), (1,)),
    "a list": (written("[]"), ("taskvec.json", "expected an object"), (1,)),
    "lists in each other": (written("[" * 10**6), ("taskvec.json", "not JSON", "deep"), (1,)),
    "deep, and closed": (written('{"x":' * 800 + "1" + "}" * 800), ("taskvec.json", "not JSON", "deep"), (1,)),
    "an empty object": (written("{}"), ("out",), (1, 3)),
    "too large": (sparse("taskvec.json", 1 << 30), ("taskvec.json", "at most"), (1,)),
    "a pipe": (pipe("taskvec.json"), ("taskvec.json", "not a regular file"), (1,)),
    "a device": (link("taskvec.json", "/dev/zero"), ("taskvec.json", "not a regular file"), (1,)),
    "shards that are a number": (changed(shards=7), ("record is damaged",), (1,)),
    "shards without names": (changed(shards=[{}]), ("record is damaged",), (1,)),
    "shards elsewhere": (changed(shards=[{"name": "../../etc/passwd"}]), ("../../etc/passwd",), (3,)),
    "a shard that draws": (changed(shards=[{"name": "\x1b[2J\u202e"}]), ("\\x1b[2J\\u202e",), (3,)),
    "files elsewhere": (
        changed(files=[{"name": "../model.safetensors", "bytes": 1, "sha256": "0"}]), ("../model.safetensors", "out"), (3,)
    ),
    "files anywhere": (
        changed(files=[{"name": "/etc/passwd", "bytes": 1, "sha256": "0"}]), ("/etc/passwd", "out"), (3,)
    ),
    "files that are a truth": (changed(files=True), ("record is damaged",), (1,)),
    "a file with a NUL": (changed(files=[{"name": "a\0b", "bytes": 1, "sha256": "0"}]), ("out",), (1, 3)),
    "tensors that are a list": (changed(tensors=[]), ("out",), (1, 3)),
    "a formula that runs": (changed(formula="__import__('os').mkdir('pwned')"), ("out", "edited"), (3,)),
    "a base elsewhere": (changed(base={"name": "x", "path": "/dev/zero"}), ("out", "edited"), (3,)),
    "a vector of nothing": (changed(vector=[]), ("out", "edited"), (3,)),
    "an α of text": (changed(vector=[{"coefficient": "1; import os"}]), ("record is damaged",), (1,)),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_hostile_record_is_never_right(case: str, taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "base", "-a", "1", "-o", "out", "-q").code == 0
    change, words, codes = RECORDS[case]
    change(here / "out")
    before = everything(here).keys()
    told = taskvec("verify", "out")
    assert told.code in codes, told.out + told.err
    lines = [*told.out.splitlines(), *told.err.splitlines()]
    assert all(line.isprintable() and len(line) < 3000 for line in lines)
    assert all(word in told.out + told.err for word in words), told.out + told.err
    assert told.err and all(line.startswith("taskvec: out") for line in told.err.splitlines())
    assert "TASKVEC_DEBUG" not in told.err and "root:" not in told.out + told.err
    assert everything(here).keys() == before


@pytest.mark.parametrize("story", ["{", "[]", "7", "[" * 10**5, '{"x":' * 900 + "1" + "}" * 900, "{}"])
def test_a_hostile_record_in_a_file_is_never_right(story: str, taskvec: Command, here: Path) -> None:
    made = one(1)
    header = json.loads(made[8 : 8 + int.from_bytes(made[:8], "little")])
    (here / "bad.safetensors").write_bytes(framed({"__metadata__": {"taskvec": story}, **header}, made[-16:]))
    expect_refusal(taskvec("verify", "bad.safetensors"), ("bad.safetensors",))
