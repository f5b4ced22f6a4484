"""What tells that an input of a sweep is another one by now: the content of a small file; inode, size and times of a large
one; of what is from the Hub the commit.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_bytes
from ..errors import CheckpointError
from ..run.plan import Plan
from ..run.record import recipe

_SMALL = 16 << 20  # bytes


def of_plan(plan: Plan) -> list[Any]:
    """What is computed from what, and of everything that is not from the Hub what pins it: weights, and the files of the
    model that the candidate gets."""
    opened = [plan.base, *(c for _, source in plan.vector.terms for c in source.inputs)]
    weights = [[shard.path.name, of_file(shard.path)] for c in opened if c.hub is None for shard in c.shards]
    side = [[file.name, of_file(file.source)] for file in plan.side if plan.base.hub is None]
    return [recipe(plan, None), weights, side]


def of_words(line: str) -> list[Any]:
    """The files that a command line names, as a word or behind the = of one."""
    named = [name for word in shlex.split(line) for name in (word, word.partition("=")[2])]
    return [[name, of_file(Path(name))] for name in named if os.path.isfile(name)]


def of_file(path: Path) -> Any:
    status = os.stat(path)
    if status.st_size <= _SMALL:
        try:
            return hashlib.sha256(read_bytes(path, _SMALL)).hexdigest()
        except CheckpointError:  # programs may be run and not read
            pass
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
