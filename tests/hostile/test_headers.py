"""Every hostile file in every place where a file may be named: as the model, as what is subtracted, in an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, deserialize

from .conftest import MOST_TOLD, Command, Told, everything
from .headers import HEADERS

STRICTER = {  # what the library reads; why we do not: the format's own text (see tests/checkpoint/test_header.py)
    "a name twice", "a name twice, once escaped", "a zero before what is too large", "an unknown field",
    "a blank before the brace", "null for metadata", "a key of the metadata twice",
}  # fmt: skip


def as_model(here: Path, content: bytes) -> tuple[str, ...]:
    (here / "bad.safetensors").write_bytes(content)
    return "subtract", "bad.safetensors", "old.safetensors", "-a", "1", "-o", "out"


def as_old(here: Path, content: bytes) -> tuple[str, ...]:
    (here / "bad.safetensors").write_bytes(content)
    return "add", "model.safetensors", "bad.safetensors", "-a", "1", "-o", "out.safetensors"


def as_adapter(here: Path, content: bytes) -> tuple[str, ...]:
    (here / "bad.safetensors").mkdir()
    (here / "bad.safetensors" / "adapter_model.safetensors").write_bytes(content)
    (here / "bad.safetensors" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return "lora", "merge", "base", "bad.safetensors", "-o", "out"


def as_a_shard(here: Path, content: bytes) -> tuple[str, ...]:
    (here / "bad.safetensors").mkdir()
    (here / "bad.safetensors" / "model-00001-of-00001.safetensors").write_bytes(content)
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (here / "bad.safetensors" / "model.safetensors.index.json").write_text(json.dumps(index))
    return "inspect", "bad.safetensors"


def to_diff(here: Path, content: bytes) -> tuple[str, ...]:
    (here / "bad.safetensors").write_bytes(content)
    return "diff", "model.safetensors", "bad.safetensors"


PLACES: list[Callable[[Path, bytes], tuple[str, ...]]] = [as_model, as_old, as_adapter, as_a_shard, to_diff]


def expect_refusal(told: Told, words: tuple[str, ...], code: int = 1) -> None:
    """One printable line, of a length to be read, that says these words; nothing else."""
    assert told.code == code, told.err
    assert told.out == ""
    assert told.err.startswith("taskvec: ") and told.err.endswith("\n")
    line = told.err[:-1]
    assert line.isprintable(), line
    assert len(line) < MOST_TOLD
    assert all(word in line for word in words), line
    assert "Traceback" not in line and "TASKVEC_DEBUG" not in line


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_file_is_one_line_and_no_output(
    case: str, place: Callable[[Path, bytes], tuple[str, ...]], taskvec: Command, here: Path
) -> None:
    bad = HEADERS[case]
    arguments = place(here, bad.content)
    before = everything(here).keys()
    expect_refusal(taskvec(*arguments), ("bad.safetensors", *bad.words))
    assert everything(here).keys() == before, "something was left behind"


@pytest.mark.parametrize("case", sorted(HEADERS.keys() - STRICTER))
def test_the_library_refuses_it_too(case: str) -> None:
    with pytest.raises(SafetensorError):
        deserialize(HEADERS[case].content)


@pytest.mark.parametrize("case", sorted(STRICTER))
def test_what_only_we_refuse_is_listed(case: str) -> None:
    deserialize(HEADERS[case].content)
