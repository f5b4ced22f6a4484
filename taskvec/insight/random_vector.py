"""The control that shows whether it is the direction that counts: a random vector whose tensors are as long as those of the
vector it stands for. Per tensor R = g · ‖Δ‖ / ‖g‖, g normal, seeded by a number and the tensor's name.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import InputFiles, close_input, close_output, create_output, rename_new, write_all
from ..checkpoint.header import StoredTensor, encode_header
from ..delta.stored import METADATA_KEY
from ..delta.vector import TaskVector, formula
from ..errors import OutputExistsError, show
from ..run.extract import save_vector

_CHUNK = 1 << 18  # elements at a time
_STALE = ("checksum", "checksum_kind")  # of the metadata: they are of other numbers


def save_random(vector: TaskVector, output: Path, *, seed: int, base: Checkpoint | None = None, **options: Any) -> None:
    """Write a random vector with the tensors of `vector`, each of the same norm, as a saved vector: one file in float32.

    `options` are those of `save_vector`. Raises what it raises, and OutputExistsError when `output` is there.
    """
    with tempfile.TemporaryDirectory(prefix=".random-", dir=output.parent) as folder:
        stood_for, drawn = Path(folder) / "true.safetensors", Path(folder) / "drawn.safetensors"
        save_vector(vector, stood_for, base=base, fsync=False, **options)
        _randomise(Checkpoint.open(stood_for), drawn, seed, formula(vector).removeprefix("+ "))
        try:
            rename_new(drawn, output)
        except FileExistsError as error:
            raise OutputExistsError(f"{show(output)}: exists already", hint="Name another output") from error


def _randomise(vector: Checkpoint, output: Path, seed: int, name: str) -> None:
    (shard,) = vector.shards
    about = {key: value for key, value in json.loads(shard.metadata[METADATA_KEY]).items() if key not in _STALE}
    about |= {"formula": f"random, as long as {name}", "seed": seed}
    metadata = {**shard.metadata, METADATA_KEY: json.dumps(about, sort_keys=True)}
    header = encode_header([(t.name, t.dtype, t.shape, t.nbytes) for t in shard.tensors], metadata)
    files, fd, at = InputFiles({shard.path: shard.identity}), create_output(output), len(header)
    try:
        write_all(fd, memoryview(header), 0, path=output)
        for tensor in shard.tensors:
            scale = _norm(_stored(tensor, files)) / (_norm(_normal(tensor, seed)) or 1.0)
            for drawn in _normal(tensor, seed):
                data = (drawn * scale).astype("<f4").view(np.uint8)
                write_all(fd, data.data, at, path=output)
                at += len(data)
    except BaseException:
        close_input(fd)
        raise
    finally:
        files.close()
    close_output(fd, path=output)


def _stored(tensor: StoredTensor, files: InputFiles) -> Iterator[NDArray[Any]]:
    for at in range(0, tensor.elements, _CHUNK):
        part = np.empty(min(_CHUNK, tensor.elements - at), "<f4")
        files.read(tensor.path, part.view(np.uint8).data, tensor.offset + 4 * at, tensor.name)
        yield part.astype(np.float64)


def _normal(tensor: StoredTensor, seed: int) -> Iterator[NDArray[Any]]:
    """The same numbers each time."""
    digest = hashlib.sha256(tensor.name.encode("utf-8", "backslashreplace")).digest()
    draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *digest])))
    for at in range(0, tensor.elements, _CHUNK):
        yield draw.standard_normal(min(_CHUNK, tensor.elements - at))


def _norm(parts: Iterator[NDArray[Any]]) -> float:
    return math.sqrt(sum(float(np.einsum("i,i->", part, part)) for part in parts))
