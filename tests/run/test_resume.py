"""A run that was ended goes on where it was, with files that still are what it wrote, if it is the same run of the same
inputs; and never in the way of one that lives. Ends at any system call are in tests/faults.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import taskvec as tv
from taskvec.checkpoint import files, system
from taskvec.run import edited, journal, output, record, staging, stream
from taskvec.run.output import Target

from .checkpoints import write_model

SHARDS = 4
FINISHED = 2  # before the run ends
FIRST = "model-00001-of-00004.safetensors"
LAST = f"model-{FINISHED + 1:05d}-of-{SHARDS:05d}.safetensors"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base` in four shards, `old`, `lora` and a mask."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layers.{n}.weight": torch.randn(8, 16, generator=generator) for n in range(SHARDS)}
    write_model(tmp_path / "base", tensors, SHARDS)
    write_model(tmp_path / "old", {name: t + torch.randn(8, 16, generator=generator) for name, t in tensors.items()})
    save_file({name: torch.rand(8, 16, generator=generator) for name in tensors}, tmp_path / "mask.safetensors")
    pairs = {"lora_A": (2, 16), "lora_B": (8, 2)}
    lora = {
        f"base_model.model.{n[:-7]}.{x}.weight": torch.randn(s, generator=generator)
        for n in tensors
        for x, s in pairs.items()
    }
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    write_config(tmp_path, lora_alpha=4)
    return tmp_path


def write_config(here: Path, **settings: object) -> None:
    (here / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **settings}))


def subtract(output: str = "out", old: object = "old", alpha: float = 0.3, **options: object) -> tv.Report:
    return tv.subtract("base", old, alpha=alpha, output=output, **{"fsync": False, "jobs": 1, **options})


def masked() -> tv.TaskVector:
    return tv.TaskVector.between("base", "old").masked("mask.safetensors")


@contextmanager
def ended_at(name: str) -> Iterator[None]:
    """The run fails when it begins to write that file."""
    write = files.write_all

    def failing(fd: int, data: memoryview, offset: int, *, path: Path) -> None:
        if path.name == name:
            raise tv.OutputError("the end")
        write(fd, data, offset, path=path)

    files.write_all = failing
    try:
        yield
    finally:
        files.write_all = write


def leave(output: str = "out", *, at: str = LAST, **options: object) -> Path:
    """A run that ends with two of four files finished; the folder that it leaves."""
    with ended_at(at), pytest.raises(tv.OutputError, match="the end") as caught:
        subtract(output, **options)
    (room,) = rooms(Path())
    assert f"{FINISHED} of {SHARDS} files finished and kept in {room}; the same command" in str(caught.value.hint)
    return room


def rooms(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if "taskvec-partial" in path.name]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def expect(output: str = "out", **options: object) -> dict[str, bytes]:
    """What the command makes when nothing ever happened, made in another folder of the same depth."""
    shutil.move(output, "set-aside")
    try:
        subtract(output, **options)
        return contents(Path(output))
    finally:
        shutil.rmtree(output)
        shutil.move("set-aside", output)


# --- the same run ------------------------------------------------------------------------------------------------------


def test_finished_files_are_the_very_files_of_the_output_and_nothing_tells_the_two_apart(here: Path) -> None:
    room = leave()
    kept = {path.name: path.stat().st_ino for path in (room / "output").iterdir()}
    assert len(kept) == FINISHED
    report = subtract()
    assert [(here / "out" / name).stat().st_ino for name in kept] == list(kept.values())
    assert report.notes == (f"{FINISHED} of {SHARDS} files taken from an interrupted run, and checked",)
    shard = (here / "out" / FIRST).stat().st_size
    whole = subtract("whole")
    assert whole.bytes_written - report.bytes_written == FINISHED * shard
    assert report.bytes_read == whole.bytes_read // 2 + FINISHED * shard  # of those, only to check them
    assert report.changes == subtract("again").changes and report.tensors == subtract("again2").tensors
    assert contents(here / "out") == expect() and not rooms(here)


def test_it_goes_on_after_several_ends(here: Path) -> None:
    leave()
    with ended_at(f"model-{SHARDS:05d}-of-{SHARDS:05d}.safetensors"), pytest.raises(tv.OutputError) as caught:
        subtract()
    assert f"3 of {SHARDS} files finished" in str(caught.value.hint)
    assert subtract().notes[0].startswith(f"3 of {SHARDS} files")
    assert contents(here / "out") == expect()


def test_how_it_goes_may_be_another(here: Path) -> None:
    leave()
    assert subtract(jobs=3, memory="1GB", fsync=True).notes
    assert contents(here / "out") == expect()


def test_an_adapter_goes_on_too(here: Path) -> None:
    leave(old="lora")
    assert subtract(old="lora").notes
    assert contents(here / "out") == expect(old="lora")


def test_a_large_vector_goes_on_too(here: Path) -> None:
    vector = tv.TaskVector.between("base", "old")
    with ended_at("vector-00003-of-00004.safetensors"), pytest.raises(tv.OutputError, match="the end"):
        vector.save("v", max_shard_size=600, jobs=1)
    assert rooms(here)
    assert vector.save("v", max_shard_size=600, jobs=1).notes[0].startswith("2 of 4 files")
    vector.save("w", max_shard_size=600)
    assert contents(here / "v") == contents(here / "w") and not rooms(here)


def test_the_old_output_stands_until_the_new_one_is_whole(here: Path) -> None:
    subtract(alpha=1)
    before = contents(here / "out")
    leave(overwrite=True)
    assert contents(here / "out") == before
    assert subtract(overwrite=True).notes
    assert contents(here / "out") == expect() and not rooms(here)


def test_space_that_the_ended_run_holds_is_not_asked_for_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = leave()
    blocks = sum(path.stat().st_blocks * 512 for path in room.rglob("*") if path.is_file())
    usage = shutil.disk_usage(here)
    planned = (tv.Checkpoint.open("base") - 0.3 * tv.TaskVector.between("base", "old")).plan().bytes_to_write
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=planned - blocks))
    assert subtract().notes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=planned - 1))
    with pytest.raises(tv.NotEnoughDiskError):
        subtract("elsewhere")


# --- another run, other inputs, other files ----------------------------------------------------------------------------


def _touch(here: Path) -> None:
    os.utime(here / "old" / "model.safetensors", ns=(1, 1))


def _put_back_in_time(here: Path) -> None:
    """Other content of the same size and modification time, as `cp -p` makes it."""
    path = here / "old" / "model.safetensors"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


def _change_base(here: Path) -> None:
    path = here / "base" / "model-00001-of-00004.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("change", [_touch, _put_back_in_time, _change_base])
def test_inputs_that_changed_since_are_never_mixed(change: Callable[[Path], None], here: Path) -> None:
    leave()
    change(here)
    (note,) = subtract().notes
    assert note == "an interrupted run left 2 finished files, not used: its inputs changed since"
    assert contents(here / "out") == expect() and not rooms(here)


@pytest.mark.parametrize(
    "options", [{"alpha": 0.4}, {"old": "lora"}, {"out_dtype": "bfloat16"}, {"exclude": ["layers.0.*"]}, {"sha256": True}]
)
def test_another_command_does_not_use_what_this_one_left(options: dict[str, object], here: Path) -> None:
    leave()
    (note,) = subtract(**options).notes
    assert note == "an interrupted run left 2 finished files, not used: it was another one"
    assert contents(here / "out") == expect(**options) and not rooms(here)


def test_another_scale_of_the_adapter_is_another_run(here: Path) -> None:
    leave(old="lora")
    write_config(here, lora_alpha=8)
    assert "not used" in subtract(old="lora").notes[0]
    assert contents(here / "out") == expect(old="lora")


def test_another_mask_is_another_run(here: Path) -> None:
    leave(old=masked())
    save_file({n: t / 2 for n, t in load_file(here / "mask.safetensors").items()}, here / "mask.safetensors")
    assert "not used" in subtract(old=masked()).notes[0]
    assert contents(here / "out") == expect(old=masked())


@pytest.mark.parametrize("version", ["taskvec", "numpy"])
def test_another_version_computes_everything_itself(version: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave()
    monkeypatch.setattr(*{"taskvec": (record, "__version__"), "numpy": (np, "__version__")}[version], "0")
    assert "not used" in subtract().notes[0]


def test_another_processor_computes_everything_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(old="lora")
    monkeypatch.setattr(journal, "_processor", lambda: "another")
    assert "not used" in subtract(old="lora").notes[0]


def test_side_files_are_those_of_now(here: Path) -> None:
    leave()
    (here / "base" / "tokenizer.json").write_text('{"new": 1}')
    assert subtract().notes[0].startswith("2 of 4")
    assert (here / "out" / "tokenizer.json").read_text() == '{"new": 1}'


def test_another_config_may_mean_another_layout_and_is_another_run(here: Path) -> None:
    leave(old="lora")
    (here / "base" / "config.json").write_text('{"model_type": "gpt2", "dtype": "bfloat16"}')
    assert "not used: its inputs changed since" in subtract(old="lora").notes[0]
    assert contents(here / "out") == expect(old="lora")


def alike(folder: Path, shift: int) -> None:
    """A fine-tune with the header of `old`, and other numbers."""
    folder.mkdir(parents=True)
    tensors = {name: t + shift for name, t in load_file("old/model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def swapped(here: Path) -> dict[str, tuple[Callable[[], tv.Report], Callable[[], tv.Report]]]:
    """Two runs of which each file has another part, under the same names."""
    alike(here / "x" / "ft", 1)
    alike(here / "y" / "ft", 2)
    x, y, base = "x/ft", "y/ft", tv.Checkpoint.open("base")
    one, two = tv.TaskVector.between("base", x), tv.TaskVector.between("base", y)
    return {
        "tuned and its base": (lambda: subtract(old=x, base=y), lambda: subtract(old=y, base=x)),
        "two vectors": (
            lambda: (base + 0.1 * one + 0.9 * two).save("out", jobs=1),
            lambda: (base + 0.1 * two + 0.9 * one).save("out", jobs=1),
        ),
    }


@pytest.mark.parametrize("case", ["tuned and its base", "two vectors"])
def test_the_same_files_in_other_parts_are_another_run(case: str, here: Path) -> None:
    first, second = swapped(here)[case]
    with ended_at(LAST), pytest.raises(tv.OutputError, match="the end"):
        first()
    assert "not used" in second().notes[0]
    made = contents(here / "out")
    shutil.rmtree("out")
    second()
    assert contents(here / "out") == made


def test_folders_that_changed_their_names_are_other_inputs(here: Path) -> None:
    alike(here / "third", 1)
    leave(base="third")
    for source, target in (("old", "temporary"), ("third", "old"), ("temporary", "third")):
        os.rename(source, target)
    assert "not used" in subtract(base="third").notes[0]


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit of the header": lambda room: _flip(room / "output" / FIRST, 12),
    "the first byte of data": lambda room: _flip(room / "output" / FIRST, -512),
    "the last byte": lambda room: _flip(room / "output" / FIRST, -1),
    "truncated": lambda room: os.truncate(room / "output" / FIRST, 500),
    "longer": lambda room: os.truncate(room / "output" / FIRST, 5000),
    "missing": lambda room: (room / "output" / FIRST).unlink(),
    "a link": lambda room: _link(room / "output" / FIRST),
    "a link to the same content": lambda room: _link(room / "output" / FIRST, flip=False),
    "a folder": lambda room: _folder(room / "output" / FIRST),
    "its line": lambda room: _flip(room / "journal", -100),
}


def _link(path: Path, *, flip: bool = True) -> None:
    """To a file outside the folder of the run, which gets another name when a run goes on from it."""
    elsewhere = path.resolve().parents[2] / "elsewhere"
    path.rename(elsewhere)
    if flip:
        _flip(elsewhere, -1)
    path.symlink_to(elsewhere)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_file_that_is_not_what_was_written_is_made_again(damage: str, here: Path) -> None:
    DAMAGES[damage](leave())
    notes = subtract().notes
    assert notes in (("1 of 4 files taken from an interrupted run, and checked",), ())
    assert contents(here / "out") == expect() and not rooms(here)
    assert not [path for path in (here / "out").iterdir() if path.is_symlink()]


def test_every_cut_of_a_journal_is_read_up_to_its_last_whole_line(here: Path) -> None:
    content = (leave() / "journal").read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 1 + FINISHED
    for size in range(len(content) + 1):
        (here / "cut").write_bytes(content[:size])
        left = journal.read(here / "cut")
        whole = sum(end <= size for end in ends)
        assert (left.identity is not None, len(left.finished)) == (whole >= 1, max(0, whole - 1))
        assert left.nbytes == max((end for end in ends if end <= size), default=0)


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage\n", b"\x00" * 100, b"[]", b"0 {}\n"])
def test_a_journal_that_says_nothing_is_no_journal(content: bytes, here: Path) -> None:
    (leave() / "journal").write_bytes(content)
    assert subtract().notes == ()
    assert contents(here / "out") == expect() and not rooms(here)


def test_foreign_files_in_the_folder_of_an_ended_run_do_not_get_into_the_output(here: Path) -> None:
    room = leave()
    (room / "output" / "evil.py").write_text("evil")
    (room / "output" / "sub").mkdir()
    (room / "output" / "taskvec.json").write_text("{}")
    assert subtract().notes
    assert contents(here / "out") == expect()


def test_several_ended_runs_one_is_used_and_all_are_gone(here: Path) -> None:
    room = leave()
    shutil.copytree(room, room.with_name(room.name[:-8] + "ffffffff"))
    leave_other = rooms(here)
    assert len(leave_other) == 2
    assert subtract().notes and not rooms(here)
    assert contents(here / "out") == expect()


def test_runs_for_other_outputs_are_left_alone(here: Path) -> None:
    room = leave("out")
    subtract("ou")
    subtract("out.safetensors")
    assert rooms(Path()) == [room]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_only_folders_are_taken_for_runs(kind: str, here: Path) -> None:
    other = here / "mine"
    other.mkdir()
    (other / "precious").write_text("1")
    name = here / ".out.taskvec-partial-00000000"
    name.symlink_to(other) if kind == "link" else name.write_text("mine too")
    subtract()
    assert (other / "precious").read_text() == "1" and os.path.lexists(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_touched(here: Path) -> None:
    room = leave()
    os.chown(room, 12345, -1)
    assert subtract().notes == () and rooms(Path()) == [room]


def test_nothing_finished_is_nothing_kept(here: Path) -> None:
    with ended_at("model-00001-of-00004.safetensors"), pytest.raises(tv.OutputError) as caught:
        subtract()
    assert not rooms(here) and "kept" not in str(caught.value.hint)


def test_the_folder_is_for_its_user_alone_until_it_is_done(here: Path) -> None:
    assert stat.S_IMODE((leave() / "lock").stat().st_mode) & 0o077 == 0


# --- runs that live ----------------------------------------------------------------------------------------------------


def test_a_run_that_lives_is_left_alone_and_the_other_says_so(here: Path) -> None:
    room = leave()
    before = contents(room)
    with open(room / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in ({}, {"alpha": 0.5}, {"overwrite": True}):
            with pytest.raises(tv.OutputExistsError, match="out: another run is making it") as caught:
                subtract(**options)
            assert caught.value.exit_code == 1
        assert contents(room) == before and rooms(Path()) == [room]
    assert subtract().notes


def test_where_there_are_no_locks_a_folder_may_be_of_a_run_that_lives_and_is_left_alone(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = leave()

    class NoLocks(system.Calls):
        def flock(self, fd: int, operation: int) -> None:
            raise OSError(95, "no locks here")

    monkeypatch.setattr(system, "calls", NoLocks())
    (note,) = subtract().notes
    assert note.startswith(f"{room} is left alone") and rooms(Path()) == [room]


def test_an_output_that_another_run_replaced_meanwhile_is_put_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subtract(alpha=1)
    theirs = {"taskvec.json": b"theirs"}

    def replace_then(self: staging.Staging) -> None:
        shutil.rmtree("out")
        Path("out").mkdir()
        Path("out/taskvec.json").write_bytes(b"theirs")
        commit(self)

    commit = staging.Staging.commit
    monkeypatch.setattr(staging.Staging, "commit", replace_then)
    with pytest.raises(tv.OutputExistsError, match="out: was changed after this run began; it is left as it is"):
        subtract(overwrite=True)
    assert contents(here / "out") == theirs and not rooms(here)


def test_of_many_runs_into_one_output_one_wins_and_nothing_is_mixed(here: Path) -> None:
    alphas = [0.1 * n for n in range(1, 7)]
    command = [sys.executable, "-m", "taskvec", "subtract", "base", "old", "-q", "-o", "out", "--alpha"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = [subprocess.Popen([*command, str(alpha)], **pipes) for alpha in alphas]
    ends = [(process.communicate(), process.returncode) for process in running]
    codes = [code for _, code in ends]
    assert codes.count(0) == 1 and codes.count(1) == len(alphas) - 1
    for (out, err), code in ends:
        assert code == 0 or (out == "" and err.startswith("taskvec: out: ") and err.count("\n") == 1)
    won = alphas[codes.index(0)]
    assert contents(here / "out") == expect(alpha=won) and not rooms(here)


def test_a_run_whose_folder_went_before_it_was_locked_makes_another(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, lock = Target.of("out"), files.lock
    taken = []

    def after_another(fd: int) -> bool | None:
        if not taken:
            taken.append(True)
            with staging.Staging(target, fsync=False):  # which takes the folder for one of a run that has ended
                pass
        return lock(fd)

    monkeypatch.setattr(files, "lock", after_another)
    with staging.Staging(target, fsync=False) as made:
        assert made.path.is_dir() and rooms(Path()) == [made.path.parent]
    assert taken and not rooms(here)


def test_a_run_whose_folder_another_one_locked_first_makes_another(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = files.lock, []

    def after_another(fd: int) -> bool | None:
        if taken:
            return lock(fd)
        taken.append(rooms(here)[0])
        with open(taken[0] / "lock") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            return lock(fd)

    monkeypatch.setattr(files, "lock", after_another)
    with staging.Staging(Target.of("out"), fsync=False) as made:
        assert made.path.parent.name != taken[0].name.removesuffix(".new")
    assert not rooms(here)


def test_a_folder_without_a_lock_is_of_no_run_that_could_go_on(here: Path) -> None:
    (leave() / "lock").unlink()
    assert subtract().notes == () and not rooms(here)
    assert contents(here / "out") == expect()


def test_a_folder_that_is_being_removed_does_not_stay(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run sees the folder of another one after its lock was removed, and before the folder is."""
    target = Target.of("out")
    remove, seen = shutil.rmtree, []

    def slowly(path: Path, **options: Any) -> None:
        if (path / "lock").exists() and not seen:
            (path / "lock").unlink()
            seen.append(True)
            with staging.Staging(target, fsync=False):
                pass
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", slowly)
    with staging.Staging(target, fsync=False):
        pass
    assert seen and not rooms(here)


