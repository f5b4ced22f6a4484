"""What is fuzzed: each target takes bytes, feeds them to one parser, and raises `Finding` when a promise is broken.

The promises: an input is accepted or refused by the project's own errors, in one printable line; what is accepted means
what another implementation says it means; no file outside the input's folder is opened.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.header import read_header
from taskvec.delta.adapters import FAMILIES, open_adapter
from taskvec.delta.adapters.patterns import Patterns, matches_whole
from taskvec.errors import TaskvecError

from ..checkpoint.craft import framed, header_of

# What we refuse and safetensors 0.8 accepts, on purpose: part of our message -> why.
STRICTER = {
    "occurs twice in the header": "the format forbids it; loaders disagree which of the two counts",
    " twice. The file is damaged": "as above, of the keys of __metadata__",
    "begins with b": "the format says the header begins with a brace; the library skips blanks",
    "expected exactly the fields": "a field that this version does not know may change what the bytes mean",
    "the field ": "as above, of a field that is there twice",
    "is not a map from text to text": "the library takes null for an empty map",
    "is larger than any machine": "a zero among dimensions that no loader can hold",
}
_SHAPES = {"m.q.weight": [6, 4], "m.o.weight": [4, 6]}
_LORA = {"m.q.lora_A.weight": [2, 4], "m.q.lora_B.weight": [6, 2], "m.o.lora_A.weight": [2, 6], "m.o.lora_B.weight": [4, 2]}
_FACTORS: dict[str, dict[str, list[int]]] = {
    "LORA": _LORA,
    "ADALORA": {"m.q.lora_A": [2, 4], "m.q.lora_B": [6, 2], "m.q.lora_E": [2, 1]},
    "LOHA": {"m.q.hada_w1_a": [6, 2], "m.q.hada_w1_b": [2, 4], "m.q.hada_w2_a": [6, 2], "m.q.hada_w2_b": [2, 4]},
    "IA3": {"m.q.ia3_l": [6, 1]},
    "TRAINABLE_TOKENS": {"m.q.trainable_tokens_delta": [2, 4]},
    "HRA": {"m.q.hra_u": [4, 2]},
    "VERA": {"m.q.vera_lambda_b": [6], "m.q.vera_lambda_d": [2], "vera_A": [2, 6], "vera_B": [6, 2]},
}  # fmt: skip
_SINGLE = {f"unet.{name}": shape for name, shape in _LORA.items()}
_LONGEST_FOR_RE = 30  # characters of a pattern that Python's own engine may be asked about
_opened: list[str] | None = None


class Finding(AssertionError):
    """A promise is broken."""


def header(content: bytes) -> None:
    """A `.safetensors` file, against safetensors' own parser in both directions."""
    path = _folder() / "m.safetensors"
    path.write_bytes(content)
    theirs = _library(content)
    try:
        found = read_header(path)
    except TaskvecError as error:
        line = _line(error)
        if theirs is not None and not any(known in line for known in STRICTER):
            raise Finding(f"safetensors reads it, we say: {line}") from error
        return
    if theirs is None:
        raise Finding("safetensors refuses it, we read it")
    ours = {t.name: (t.dtype, list(t.shape), content[t.offset : t.offset + t.nbytes]) for t in found.tensors}
    _expect(ours == theirs, f"we read {ours}, safetensors {theirs}")
    _expect(len(ours) == len(found.tensors), "a name occurs twice")
    _expect(all(math.prod(t.shape) == t.elements for t in found.tensors), "elements are not the product of the shape")


def index(content: bytes) -> None:
    """A `model.safetensors.index.json` beside two shards: what is opened is named by it, and lies beside it."""
    folder = _sharded()
    (folder / "model.safetensors.index.json").write_bytes(content)
    try:
        with _Opening() as opened:
            found = Checkpoint.open(folder)
    except TaskvecError as error:
        _line(error)
        _only_below(folder, opened.paths)
        return
    _only_below(folder, opened.paths)
    weight_map = json.loads(content.decode())["weight_map"]
    _expect({name: t.path.name for name, t in found.tensors.items()} == weight_map, "not where the index says")
    _expect(all(t.path.parent == folder for t in found.tensors.values()), "a shard outside the folder")


def adapter_config(content: bytes) -> None:
    """An `adapter_config.json` beside the weights of the family it names, on a base that they fit: the scale is PEFT's."""
    family = _family(content)
    folder = _adapter(family)
    (folder / "adapter_config.json").write_bytes(content)
    try:
        with _Opening() as opened:
            adapter = open_adapter(folder)
            adapter.resolve(_base(), lambda name: True)
            adapter.summary()
    except TaskvecError as error:
        _line(error)
        _only_below(_folder(), opened.paths)
        return
    _only_below(_folder(), opened.paths)
    config = json.loads(content.decode())
    if family == "LORA":
        for module in adapter.modules:
            expected = _scale(config, module.name)
            _expect(expected is None or module.scale == expected, f"{module.name}: s = {module.scale}, PEFT: {expected}")


