"""A run is killed (SIGKILL) before system call 1, 2, 3 … until it gets through: whatever is left, the output is absent (or
the old one) or whole, and the same command then makes the same bytes, with the files that were finished. And the same when
the power went with it, so that nothing is on the disk but what was flushed to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taskvec.run import journal

from .conftest import Clean
from .job import INPUTS, SHARDS, contents, left_over, taskvec
from .mortal import Mortal
from .power import cut_power
from .test_faults import prepare

Damage = Callable[[Path], None]


def power_stays(log: Path) -> None:
    """Only the process is gone."""


CASES = [(name, power_stays) for name in ("a folder by an adapter", "a single file", "a vector")]
CASES += [
    (name, cut) for name in ("a folder", "over a folder", "over a folder in two steps") for cut in (power_stays, *cut_power)
]


@pytest.fixture(scope="module")
def mortal() -> Iterator[Mortal]:
    with Mortal() as process:
        yield process


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_run_killed_anywhere_and_started_again_makes_the_same_bytes(
    name: str, damage: Damage, here: Path, clean: Callable[[str], Clean], mortal: Mortal
) -> None:
    expected, log = clean(name), here.parent / "calls"
    inputs = contents(*map(Path, INPUTS))
    prepare(expected)
    mortal.run(expected.job, here, 0, log)
    resumed = set()
    for k in range(1, 10 * expected.calls.made):
        prepare(expected)
        died = mortal.run(expected.job, here, k, log)
        damage(log)
        where = f"killed before call {k}"
        present = contents(Path(expected.job.output))
        between = not expected.job.flags and not present  # the old one is aside, for the moment between two renames
        assert present in (expected.old, expected.made) or between, where
        assert died or present == expected.made, "success was said before it was on the disk"
        kept = finished_files()
        again = taskvec(*expected.job.arguments)
        if again.code != 0:
            assert present == expected.made and "exists already" in again.err, f"{where}: {again}"
            for room in left_over(Path()):  # killed after the rename, it had no time to remove its folder
                shutil.rmtree(room)
        assert contents(Path(expected.job.output)) == expected.made, where
        assert not left_over(Path()), where
        assert contents(*map(Path, INPUTS)) == inputs, where
        if kept and again.code == 0 and present != expected.made:
            assert f"{len(kept)} of " in again.err and "taken from an interrupted run" in again.err, f"{where}: {again}"
            assert reused(kept, expected), where
        resumed.add(len(kept))
        if not died:
            break
    else:
        pytest.fail("the run never got through")
    assert k > expected.calls.made
    assert resumed == ({0, 1} if ".safetensors" in expected.job.output else set(range(SHARDS + 1)))


def finished_files() -> dict[str, int]:
    """The files that the journal of an ended run knows, and their inodes."""
    rooms = left_over(Path())
    names = [(room / journal.OUTPUT / name) for room in rooms for name in journal.read(room / "journal").finished]
    return {path.name: path.stat().st_ino for path in names if path.exists()}


def reused(kept: dict[str, int], expected: Clean) -> bool:
    """Whether those very files are in the output."""
    output = Path(expected.job.output)
    if output.is_file():
        return [output.stat().st_ino] == list(kept.values())
    return all((output / name).stat().st_ino == inode for name, inode in kept.items())
