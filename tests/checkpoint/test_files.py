from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskvec.checkpoint import files
from taskvec.checkpoint import system as seam
from taskvec.checkpoint.files import FileIdentity, InputFiles
from taskvec.errors import CheckpointError, SourceChangedError, TaskvecError

LINUX_CAP = 0x7FFFF000  # bytes that one read or write moves at most (man 2 read, NOTES)
CONTENT = bytes(range(256)) * 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def descriptor(source: Path) -> Iterator[int]:
    fd = os.open(source, os.O_RDWR)
    yield fd
    os.close(fd)


def pinned(path: Path) -> FileIdentity:
    status = path.stat()
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino)


def fails_with(number: int) -> Callable[..., Any]:
    def call(*args: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


# opening


def test_an_input_is_opened_for_reading_only(source: Path) -> None:
    fd = files.open_input(source)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    assert source.read_bytes() == CONTENT


def test_a_link_to_a_file_is_opened_as_the_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    fd = files.open_input(tmp_path / "link")
    try:
        assert files.identity(fd, source) == pinned(source)
    finally:
        os.close(fd)


def test_what_is_not_a_regular_file_is_refused_and_its_descriptor_closed(
    not_a_file: Any, tmp_path: Path, open_descriptors: Any
) -> None:
    _, make = not_a_file
    make(tmp_path / "thing")
    before = open_descriptors()
    with pytest.raises(CheckpointError, match="thing: "):
        files.open_input(tmp_path / "thing")
    assert open_descriptors() == before


def test_a_missing_permission_is_called_a_missing_permission(source: Path, unprivileged: Any) -> None:
    source.chmod(0)
    with unprivileged(), pytest.raises(CheckpointError) as caught:
        files.open_input(source)
    assert str(caught.value) == f"{source}: cannot open: Permission denied"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "f: cannot try: Input/output error"),
        (OSError("no number"), "f: cannot try: no number"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "f: cannot try: Disk quota exceeded. Free space, or name an output on",
        ),
    ],
)
def test_an_error_of_the_system_is_told_in_its_own_words(error: OSError, said: str) -> None:
    assert str(files.os_failure(error, "f", "cannot try")).startswith(said)


# reading