def single_file(content: bytes) -> None:
    """The settings in `lora_adapter_metadata` of an adapter that is one file."""
    path = _folder() / "adapter.safetensors"
    text = content.decode("utf-8", "replace")
    entries = {name: ("F32", shape, 4 * math.prod(shape)) for name, shape in _SINGLE.items()}
    data = bytes(sum(nbytes for _, _, nbytes in entries.values()))
    path.write_bytes(framed(header_of(entries, {"lora_adapter_metadata": text}), data))
    try:
        adapter = open_adapter(path)
        adapter.resolve(_base(), lambda name: True)
        adapter.summary()
    except TaskvecError as error:
        _line(error)
        return
    _expect(all(math.isfinite(module.scale) for module in adapter.modules), "a scale that is not finite")


def pattern(content: bytes) -> None:
    """`pattern NUL module`: of what is understood the meaning is that of `re`, as PEFT 0.21 asks it."""
    text, _, module = content.decode("utf-8", "replace").partition("\0")
    try:
        found = Patterns([text]).first(module) is not None
        whole = matches_whole(text, module)
    except (ValueError, re.error):
        return
    if len(text) <= _LONGEST_FOR_RE and len(module) <= 12:
        _expect(found == (re.match(rf"(.*\.)?({text})$", module) is not None), f"{text!r} on {module!r}: {found}")
        _expect(whole == (re.fullmatch(text, module) is not None), f"{text!r} on all of {module!r}: {whole}")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "adapter_config": adapter_config,
    "single_file": single_file,
    "pattern": pattern,
}


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Finding(what)


def _line(error: TaskvecError) -> str:
    line = str(error)
    _expect(line.isprintable(), f"not one printable line: {line!r}")
    _expect(len(line) < 3000, f"{len(line)} characters of an input end in a message")
    return line


def _library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return {name: (spec["dtype"], list(spec["shape"]), bytes(spec["data"])) for name, spec in found}


def _family(content: bytes) -> str:
    try:
        found = str(json.loads(content)["peft_type"]).upper()
    except (ValueError, TypeError, KeyError, RecursionError):
        return "LORA"
    return found if found in _FACTORS and found in FAMILIES else "LORA"


def _scale(config: dict[str, Any], module: str) -> float | None:
    """alpha / r, or alpha / sqrt(r), by PEFT's own words; None where `re` may not be asked."""
    if any(len(key) > _LONGEST_FOR_RE for key in config.get("alpha_pattern") or {}):
        return None
    patterns = config.get("alpha_pattern") or {}
    first = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)  # those after it are not asked
    alpha = config.get("lora_alpha", 8) if first is None else patterns[first]
    return alpha / math.sqrt(2) if config.get("use_rslora") else alpha / 2


class _Opening:
    """Remembers every path that is opened while it lasts."""

    def __enter__(self) -> _Opening:
        global _opened
        self.paths = _opened = []
        return self

    def __exit__(self, *_: object) -> None:
        global _opened
        _opened = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        _opened.append(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())
    elif _opened is not None and event.startswith(("socket.connect", "subprocess", "os.exec", "os.system")):
        _opened.append(f"/{event}")


def _only_below(folder: Path, paths: list[str]) -> None:
    outside = [path for path in paths if not path.startswith(f"{folder}/") and not path.endswith((".py", ".pyc"))]
    _expect(not outside, f"opened outside the folder: {outside}")


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    sys.addaudithook(_audit)
    return tempfile.TemporaryDirectory(prefix="taskvec-fuzz-")


def _folder() -> Path:
    return Path(_home().name)


def _write(path: Path, shapes: dict[str, list[int]]) -> None:
    path.parent.mkdir(exist_ok=True)
    entries = {name: ("F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}
    path.write_bytes(framed(header_of(entries), bytes(sum(nbytes for _, _, nbytes in entries.values()))))


@cache
def _sharded() -> Path:
    folder = _folder() / "sharded"
    _write(folder / "model-00001-of-00002.safetensors", {"a": [2], "b": [3]})
    _write(folder / "model-00002-of-00002.safetensors", {"c": [0]})
    _write(folder.parent / "outside.safetensors", {"d": [1]})
    return folder


@cache
def _adapter(family: str) -> Path:
    folder = _folder() / "adapters" / family
    folder.parent.mkdir(exist_ok=True)
    _write(folder / "adapter_model.safetensors", {f"base_model.model.{n}": shape for n, shape in _FACTORS[family].items()})
    return folder


@cache
def _base() -> Checkpoint:
    path = _folder() / "base.safetensors"
    _write(path, _SHAPES)
    return Checkpoint.open(path)
