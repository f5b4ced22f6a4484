"""Good inputs that the hostile ones are put beside, and the making of a hostile one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.craft import framed, header_of, indexed, weights

Make = Callable[[Path], object]  # puts an input into the folder
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def one(fill: float) -> bytes:
    """A file of one F32 [2, 2] tensor `w`."""
    return framed(header_of({"w": ("F32", [2, 2], 16)}), np.full(4, fill, "<f4").tobytes())


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(one(1.0))
    (folder / "old.safetensors").write_bytes(one(3.0))


def file(content: bytes, name: str = "bad.safetensors") -> Make:
    return lambda here: (here / name).write_bytes(content)


def files(contents: dict[str, bytes | str], folder: str = "bad") -> Make:
    """A folder of files."""

    def make(here: Path) -> None:
        for name, content in contents.items():
            path = here / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def with_index(weight_map: object, *shards: str) -> Make:
    """A model folder `bad` whose index says this, with shards of one tensor each, named a, b, …"""

    def make(here: Path) -> None:
        indexed(here / "bad", weight_map)
        for shard, tensor in zip(shards, "abcdef"):
            weights(here / "bad" / shard, tensor)

    return make


def with_index_of(content: bytes | str) -> Make:
    """The same, the index written as it stands."""
    raw = content.encode() if isinstance(content, str) else content
    return together(with_index({"a": FIRST}, FIRST), files({INDEX: raw}))


def together(*makes: Make) -> Make:
    def make(here: Path) -> None:
        for each in makes:
            each(here)

    return make


def link(name: str, target: str) -> Make:
    """A symlink in place of what may be there."""

    def make(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).unlink(missing_ok=True)
        (here / name).symlink_to(target)

    return make


def pipe(name: str) -> Make:
    """A FIFO that nobody writes to."""

    def make(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        os.mkfifo(here / name)

    return make


def listening(name: str) -> Make:
    """A socket. Its address is given relative to the working directory: an absolute one may be too long."""

    def make(here: Path) -> None:
        (here / name).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(name)

    return make


def sparse(name: str, size: int, start: bytes = b"") -> Make:
    """A file that is larger than what lies on the disk."""

    def make(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        with open(here / name, "wb") as out:
            out.write(start)
            out.truncate(size)

    return make


def adapter(config: object = None, tensors: dict[str, list[int]] | None = None, dtype: str = "F32", **changes: Any) -> Make:
    """An adapter folder `bad` of rank 2 for the tensor h.0.q of `base`, with some of its config changed; `config` in place of
    it, if one is given."""
    name = "base_model.model.model.h.0.q.lora_"
    shapes = {f"{name}A.weight": [2, 24], f"{name}B.weight": [8, 2]} if tensors is None else tensors
    width = {"F32": 4, "I8": 1, "BF16": 2}[dtype]
    entries = {name: (dtype, shape, width * int(np.prod(shape))) for name, shape in shapes.items()}
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    return files(
        {
            "adapter_config.json": config if isinstance(config, (bytes, str)) else json.dumps(config or fields),
            "adapter_model.safetensors": framed(header_of(entries), bytes(sum(nbytes for *_, nbytes in entries.values()))),
        }
    )