@pytest.mark.parametrize("most", [1, 3, 100, 1024])
def test_short_reads_are_continued_until_the_buffer_is_full(
    most: int, source: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, offsets = os.preadv, []

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        return real(fd, [buffers[0][:most]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = bytearray(1000)
    files.read_exact(descriptor, memoryview(buffer), 10, path=source)
    assert bytes(buffer) == CONTENT[10:1010]
    assert offsets == list(range(10, 1010, most))


def test_short_writes_are_continued_until_all_is_written(
    source: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    files.write_all(descriptor, memoryview(b"0123456789" * 5), 20, path=source)
    assert source.read_bytes() == CONTENT[:20] + b"0123456789" * 5 + CONTENT[70:]


@pytest.mark.parametrize("size", [LINUX_CAP - 1, LINUX_CAP, LINUX_CAP + 1, 3 << 30])
def test_more_than_two_gib_is_moved_in_calls_the_kernel_takes_whole(
    size: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = memoryview(np.zeros(size, np.uint8))  # never touched, so never backed by memory
    moved: list[tuple[str, int, int]] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        moved.append(("read", offset, len(buffers[0])))
        return min(len(buffers[0]), LINUX_CAP)

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        moved.append(("write", offset, len(data)))
        return min(len(data), LINUX_CAP)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(os, "pwrite", pwrite)
    files.read_exact(0, huge, 5, path=source)
    files.write_all(0, huge, 5, path=source)
    for kind in ("read", "write"):
        calls = [(offset, length) for what, offset, length in moved if what == kind]
        assert all(length <= LINUX_CAP for _, length in calls)
        assert [offset for offset, _ in calls] == [5 + sum(n for _, n in calls[:i]) for i in range(len(calls))]
        assert sum(length for _, length in calls) == size


def test_reading_past_the_end_says_where_the_file_ends_and_names_the_tensor(source: Path, descriptor: int) -> None:
    with pytest.raises(SourceChangedError) as caught:
        files.read_exact(descriptor, memoryview(bytearray(100)), 1000, path=source, tensor="layer.0")
    message = str(caught.value)
    assert message.startswith(f"{source}: tensor layer.0: the file ends at byte 1024, expected bytes up to 1100")
    assert "truncated" in message


def test_reading_to_the_very_end_is_not_past_it(source: Path, descriptor: int) -> None:
    buffer = bytearray(24)
    files.read_exact(descriptor, memoryview(buffer), 1000, path=source)
    assert bytes(buffer) == CONTENT[1000:]


def test_reading_nothing_makes_no_system_call(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", fails_with(errno.EIO))
    monkeypatch.setattr(os, "pwrite", fails_with(errno.EIO))
    files.read_exact(-1, memoryview(bytearray()), 0, path=source)
    files.write_all(-1, memoryview(b""), 0, path=source)


def test_a_read_error_of_the_disk_names_file_and_tensor(
    source: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", fails_with(errno.EIO))
    with pytest.raises(CheckpointError) as caught:
        files.read_exact(descriptor, memoryview(bytearray(8)), 0, path=source, tensor="w\n")
    assert str(caught.value) == f"{source}: cannot read: tensor w\\n: Input/output error"


def test_an_error_after_a_short_read_is_not_taken_for_success(
    source: Path, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([3, 0])
    monkeypatch.setattr(os, "preadv", lambda *args: next(answers))
    with pytest.raises(SourceChangedError, match="ends at byte 7, expected bytes up to 14"):
        files.read_exact(descriptor, memoryview(bytearray(10)), 4, path=source)


def test_a_small_file_is_read_whole_and_one_above_the_limit_not_at_all(source: Path, open_descriptors: Any) -> None:
    before = open_descriptors()
    assert files.read_bytes(source, 1024) == CONTENT
    with pytest.raises(CheckpointError, match=r"in\.safetensors: 1024 bytes, expected at most 1023"):
        files.read_bytes(source, 1023)
    assert open_descriptors() == before


# writing


def test_a_full_disk_is_named_with_what_to_do() -> None:
    path = Path("/dev/full")
    fd = os.open(path, os.O_WRONLY)
    try:
        with pytest.raises(TaskvecError) as caught:
            files.write_all(fd, memoryview(b"x"), 0, path=path)
    finally:
        os.close(fd)
    assert str(caught.value) == (
        "/dev/full: cannot write: No space left on device. Free space, or name an output on another disk"
    )


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        os.close(files.create_output(tmp_path / "out"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_new_file_never_replaces_one_that_is_there(source: Path) -> None:
    with pytest.raises(TaskvecError, match=r"in\.safetensors: cannot create: File exists"):
        files.create_output(source)
    assert source.read_bytes() == CONTENT


@pytest.mark.parametrize("target", ["in.safetensors", "absent", "out"])
def test_a_new_file_is_never_made_through_a_link(target: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(TaskvecError, match="out: cannot create: "):
        files.create_output(tmp_path / "out")
    assert source.read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["in.safetensors", "out"]


def test_a_new_file_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskvecError, match="cannot create: No such file or directory"):
        files.create_output(tmp_path / "absent" / "out")


def test_reserving_nothing_changes_nothing(descriptor: int, source: Path) -> None:
    files.reserve(descriptor, 0, path=source)
    assert source.read_bytes() == CONTENT


def test_reserving_keeps_what_is_written_already(descriptor: int, source: Path) -> None:
    files.reserve(descriptor, 1 << 16, path=source)
    assert source.read_bytes()[:1024] == CONTENT
    assert source.stat().st_size in (1024, 1 << 16)  # 1024 where the file system cannot reserve


class Libc:
    """A C library whose calls all fail with one error number."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.fallocate = self.renameat2 = self._fail

    def _fail(self, *args: object) -> int:
        ctypes.set_errno(self._number)
        return -1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_too_small_is_found_before_the_work(
    number: int, descriptor: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "_LIBC", Libc(number))
    with pytest.raises(TaskvecError, match=rf"in\.safetensors: cannot reserve 4096 bytes: {os.strerror(number)}"):
        files.reserve(descriptor, 4096, path=source)


@pytest.mark.parametrize("libc", [Libc(errno.ENOTSUP), Libc(errno.ENOSYS), object()], ids=["filesystem", "kernel", "libc"])
def test_a_system_that_cannot_reserve_is_no_error(
    libc: object, descriptor: int, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam, "_LIBC", libc)
    files.reserve(descriptor, 4096, path=source)
    assert source.read_bytes() == CONTENT


def test_more_than_any_disk_holds_cannot_be_reserved(descriptor: int, source: Path) -> None:
    with pytest.raises(TaskvecError, match="cannot reserve 1152921504606846976 bytes"):
        files.reserve(descriptor, 1 << 60, path=source)


def test_a_flush_that_fails_is_an_error(descriptor: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.sync(descriptor, path=source)
    monkeypatch.setattr(os, "fsync", fails_with(errno.EIO))
    with pytest.raises(TaskvecError, match=r"in\.safetensors: cannot flush to disk: Input/output error"):
        files.sync(descriptor, path=source)


def test_a_folder_is_flushed_and_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_descriptors: Any) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    before = open_descriptors()
    files.sync_folder(tmp_path)
    assert flushed == [tmp_path.stat().st_ino]
    assert open_descriptors() == before


# sharing blocks between files

BLOCK = 4096
LARGE = np.random.default_rng(0).bytes(5 * BLOCK)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int, Path]]:
    """A file of five blocks to share from, an empty one to share with, and the path of that."""
    (tmp_path / "from").write_bytes(LARGE)
    source, target = os.open(tmp_path / "from", os.O_RDONLY), files.create_output(tmp_path / "to")
    yield source, target, tmp_path / "to"
    os.close(source)
    os.close(target)


def reflinked(target: int, request: int, argument: bytes) -> None:
    """What the ioctl does, as its manual page has it: whole blocks, copied here."""
    source, start, nbytes, offset = struct.unpack("=qQQQ", argument)
    assert request == 0x4020940D
    assert start % BLOCK == nbytes % BLOCK == offset % BLOCK == 0 < nbytes
    os.pwrite(target, os.pread(source, nbytes, start), offset)


@pytest.mark.parametrize(
    ("start", "offset", "nbytes", "shared"),
    [
        (0, 0, 5 * BLOCK, (0, 5 * BLOCK)),
        (0, 0, BLOCK + 1, (0, BLOCK)),
        (10, BLOCK + 10, 3 * BLOCK, (BLOCK - 10, 3 * BLOCK - 10)),
        (BLOCK - 1, 2 * BLOCK - 1, BLOCK + 2, (1, BLOCK + 1)),
        (10, 10, BLOCK, (0, 0)),
        (1, 2, 3 * BLOCK, (0, 0)),
        (0, 0, BLOCK - 1, (0, 0)),
        (0, 0, 0, (0, 0)),
        (7, 7, 0, (0, 0)),
    ],
)
def test_whole_blocks_that_lie_alike_are_shared(
    start: int, offset: int, nbytes: int, shared: tuple[int, int], pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, path = pair
    monkeypatch.setattr(fcntl, "ioctl", reflinked)
    begin, end = files.share_range(source, target, start, offset, nbytes)
    assert (begin, end) == shared
    if end:
        assert path.read_bytes()[offset + begin : offset + end] == LARGE[start + begin : start + end]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSPC])
def test_where_blocks_cannot_be_shared_nothing_is_and_nothing_is_written(
    number: int, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, path = pair
    monkeypatch.setattr(fcntl, "ioctl", fails_with(number))
    assert files.share_range(source, target, 0, 0, 2 * BLOCK) == (0, 0)
    assert path.stat().st_size == 0


# renaming

SYSTEMS = [None, object(), Libc(errno.ENOSYS), Libc(errno.EINVAL), Libc(errno.ENOTSUP)]


@pytest.fixture(params=SYSTEMS, ids=["here", "old libc", "old kernel", "flags unknown", "not on this file system"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This system, and those without renameat2 or its flags."""
    if request.param is not None:
        monkeypatch.setattr(seam, "_LIBC", request.param)


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "f").write_text(content)
    return path


def test_a_folder_is_renamed_to_a_free_name(system: None, tmp_path: Path) -> None:
    files.rename_new(folder(tmp_path / "staging", "new"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "f").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "dangling link", "link to a folder"])
def test_renaming_never_replaces_what_is_there(system: None, kind: str, tmp_path: Path) -> None:
    staging, out = folder(tmp_path / "staging", "new"), tmp_path / "out"
    {
        "file": lambda: out.write_text("old"),
        "folder": lambda: folder(out, "old"),
        "empty folder": out.mkdir,
        "dangling link": lambda: out.symlink_to("absent"),
        "link to a folder": lambda: out.symlink_to("staging"),
    }[kind]()
    before = (out.lstat().st_ino, out.lstat().st_mode)
    with pytest.raises(FileExistsError) as caught:
        files.rename_new(staging, out)
    assert (out.lstat().st_ino, out.lstat().st_mode) == before
    assert (staging / "f").read_text() == "new"
    assert str(out) in str(caught.value)


def test_a_file_is_never_renamed_over_a_file(system: None, tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("new")
    (tmp_path / "out").write_text("old")
    with pytest.raises(FileExistsError):
        files.rename_new(tmp_path / "staging", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "old"


def test_an_error_of_the_rename_is_not_taken_for_an_old_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "_LIBC", Libc(errno.EACCES))
    monkeypatch.setattr(os, "rename", lambda *args: pytest.fail("fell back"))
    with pytest.raises(PermissionError):
        files.rename_new(tmp_path / "staging", tmp_path / "out")
    with pytest.raises(PermissionError):
        files.rename_exchange(tmp_path / "staging", tmp_path / "out", tmp_path / "aside")


def test_two_folders_swap_their_names(system: None, tmp_path: Path) -> None:
    staging, out = folder(tmp_path / "staging", "new"), folder(tmp_path / "out", "old")
    old = files.rename_exchange(staging, out, tmp_path / "aside")
    assert (out / "f").read_text() == "new"
    assert (old / "f").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == sorted(["out", old.name]) and old.name in ("staging", "aside")


def test_two_files_swap_their_names(system: None, tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("new")
    (tmp_path / "out").write_text("old")
    old = files.rename_exchange(tmp_path / "staging", tmp_path / "out", tmp_path / "aside")
    assert ((tmp_path / "out").read_text(), old.read_text()) == ("new", "old")


def test_a_swap_that_fails_leaves_the_old_one_under_its_name(system: None, tmp_path: Path) -> None:
    out = folder(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        files.rename_exchange(tmp_path / "absent", out, tmp_path / "aside")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "f").read_text() == "old"


def test_a_swap_with_nothing_is_refused(system: None, tmp_path: Path) -> None:
    staging = folder(tmp_path / "staging", "new")
    with pytest.raises(FileNotFoundError):
        files.rename_exchange(staging, tmp_path / "absent", tmp_path / "aside")
    assert os.listdir(tmp_path) == ["staging"]


# many inputs, few descriptors


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """120 files of 64 bytes, more than descriptors are kept; each filled with its own number."""
    paths = [tmp_path / f"{n:03}.safetensors" for n in range(120)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 64)
    return paths


def opened(paths: list[Path]) -> InputFiles:
    return InputFiles({path: pinned(path) for path in paths})


def byte_at(inputs: InputFiles, path: Path, offset: int = 0) -> int:
    buffer = bytearray(1)
    inputs.read(path, memoryview(buffer), offset, "t")
    return buffer[0]


def test_more_files_than_descriptors_are_read_and_all_are_closed(many: list[Path], open_descriptors: Any) -> None:
    before, most = open_descriptors(), 0
    inputs = opened(many)
    for turn in (many, many[::-1], many[::7]):
        for path in turn:
            assert byte_at(inputs, path, 63) == int(path.stem)
            most = max(most, open_descriptors() - before)
    assert most == 32
    inputs.close()
    assert open_descriptors() == before


def test_the_files_used_last_stay_open(many: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, real, reopened = opened(many), files.open_input, []

    def open_input(path: Path) -> int:
        reopened.append(path)
        return real(path)

    monkeypatch.setattr(files, "open_input", open_input)
    for path in many[:32]:
        byte_at(inputs, path)
    byte_at(inputs, many[0])  # now the one used last
    byte_at(inputs, many[32])  # one too many: the one used longest ago goes
    assert reopened == many[:33]
    byte_at(inputs, many[0])
    assert reopened == many[:33]
    byte_at(inputs, many[1])
    assert reopened == [*many[:33], many[1]]
    inputs.close()


def test_a_file_being_read_is_not_closed_for_another(many: list[Path], open_descriptors: Any) -> None:
    before = open_descriptors()
    inputs = opened(many)
    with inputs.reading(many[0]) as fd:
        for path in many[1:]:
            byte_at(inputs, path)
        assert os.pread(fd, 1, 0) == b"\0"
    with inputs.reading(many[1]) as first, inputs.reading(many[1]) as second:
        assert first == second
    inputs.close()
    assert open_descriptors() == before


def test_more_files_than_descriptors_may_be_held_at_once(many: list[Path], open_descriptors: Any) -> None:
    inputs, before = opened(many), open_descriptors()
    held = [inputs.reading(path) for path in many[:50]]
    fds = [block.__enter__() for block in held]
    assert [os.pread(fd, 1, 5)[0] for fd in fds] == list(range(50))
    for block in held:
        block.__exit__(None, None, None)
    byte_at(inputs, many[60])
    assert open_descriptors() - before <= 32
    inputs.close()


def test_many_threads_read_many_files_without_mixing_them_up(many: list[Path], open_descriptors: Any) -> None:
    before, inputs, start = open_descriptors(), opened(many), threading.Barrier(6)

    def work(seed: int) -> bool:
        start.wait()
        order = random.Random(seed).choices(many, k=300)
        return all(byte_at(inputs, path, seed) == int(path.stem) for path in order)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))
    inputs.close()
    assert open_descriptors() == before


def test_an_error_while_reading_does_not_keep_the_file_open(many: list[Path]) -> None:
    inputs = opened(many)
    for _ in range(3):
        with pytest.raises(SourceChangedError):
            byte_at(inputs, many[0], 64)
    for path in many[1:40]:
        byte_at(inputs, path)
    assert many[0] not in inputs._open
    inputs.close()


# inputs that change under a run


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def grow_quietly(path: Path) -> None:
    status = path.stat()
    grow(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(path: Path) -> None:
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(1, 1))  # so that a coarse clock cannot hide it


def replace(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(CONTENT)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [truncate, grow, grow_quietly, rewrite, replace])
def test_a_file_that_changed_since_its_header_was_read_is_refused_and_stays_refused(
    change: Callable[[Path], None], source: Path, open_descriptors: Any
) -> None:
    inputs, before = opened([source]), open_descriptors()
    change(source)
    for _ in range(2):
        with pytest.raises(SourceChangedError, match=r"in\.safetensors: changed .*: found \d+ bytes, expected 1024 "):
            byte_at(inputs, source)
    assert open_descriptors() == before


@pytest.mark.parametrize("change", [truncate, grow, grow_quietly, rewrite])
def test_a_file_that_changes_while_it_is_open_is_found_before_the_commit(
    change: Callable[[Path], None], source: Path
) -> None:
    inputs = opened([source])
    byte_at(inputs, source)
    inputs.check_unchanged()
    change(source)
    with pytest.raises(SourceChangedError, match="changed during the run"):
        inputs.check_unchanged()
    inputs.close()


def test_a_file_truncated_while_it_is_open_is_an_error_and_no_bus_error(source: Path) -> None:
    inputs = opened([source])
    assert byte_at(inputs, source, 1000) == CONTENT[1000]
    os.truncate(source, 500)
    with pytest.raises(SourceChangedError, match=r"in\.safetensors: tensor t: the file ends at byte 500, expected .* 1001"):
        byte_at(inputs, source, 1000)
    inputs.close()


def test_a_file_that_vanished_is_named(source: Path) -> None:
    inputs = opened([source])
    source.unlink()
    with pytest.raises(CheckpointError, match=r"in\.safetensors: cannot open: No such file"):
        inputs.check_unchanged()


def test_a_file_that_nothing_is_expected_of_is_read(source: Path) -> None:
    inputs = InputFiles({})
    assert byte_at(inputs, source, 3) == 3
    inputs.check_unchanged()
    inputs.close()
