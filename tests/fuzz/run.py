"""Coverage-guided fuzzing of one target with atheris (libFuzzer): `python -m tests.fuzz.run TARGET [libFuzzer options]`.

`-runs=N -seed=1` is a bounded run; a folder as last argument keeps what it finds. A crash is written to `crash-…`, and
`python -m tests.fuzz.run TARGET crash-…` replays it.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["taskvec"]):
    from .mutator import mutated
    from .seeds import seeds
    from .targets import FAMILIES, TARGETS

    for family in FAMILIES.values():
        importlib.import_module(f"taskvec.delta.adapters.{family}")
    importlib.import_module("taskvec.delta.adapters.single_file")

_LIMITS = ["-max_len=8192", "-timeout=5", "-rss_limit_mb=1024", "-malloc_limit_mb=256"]


def main(target: str, *options: str) -> None:
    def mutate(content: bytes, most: int, seed: int) -> bytes:
        changed = mutated(target, content, seed) if seed % 4 else None
        return changed if changed is not None and len(changed) <= most else atheris.Mutate(content, most)

    with tempfile.TemporaryDirectory(prefix="taskvec-seeds-") as folder:
        for number, content in enumerate(seeds(target)):
            (Path(folder) / f"{number:03}").write_bytes(content)
        corpus = [] if any(not option.startswith("-") and Path(option).is_file() for option in options) else [folder]
        arguments = [sys.argv[0], *_LIMITS, *options, *corpus]
        atheris.Setup(arguments, TARGETS[target], custom_mutator=mutate, internal_libfuzzer=True)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
