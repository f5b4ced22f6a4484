"""A repository on the Hub as a folder: its files have the paths that the Hub's own cache gives them, whether they are there
yet or not. Names and sizes come from one listing, headers by ranged requests, whole files when they are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import HubError, UsageError, show
from . import files
from .hub import hub_api, talking_about

_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".json", ".yaml", ".yml")
_NAMED = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[^\s@]+)?")  # org/name, org/name@revision


@dataclass(frozen=True)
class Repository:
    """One commit of a model repository. `folder`: of its files in the cache; `sizes`: of all its files, in bytes."""

    id: str
    commit: str
    folder: Path
    sizes: Mapping[str, int] = field(repr=False, compare=False)
    token: str | None = field(repr=False, compare=False)

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


_resolved: dict[tuple[str, str | None, str | None], Path] = {}  # what was asked for -> where it is: one commit per process


def open_repository(source: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The path in the cache of what `source` names on the Hub: `org/name`, `org/name@revision`, `hf://…` or a web URL. The
    revision is resolved once, and its files are known from then on to `files`.

    Raises HubError when there is no such repository, or it cannot be reached; UsageError for two revisions.
    """
    asked = (source, revision, token)
    if asked not in _resolved:
        _resolved[asked] = _resolve(source, revision, token)
    return _resolved[asked]


def _resolve(source: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import constants, parse_hf_uri

    with talking_about(source, "read it"):
        uri = parse_hf_uri(source if "://" in source else f"hf://{source}", endpoint=constants.ENDPOINT)
    if uri.type != "model":
        raise UsageError(f"{show(source)}: a {show(uri.type)}, expected a model")
    if revision is not None and uri.revision not in (None, revision):
        raise UsageError(f"{show(source)}: names one revision, and revision {show(revision)} is another")
    with talking_about(source, "read it"):
        commit = hub_api(token).resolve_revision(uri.id, revision=uri.revision or revision).resolved
    folder = cached(uri.id, commit)
    files.REMOTE[folder] = Repository(uri.id, commit, folder, _sizes(uri.id, commit, folder, token), token)
    path = folder / uri.path_in_repo if uri.path_in_repo else folder
    if not files.exists(path):
        raise HubError(f"{show(source)}: no file {show(uri.path_in_repo)} in it at {commit}")
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


def _sizes(repo: str, commit: str, folder: Path, token: str | None) -> dict[str, int]:
    """Every file of the commit, by one listing; of a repository that is in the cache, what is there of it if offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _present(folder)
    try:
        with talking_about(repo, "read it"):
            tree = hub_api(token).list_repo_tree(repo, recursive=True, revision=commit)
            return {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
    except Exception:
        if folder.is_dir():
            return _present(folder)
        raise


def _present(folder: Path) -> dict[str, int]:
    present = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in present}
