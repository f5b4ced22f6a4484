"""What the stand-in keeps: repositories of commits, refs and files. Contents lie on disk under the name of their hash.

Nothing here knows of HTTP, users or tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

LARGE = 10 * 1024 * 1024  # bytes from which any file goes to LFS
_PATTERNS = ("*.bin", "*.gz", "*.h5", "*.model", "*.npz", "*.onnx", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _PATTERNS).encode()
"""The part of a new model repository's .gitattributes that matters here."""


def git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def matches(path: str, patterns: Iterable[str]) -> bool:
    """As .gitattributes and .gitignore do it, for simple globs."""
    return any(fnmatchcase(path, pattern) or fnmatchcase(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)


def is_large(path: str, size: int, sample: bytes, attributes: bytes = GITATTRIBUTES) -> bool:
    """Whether a file goes to LFS: `attributes` name it, it is large, or its first bytes are no text."""
    patterns = [line.split()[0] for line in attributes.decode().splitlines() if "filter=lfs" in line]
    return size >= LARGE or b"\0" in sample or matches(path, patterns)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a tree: its size in bytes, its git blob id (of the pointer, for LFS), and its LFS and Xet hashes, if any."""

    path: str
    size: int
    oid: str
    sha256: str | None = None
    xet: str | None = None

    @property
    def etag(self) -> str:
        """The name of the content: what the Hub says as ETag, and what `Contents` stores it under."""
        return self.sha256 or self.oid


Tree = Mapping[str, File]


@dataclass(frozen=True)
class Commit:
    """A whole tree of files, as one commit left it."""

    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    tree: Tree
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))


@dataclass
class Discussion:
    """A pull request (or a plain discussion): its number is also the last part of its ref, refs/pr/N."""

    num: int
    title: str
    description: str
    author: str
    pull_request: bool
    status: str = "draft"


class Contents:
    """Files by hash in one folder. Writing is into a temporary name first, so a content is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._count = 0

    def path(self, name: str) -> Path:
        return self.folder / name

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def temporary(self) -> Path:
        self._count += 1
        return self.folder / f"incoming-{self._count}-{os.getpid()}"

    def keep(self, temporary: Path, name: str) -> None:
        os.replace(temporary, self.path(name))

    def put(self, name: str, data: bytes) -> None:
        temporary = self.temporary()
        temporary.write_bytes(data)
        self.keep(temporary, name)


class Repo:
    """One model repository. `refs` maps full ref names (refs/heads/main, refs/tags/v1, refs/pr/1) to commit ids."""

    def __init__(self, name: str, salt: str, *, private: bool = False, gated: str | bool = False) -> None:
        self.name = name
        self.private = private
        self.gated = gated
        self.granted: set[str] = set()
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs: set[str] = set()  # sha256 of the large files this repository holds, committed or only uploaded
        self.discussions: list[Discussion] = []
        self._salt = salt

    def resolve(self, revision: str) -> Commit | None:
        """The commit a branch, tag, full ref or commit id stands for."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        return self.commits.get(revision)

    def ref_to_write(self, revision: str) -> str | None:
        """The ref a commit to `revision` moves; None for a tag, a commit id and what does not exist."""
        return next((ref for ref in (f"refs/heads/{revision}", revision) if ref in self.refs and "/tags/" not in ref), None)

    def commit(self, ref: str, tree: Tree, title: str, description: str, author: str, parent: str | None) -> Commit:
        """Moves `ref` to a new commit that holds `tree`."""
        identity = f"{self._salt} {self.name} {len(self.commits)} {parent} {title}"
        made = Commit(
            hashlib.sha1(identity.encode()).hexdigest(), parent, title, description, author, dict(sorted(tree.items()))
        )
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit, its parent, and so on."""
        current: Commit | None = commit
        while current is not None:
            yield current
            current = self.commits[current.parent] if current.parent else None

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The newest commit that touched the file or folder `path`."""

        def under(tree: Tree) -> set[File]:
            return {file for name, file in tree.items() if name == path or name.startswith(f"{path}/")}

        last = commit
        for older in self.history(commit):
            if under(older.tree) != under(commit.tree):
                break
            last = older
        return last