def test_an_output_that_was_made_meanwhile_is_seen_before_any_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with staging.Staging(Target.of("out"), fsync=False) as first:
        first.write("a", b"")
        first.commit()
    monkeypatch.setattr(stream, "execute", lambda *given: pytest.fail("it worked for nothing"))
    monkeypatch.setattr(edited, "check_target", lambda *given: None)  # looked before it was there
    with pytest.raises(tv.OutputExistsError, match="appeared after this run began"):
        subtract()
    assert contents(here / "out") == {"a": b""} and not rooms(here)


def test_what_runs_hold_is_counted_while_they_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = leave()
    expected = sum(path.stat().st_blocks * 512 for path in room.rglob("*") if path.is_file())
    assert output.held(Target.of("out")) == expected > 0
    lstat = os.lstat

    def gone(path: Any) -> os.stat_result:
        if str(path).endswith((".safetensors", "journal")):
            raise FileNotFoundError(path)
        return lstat(path)

    monkeypatch.setattr(os, "lstat", gone)
    assert 0 <= output.held(Target.of("out")) < expected


# --- what a second reading found ---------------------------------------------------------------------------------------


def test_a_link_in_place_of_the_output_in_the_making_leads_nowhere(here: Path) -> None:
    room = leave()
    shutil.move(room / "output", here / "precious")
    (here / "precious" / "mine").write_text("1")
    (room / "output").symlink_to(here / "precious")
    before = contents(here / "precious")
    subtract()
    assert contents(here / "precious") == before and not (here / "out").is_symlink()
    assert contents(here / "out") == expect() and not rooms(here)


