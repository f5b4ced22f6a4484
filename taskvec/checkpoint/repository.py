"""A repository on the Hub as a folder: its files have the paths that the Hub's own cache gives them, whether they are there
yet or not. Names and sizes come from one listing, headers by ranged requests, whole files when they are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import HubError, UsageError, show
from . import files
from .hub import hub_api, talking_about

_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".json", ".yaml", ".yml")
_NAMED = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[^\s@]+)?")  # org/name, org/name@revision
_PASSWORD = re.compile(r"://[^/:@]*:(?!\d+/)[^@]*@")  # with slashes too, but no port


@dataclass(frozen=True)
class Repository:
    """One commit of a model repository.

    Attributes:
        folder: of its files in the Hub's cache.
        sizes: of all its files, in bytes.
        sha256: of the files that the Hub knows it of, the large ones.
        cached_only: the Hub was not reached: `sizes` are of what the cache holds, `commit` is the last one that was seen.
    """

    id: str
    commit: str
    folder: Path
    sizes: Mapping[str, int] = field(repr=False, compare=False)
    sha256: Mapping[str, str] = field(repr=False, compare=False)
    token: str | None = field(repr=False, compare=False)
    cached_only: bool = False

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` of a file on, by one ranged request."""
        from huggingface_hub import HfFileSystem

        with talking_about(self.id, "read it"):
            system = HfFileSystem(token=self.token)
            path = f"{self.id}/{name}"
            with system.open(path, "rb", revision=self.commit, cache_type="none", block_size=len(buffer)) as file:
                file.seek(offset)
                content = file.read(len(buffer))
        files.fill(buffer, content, path=self.folder / name)

    def fetch(self, names: Iterable[str]) -> None:
        """Bring these files into the cache, several at once, going on where an interrupted download stopped."""
        from huggingface_hub import snapshot_download

        wanted = [name for name in names if not os.path.exists(self.folder / name)]
        if wanted:
            patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in wanted]
            with talking_about(self.id, "download it"):
                snapshot_download(self.id, revision=self.commit, allow_patterns=patterns, token=self.token)


class Named(NamedTuple):
    """What a name of the Hub says. `path`: a folder or file of the repository, empty for all of it."""

    id: str
    revision: str | None
    path: str


_resolved: dict[tuple[Named, str | None], Path] = {}  # what was asked for -> where it is: one commit per process


def forget(repo: str) -> None:
    """Resolve the names of a repository anew from now on: it was changed."""
    for asked in [asked for asked in _resolved if asked[0].id == repo]:
        del _resolved[asked]


def parse(source: str, revision: str | None = None) -> Named:
    """`org/name`, `org/name@revision` (which may have slashes), `hf://…` or a web URL. Raises HubError for what is no such
    name, UsageError for two revisions or another kind of repository."""
    from huggingface_hub import constants, parse_hf_uri

    id, at, bare = source.partition("@") if "://" not in source else ("", "", "")
    _, at_host, _ = source.partition("://")[2].partition("/")[0].rpartition("@")
    if _PASSWORD.search(source) or (at_host and not source.startswith("hf://")):
        raise UsageError("an address with a user or password in it", hint="Leave it out; log in with `hf auth login`")
    with talking_about(source, "read it"):
        uri = parse_hf_uri(source if "://" in source else f"hf://{id}", endpoint=constants.ENDPOINT)
    named = bare if at else uri.revision
    if uri.type != "model":
        raise UsageError(f"{show(source)}: a {show(uri.type)}, expected a model")
    if revision is not None and named not in (None, revision):
        raise UsageError(f"{show(source)}: names one revision, and revision {show(revision)} is another")
    return Named(uri.id, named or revision, uri.path_in_repo)


def open_repository(source: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The path in the cache of what `source` names on the Hub. The revision is resolved once, and its files are known from
    then on to `files`.

    Raises HubError when there is no such repository, or it cannot be reached; UsageError for two revisions.
    """
    token = token.strip() if token else None
    asked = (parse(source, revision), token)
    if asked not in _resolved:
        _resolved[asked] = _resolve(source, *asked)
    return _resolved[asked]


def _resolve(source: str, named: Named, token: str | None) -> Path:
    with talking_about(source, "read it"):
        commit = hub_api(token).resolve_revision(named.id, revision=named.revision).resolved
    folder = cached(named.id, commit)
    known = files.REMOTE.get(folder)
    if known is None or token is not None or known.cached_only:
        files.REMOTE[folder] = _listed(named.id, commit, folder, token)
    path = folder / named.path if named.path else folder
    if not files.exists(path):
        raise HubError(f"{show(source)}: no file {show(named.path)} in it at {commit}")
    return path


def cached(repo: str, commit: str) -> Path:
    """Where the Hub's own cache has a commit of a repository, whether it is there or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots", commit)


def is_hub_name(source: str) -> bool:
    """Whether it can be a name on the Hub: a URL, or org/name. A local path that exists is asked for first."""
    named = _NAMED.fullmatch(source) is not None and not source.lower().endswith(_FILES)
    return source.startswith(("hf://", "https://", "http://")) or named


def _listed(repo: str, commit: str, folder: Path, token: str | None) -> Repository:
    """The repository with all files of the commit, by one listing; or, if the Hub cannot be reached, those in the cache."""
    from huggingface_hub.hf_api import RepoFile

    try:
        with talking_about(repo, "read it"):
            entries = list(hub_api(token).list_repo_tree(repo, recursive=True, revision=commit))
    except HubError:
        if not folder.is_dir():
            raise
        present = (path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in present}
        return Repository(repo, commit, folder, sizes, {}, token, cached_only=True)
    found = {entry.path: entry for entry in entries if isinstance(entry, RepoFile) and _is_plain(entry.path)}
    hashes = {name: entry.lfs.sha256 for name, entry in found.items() if entry.lfs is not None}
    return Repository(repo, commit, folder, {name: entry.size for name, entry in found.items()}, hashes, token)


def _is_plain(name: str) -> bool:
    """Whether a name in a listing stays below its folder."""
    return all(part not in ("", ".", "..") for part in name.split("/"))
