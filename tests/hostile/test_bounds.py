"""Claims of sizes that are not there take neither memory nor time: each in a process of its own that may have little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..checkpoint.craft import entry, framed
from .good import FIRST, INDEX, Make, adapter, file, sparse, together, with_index

MOST = 900 << 20  # bytes of address space; what a good model takes is below it
TIME = 60  # seconds, of a machine that may be busy
LIMITED = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MOST}, {MOST}))
resource.setrlimit(resource.RLIMIT_CPU, ({TIME // 2}, {TIME // 2}))
sys.argv[0] = "taskvec"
from taskvec.cli.main import main
main()
"""

BOMBS: dict[str, tuple[Make, str, str]] = {  # how it is made, what is named, what is said
    "a header of 100 MB that is not there": (
        file((10**8).to_bytes(8, "little") + b"{}", "bad.safetensors"), "bad.safetensors", "only 2 bytes follow"
    ),
    "a header of 100 MB of NULs": (
        sparse("bad.safetensors", 1 << 33, (10**8).to_bytes(8, "little") + b'{"'), "bad.safetensors", "not JSON"
    ),
    "a petabyte in a shape": (
        file(framed({"w": entry("U8", [10**15], 0, 10**15)})), "bad.safetensors", "data is 0 bytes"
    ),
    "ten million brackets": (file(framed("{" + '"w":' + "[" * 10**7)), "bad.safetensors", "nests too deeply"),
    "an index of eight gigabytes": (
        together(with_index({"a": FIRST}, FIRST), sparse(f"bad/{INDEX}", 1 << 33)), "bad", "expected at most"
    ),
    "an index of ten million brackets": (
        together(with_index({"a": FIRST}, FIRST), file(b"[" * 10**7, f"bad/{INDEX}")), "bad", "deep"
    ),
    "an adapter's config of eight gigabytes": (
        together(adapter(), sparse("bad/adapter_config.json", 1 << 33)), "bad", "expected at most"
    ),
    "an adapter's config of ten million brackets": (
        together(adapter(), file(b'{"r":' + b"[" * 10**7, "bad/adapter_config.json")), "bad", "deep"
    ),
}  # fmt: skip


def inspected(here: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, "inspect", name]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=TIME)


def test_a_good_model_has_room_enough(here: Path) -> None:
    done = inspected(here, "base")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_does_not_go_off(case: str, here: Path) -> None:
    make, name, words = BOMBS[case]
    make(here)
    done = inspected(here, name)
    assert done.returncode in (1, 3), done.stderr
    assert done.stderr.startswith("taskvec: bad") and done.stderr.count("\n") == 1
    assert words in done.stderr