@pytest.mark.parametrize("name", ["lock", "journal"])
@pytest.mark.parametrize("kind", ["a link", "a folder", "a pipe"])
def test_what_only_looks_like_the_folder_of_a_run_is_in_nobody_s_way(name: str, kind: str, here: Path) -> None:
    path = leave() / name
    path.unlink()
    {"a link": lambda: path.symlink_to(here / "base"), "a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path)}[kind]()
    subtract()
    assert contents(here / "out") == expect()


def test_a_journal_that_nests_without_end_is_no_journal(here: Path) -> None:
    text = b"[" * 200_000
    (leave() / "journal").write_bytes(xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n")
    assert subtract().notes == () and not rooms(here)


def set_aside(here: Path) -> dict[str, bytes]:
    """As a run leaves it that was killed between two renames: the old output in its folder, and none in its place."""
    room = leave(overwrite=True)
    (here / "out").rename(room / "replaced")
    return contents(room / "replaced")


def test_an_old_output_that_was_set_aside_is_brought_back_by_whatever_comes_next(here: Path) -> None:
    subtract(alpha=1)
    before = set_aside(here)
    with pytest.raises(tv.OutputExistsError, match="out: was set aside by a run that was killed, and is back"):
        subtract(alpha=0.5)
    assert contents(here / "out") == before


def test_it_is_brought_back_before_anything_can_fail(here: Path) -> None:
    subtract(alpha=1)
    before = set_aside(here)
    with ended_at(FIRST), pytest.raises(tv.OutputError, match="the end"):
        subtract(alpha=0.5, overwrite=True)
    assert contents(here / "out") == before and not rooms(here)


def test_it_is_brought_back_though_the_lock_beside_it_is_gone(here: Path) -> None:
    subtract(alpha=1)
    before = set_aside(here)
    (rooms(here)[0] / "lock").unlink()
    with pytest.raises(tv.OutputExistsError, match="is back"):
        subtract(alpha=0.5)
    assert contents(here / "out") == before and not rooms(here)


def test_what_is_put_there_in_the_last_moment_before_the_exchange_is_put_back(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subtract(alpha=1)
    exchange, done = files.rename_exchange, []

    def late(source: Path, target: Path, aside: Path) -> Path:
        if not done:
            shutil.move("out", "away")
            shutil.copytree("away", "out")
            (target / "theirs").write_text("1")
        done.append(contents(target))
        return exchange(source, target, aside)

    monkeypatch.setattr(files, "rename_exchange", late)
    with pytest.raises(tv.OutputExistsError, match="it is left as it is"):
        subtract(overwrite=True)
    assert contents(here / "out") == done[0] and not rooms(here)


def test_a_file_that_was_put_into_the_old_output_during_the_run_is_not_lost(here: Path) -> None:
    (here / "base" / "sub").mkdir()
    (here / "base" / "sub" / "vocab.txt").write_text("a")
    subtract(alpha=1)
    before = contents(here / "out")
    with pytest.raises(tv.OutputExistsError, match="it is left as it is"):
        subtract(overwrite=True, shard_done=lambda shard: Path("out/sub/notes.md").write_text("mine"))
    assert contents(here / "out") == {**before, "sub/notes.md": b"mine"} and not rooms(here)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_a_block_whichever_thread_gets_it(number: signal.Signals) -> None:
    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before, steps = signal.signal(number, handler), []
    another = threading.Thread(target=time.sleep, args=(0.3,))
    another.start()
    try:
        with pytest.raises(KeyboardInterrupt), staging.uninterrupted():
            signal.pthread_kill(another.ident or 0, number)
            time.sleep(0.1)
            steps.append("to its end")
        assert steps and signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
        another.join()


def test_a_process_that_was_forked_does_not_hold_the_folder_for_longer(here: Path) -> None:
    children: list[int] = []

    def fork(finished: object) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            time.sleep(20)
            os._exit(0)
        raise tv.OutputError("the end")

    with pytest.raises(tv.OutputError, match="the end"):
        subtract(shard_done=fork)
    try:
        assert len(rooms(here)) == 1
        assert subtract().notes
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_indices_links_and_records_that_are_not_ours_are_not_overwritten(here: Path) -> None:
    subtract()
    (here / "out" / "mine.safetensors.index.json").write_text("{}")
    with pytest.raises(tv.OutputExistsError, match=r"mine\.safetensors\.index\.json"):
        subtract(overwrite=True)
    (here / "out" / "mine.safetensors.index.json").unlink()
    (here / "out" / "link").symlink_to(here / "base")
    with pytest.raises(tv.OutputExistsError, match="link"):
        subtract(overwrite=True)
    (here / "out" / "link").unlink()
    subtract(overwrite=True)
    (here / "hand").mkdir()
    (here / "hand" / "taskvec.json").write_text("{}")
    with pytest.raises(tv.OutputExistsError, match="not made by taskvec"):
        subtract("hand", overwrite=True)
