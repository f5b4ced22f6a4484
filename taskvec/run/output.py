"""The output: refused before a byte is written if it cannot be made, built in a staging folder beside its name, and put
there by one rename. Killed at any moment, it is absent or complete; what remains is a staging folder that says so.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import files
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.folder import SideFile
from ..checkpoint.header import read_header
from ..checkpoint.locate import read_json
from ..delta.stored import METADATA_KEY
from ..errors import (
    CheckpointError,
    NotEnoughDiskError,
    OutputError,
    OutputExistsError,
    OutputOverlapError,
    SourceChangedError,
    UsageError,
    listing,
    show,
)

RECORD = "taskvec.json"  # in an output folder; a single output file has METADATA_KEY in its `__metadata__` instead
_COPIED = 1 << 20  # bytes per read when a side file is copied


class Target(NamedTuple):
    """Where the output goes: a folder, or one file when the name ends in `.safetensors`."""

    path: Path
    single_file: bool
    typed: str  # as the user wrote it: what messages say

    @classmethod
    def of(cls, output: str | os.PathLike[str]) -> Target:
        path = Path(os.path.abspath(os.path.expanduser(output)))  # not Path's own: that one raises for a ~user unknown here
        if not str(output).strip() or path.name == "":
            raise UsageError(f"output {show(output)!r} is not a name for a folder or file")
        if "://" in str(output):
            raise UsageError(f"output {show(output)}: a folder or file here", hint="--push org/name sends it to the Hub")
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf"):
            raise UsageError(f"output {show(output)}: taskvec writes safetensors", hint="Name a folder or x.safetensors")
        return cls(path, path.suffix == ".safetensors", os.fspath(output))


def check_target(target: Target, inputs: Iterable[Checkpoint], overwrite: bool) -> None:
    """Raises OutputOverlapError when the output is, holds or lies in an input, also with `overwrite`;
    OutputExistsError when something is there and may not be replaced; OutputError when no folder can be there."""
    for checkpoint in inputs:
        _check_overlap(target, checkpoint)
    if Path(os.path.normpath(target.typed)).name in ("", ".."):
        raise UsageError(f"output {show(target.typed)!r} is not a name", hint="Name a folder that is not the one you are in")
    if not os.path.lexists(target.path):
        above = next(parent for parent in target.path.parents if os.path.lexists(parent))
        if not above.is_dir():
            raise OutputError(f"{show(target.typed)}: {show(above.name)} is not a folder", hint="Name an output elsewhere")
        return
    if not overwrite:
        raise OutputExistsError(f"{show(target.typed)}: exists already", hint="Name another output, or allow --overwrite")
    if target.path.is_symlink() or target.path.is_dir() == target.single_file:
        kind = "a link" if target.path.is_symlink() else "a folder" if target.path.is_dir() else "a file"
        raise OutputExistsError(
            f"{show(target.typed)}: is {kind}, which --overwrite does not replace", hint="Remove it first"
        )
    foreign = [] if target.single_file else _foreign_files(target.path)
    if foreign:
        raise OutputExistsError(
            f"{show(target.typed)}: holds what taskvec did not make ({listing(foreign)}), and --overwrite would delete it",
            hint="Move it away, or name another output",
        )
    if not _made_by_taskvec(target):
        raise OutputExistsError(
            f"{show(target.typed)}: not made by taskvec (no record in it), and --overwrite would delete it",
            hint="Remove it yourself, or name another output",
        )


def _foreign_files(folder: Path) -> list[str]:
    """Files of an output folder that its record does not list; none when it has no record."""
    if not (folder / RECORD).is_file():
        return []
    content = read_json(folder / RECORD)
    own = {RECORD, "README.md", *map(str, content.get("side_files") or [])}
    own |= {str(shard.get("name")) for shard in content.get("shards") or [] if isinstance(shard, dict)}
    present = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    return [name for name in present if name not in own and not name.endswith(".safetensors.index.json")]


def _made_by_taskvec(target: Target) -> bool:
    if target.single_file:
        try:
            return METADATA_KEY in read_header(target.path).metadata
        except CheckpointError:
            return False
    return (target.path / RECORD).is_file() or not os.listdir(target.path)


def check_space(target: Target, needed: int, downloads: Mapping[Path, int] | None = None) -> None:
    """Raises NotEnoughDiskError when the disk of the output has less than `needed` bytes free, or the one of the Hub's cache
    less than the `downloads` take; together, if they are one disk."""
    parent = _standing(target.path.parent)
    if downloads:
        cache, size = _standing(next(iter(downloads)).parent), sum(downloads.values())
        if os.stat(cache).st_dev == os.stat(parent).st_dev:
            needed += size
        elif shutil.disk_usage(cache).free < size:
            raise NotEnoughDiskError(
                f"the cache of the Hub: {size} bytes are needed, {shutil.disk_usage(cache).free} are free",
                hint="Free space there, or set HF_HOME to a folder on another disk",
            )
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise NotEnoughDiskError(
            f"{show(target.typed)}: {needed} bytes are needed, {free} are free",
            hint="Free space, or name an output on another disk",
        )


def _standing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


class Staging:
    """A folder beside the target that becomes it. As a context manager: removed unless committed."""

    def __init__(self, target: Target, *, fsync: bool) -> None:
        self._target = target
        self._fsync = fsync
        name = f".{target.path.name}.taskvec-partial-{secrets.token_hex(4)}"
        # as the user wrote it: messages name files in it, and absolute paths are nobody's business
        self.path = Path(os.path.normpath(os.path.expanduser(target.typed))).parent / name

    def __enter__(self) -> Staging:
        above = self._target.path.parent
        self._new_parents = [folder for folder in (above, *above.parents) if not folder.exists()]
        try:
            above.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except OSError as error:
            raise files.os_failure(error, self._target.typed, "cannot create the output there", OutputError) from error
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, name: str, content: bytes) -> None:
        """A small file of the output."""
        self._fill(name, lambda fd, path: files.write_all(fd, memoryview(content), 0, path=path))

    def copy(self, file: SideFile) -> None:
        """A side file, byte for byte (or its new content)."""
        if file.content is not None:
            self.write(file.name, file.content)
            return
        source = files.open_input(file.source)
        try:
            if (size := os.fstat(source).st_size) != file.nbytes:
                raise SourceChangedError(
                    f"{show(file.source)}: changed during the run: found {size} bytes, expected {file.nbytes}",
                    hint="Leave the inputs alone and run again",
                )
            self._fill(file.name, lambda fd, path: _copy(source, file, fd, path))
        finally:
            os.close(source)

    def commit(self, *, overwrite: bool) -> None:
        """Flush the folders and rename: from here on the output is there, whole.

        Raises OutputExistsError when something appeared under that name meanwhile; nothing of it is touched.
        """
        made = next(self.path.iterdir()) if self._target.single_file else self.path
        if self._fsync:
            for folder in (path for path in (self.path, *self.path.rglob("*")) if path.is_dir()):
                files.sync_folder(folder)
        try:
            with uninterrupted():  # between the rename and the end of the old one there is no half-way
                if overwrite and os.path.lexists(self._target.path):
                    files.rename_exchange(made, self._target.path)
                    shutil.rmtree(self.path, ignore_errors=True)
                else:
                    files.rename_new(made, self._target.path)
        except FileExistsError as error:
            raise OutputExistsError(
                f"{show(self._target.typed)}: appeared while this run was writing; it is left as it is",
                hint="Name another output, or run again with --overwrite",
            ) from error
        except OSError as error:
            raise files.os_failure(error, self._target.typed, "cannot rename the finished output", OutputError) from error
        if self._fsync:
            for folder in (self._target.path.parent, *(parent.parent for parent in self._new_parents)):
                files.sync_folder(folder)

    def _fill(self, name: str, write: Callable[[int, Path], None]) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = files.create_output(path)
        try:
            write(fd, path)
            if self._fsync:
                files.sync(fd, path=path)
        finally:
            os.close(fd)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done. Signals are the main thread's: in another, this does nothing."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _copy(source: int, file: SideFile, fd: int, path: Path) -> None:
    buffer = memoryview(bytearray(min(_COPIED, max(1, file.nbytes))))
    for at in range(0, file.nbytes, len(buffer)):
        part = buffer[: min(len(buffer), file.nbytes - at)]
        files.read_exact(source, part, at, path=file.source)
        files.write_all(fd, part, at, path=path)


def _check_overlap(target: Target, checkpoint: Checkpoint) -> None:
    out = _real(target.path, target.typed)
    home = _real(checkpoint.folder or checkpoint.path)
    paths = [shard.path for shard in checkpoint.shards]
    held = [home, *(_real(path) for path in paths), *(_real(path.parent) / path.name for path in paths)]  # links and targets
    if any(path.is_relative_to(out) for path in held) or (checkpoint.folder is not None and out.is_relative_to(home)):
        relation = "is" if out in held else "overlaps"
        raise OutputOverlapError(
            f"{show(target.typed)}: the output {relation} the input {show(checkpoint.path)}; inputs are never changed",
            hint="Name an output elsewhere",
        )


def _real(path: Path, typed: object = None) -> Path:
    """The path with every link resolved, however much of it exists. Messages call it `typed`."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{show(typed or path)}: cannot be resolved, a link leads to itself") from error
