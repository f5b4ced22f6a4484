"""Where the output goes, and whether it can be made there: refused before a byte is written."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import system
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import os_failure
from ..checkpoint.header import read_header
from ..checkpoint.locate import read_json
from ..delta.stored import METADATA_KEY
from ..errors import (
    CheckpointError,
    NotEnoughDiskError,
    OutputError,
    OutputExistsError,
    OutputOverlapError,
    UsageError,
    listing,
    show,
)

RECORD = "taskvec.json"  # in an output folder; a single output file has METADATA_KEY in its `__metadata__` instead


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

    @property
    def relative(self) -> Path:
        """As the user wrote it: messages name files by it, and absolute paths are nobody's business."""
        return Path(os.path.normpath(os.path.expanduser(self.typed)))


def check_target(target: Target, inputs: Iterable[Checkpoint], overwrite: bool) -> None:
    """Raises OutputOverlapError when the output is, holds or lies in an input, also with `overwrite`;
    OutputExistsError when something is there and may not be replaced; OutputError when no folder can be there."""
    for checkpoint in inputs:
        _check_overlap(target, checkpoint)
    if target.relative.name in ("", ".."):
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
    foreign = [] if target.single_file else foreign_files(target.relative)
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


def foreign_files(folder: Path) -> list[str]:
    """Files and links of an output folder that its record does not list; none when it has no record."""
    if not (folder / RECORD).is_file():
        return []
    content = read_json(folder / RECORD)
    shards = [str(shard.get("name")) for shard in content.get("shards") or [] if isinstance(shard, dict)]
    indices = {name.partition("-00001-of-")[0] + ".safetensors.index.json" for name in shards}
    own = {RECORD, "README.md", *map(str, content.get("side_files") or []), *shards, *indices}
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in found if (name := path.relative_to(folder).as_posix()) not in own]


def _made_by_taskvec(target: Target) -> bool:
    try:
        if target.single_file:
            return METADATA_KEY in read_header(target.relative).metadata
        if (target.relative / RECORD).is_file():
            return {"taskvec", "shards"} <= read_json(target.relative / RECORD).keys()
    except CheckpointError:
        return False
    return not os.listdir(target.path)


def check_space(target: Target, needed: int, downloads: Mapping[Path, int] | None = None) -> None:
    """Raises NotEnoughDiskError when the disk of the output has less than `needed` bytes free, or the one of the Hub's cache
    less than the `downloads` take; together, if they are one disk. What an interrupted run left for that output counts as
    free: it is used or removed."""
    parent = _standing(target.path.parent)
    if downloads:
        cache, size = _standing(next(iter(downloads)).parent), sum(downloads.values())
        if os.stat(cache).st_dev == os.stat(parent).st_dev:
            needed += size
        elif _free(cache) < size:
            raise NotEnoughDiskError(
                f"the cache of the Hub: {size} bytes are needed, {_free(cache)} are free",
                hint="Free space there, or set HF_HOME to a folder on another disk",
            )
    free = _free(parent) + held(target)
    if free < needed:
        raise NotEnoughDiskError(
            f"{show(target.typed)}: {needed} bytes are needed, {free} are free",
            hint="Free space, or name an output on another disk",
        )


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise os_failure(error, folder.name, "cannot tell the free space", OutputError) from error


def _standing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def leftovers(target: Target) -> list[Path]:
    """The folders of this user in which runs make that output, living or ended, in the order of their names."""
    home = target.relative.parent
    try:
        names = system.again(system.calls.listdir, home)
    except (FileNotFoundError, PermissionError):  # a folder that may be written to and not be read
        return []
    except OSError as error:
        raise os_failure(error, target.typed, "cannot list the folder above it", OutputError) from error
    return [home / name for name in sorted(names) if name.startswith(staging_prefix(target)) and _is_own_folder(home / name)]


def _is_own_folder(path: Path) -> bool:
    """Not a link, and not another user's, who could have put files into it."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def held(target: Target) -> int:
    """Bytes on disk that runs that ended hold for that output: they will be used, or be free."""
    total = 0
    for folder, _, names in (found for room in leftovers(target) for found in os.walk(room)):
        for name in names:
            with suppress(FileNotFoundError):  # of a run that just ends
                status = os.lstat(os.path.join(folder, name))
                total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
    return total


def staging_prefix(target: Target) -> str:
    return f".{target.path.name}.taskvec-partial-"


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
