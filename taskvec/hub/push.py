"""A finished output folder -> a repository on the Hub, in one commit: who reads it sees the old model or the new, never half.

Weights are uploaded first, one by one, where no reader sees them; then one commit, guarded by the commit it was made on,
makes them and the small files appear. An interrupted push that is run again sends only what is missing.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.hub import hub_api, is_offline, talking_about
from ..checkpoint.locate import read_json
from ..checkpoint.repository import forget, parse
from ..errors import HubError, OutputError, UsageError, VerificationError, counted, listing, show
from ..run.edited import EditedCheckpoint, when_pushed
from ..run.output import RECORD
from ..run.record import SEAL, as_json, index_name, sealed
from ..run.verify import verify_listed

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_CARD = "README.md"
_HASHED = 1 << 20  # bytes per read
_LOADED = re.compile(  # what transformers, diffusers and PEFT would load in place of the pushed model, or refuse beside it
    r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors|(model|diffusion_pytorch_model)\.safetensors\.index\.json"
    r"|pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?|adapter_(model\.(safetensors|bin)|config\.json)"
    r"|consolidated[\w.-]*\.(safetensors|pth)"
)


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now: `commit` is its head, also where everything was there already. Sizes in bytes."""

    repo: str
    url: str
    commit: str
    pull_request: str | None
    files: int
    nbytes: int
    warnings: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready: what `--json` prints."""
        return {
            "ok": True,
            "repo": self.repo,
            "url": self.url,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "files": self.files,
            "bytes": self.nbytes,
            "warnings": list(self.warnings),
        }


def push(
    output: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | Path | None = None,
    verify_checksums: bool = False,
    token: str | None = None,
    uploading: Callable[[str, int], None] = lambda name, nbytes: None,
) -> Pushed:
    """Push an output folder of taskvec to `repo`, `org/name` on the Hub, in one commit.

    Only what its record lists goes up. The folder is checked first, and not pushed if `taskvec verify` would refuse it. An
    interrupted push that is run again sends only what is missing.

    Args:
        repo: `org/name`, `org/name@branch` or a URL of it; made if there is none.
        private: make the repository private; one that exists is left as it is, with a warning if it is public.
        create_pr: propose the commit as a pull request.
        revision: a branch, made if it is missing; the main one if not given.
        commit_message: the formula if not given.
        card: a Markdown file whose text replaces the body of the card; the front matter stays.
        verify_checksums: compare what the Hub holds afterwards with what was sent, file by file.
        token: one with write access; by default that of HF_TOKEN or `hf auth login`.
        uploading: called with the name and size in bytes of every weight file before it is sent.

    Raises OutputError or VerificationError for the folder, HubError for the Hub; the folder is left as it is.
    """
    folder = Path(output)
    id, branch = _target(repo, revision)
    if create_pr and branch not in (None, "main"):
        raise UsageError("a pull request is made to main: leave out the branch")
    body = None if card is None else read_card(card)
    content = {name: _content(folder, name, body) for name in _manifest(folder)}
    content |= {_CARD: body.encode()} if body is not None and _CARD not in content else {}
    before = _identities(content)
    _check(folder)
    api = hub_api(token)
    warnings: list[str] = []
    with talking_about(id, "make it"):
        url = str(api.create_repo(id, private=private or None, exist_ok=True))
    with talking_about(id, "push to it"):
        if private and not api.repo_info(id).private:
            warnings.append(f"{show(id)} exists already and is public: so is what was pushed")
        if branch not in (None, "main") and not str(branch).startswith("refs/"):
            api.create_branch(id, branch=str(branch), exist_ok=True)
        message = commit_message or str(show(read_json(folder / RECORD).get("formula", "Edited with taskvec"), 120))
        commit, removed = _commit(api, _Goal(id, branch, create_pr, message), content, before, uploading)
    if removed:
        warnings.append(f"what a loader would have taken in its place is removed from the branch: {listing(removed)}")
    if verify_checksums:
        with talking_about(id, "read back what was pushed"):
            _compare(api, id, content, commit.oid)
    forget(id)
    sizes = sum(data.stat().st_size if isinstance(data, Path) else len(data) for data in content.values())
    return Pushed(id, url, commit.oid, commit.pr_url, len(content), sizes, tuple(warnings))


class _Goal(NamedTuple):
    """Where a commit goes, and what it says."""

    repo: str
    branch: str | None
    create_pr: bool
    message: str


def _target(repo: str, revision: str | None) -> tuple[str, str | None]:
    """The id and the branch. Raises UsageError for two branches, HubError for what is no name, or offline."""
    named = parse(repo, revision)
    if is_offline():
        offline = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
        raise HubError(f"{show(named.id)}: cannot push to it: {offline}", hint="Unset it, and go online")
    if named.path:
        raise UsageError(
            f"{show(repo)}: expected the name of a model, org/name", hint="A branch with a slash is named as org/name@branch"
        )
    return named.id, named.revision


def read_card(card: str | os.PathLike[str]) -> str:
    """The text of a card of one's own. Raises UsageError if it cannot be read as UTF-8."""
    try:
        return Path(card).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{show(card)}: cannot be read as UTF-8 text ({show(error)})") from error


def _identities(content: Mapping[str, Path | bytes]) -> dict[str, tuple[int, int, int]]:
    """Size, modification time and inode of every file that goes up as it is."""
    stats = {name: os.stat(data) for name, data in content.items() if isinstance(data, Path)}
    return {name: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _manifest(folder: Path) -> list[str]:
    """What the record lists, in the order it goes up. Raises OutputError for what is missing or leads elsewhere."""
    if not (folder / RECORD).is_file():
        raise OutputError(
            f"{show(folder)}: no {RECORD} in it: not an output folder of taskvec", hint="Push what `subtract -o FOLDER` made"
        )
    record = read_json(folder / RECORD)
    weights = [str(shard.get("name")) for shard in record.get("shards") or [] if isinstance(shard, dict)]
    index = index_name(record)
    listed = [*weights, *([index] if index else []), *map(str, record.get("side_files") or []), RECORD]
    listed += [_CARD] if (folder / _CARD).is_file() else []
    home = folder.resolve()
    for name in listed:
        path = folder / name
        if any(part.startswith(".") for part in Path(name).parts) or not path.resolve().is_relative_to(home):
            raise OutputError(f"{show(folder)}: {show(name)} of its record is hidden or leads out of the folder")
        if not path.is_file():
            raise OutputError(f"{show(folder)}: {show(name)} of its record is missing", hint="Make the output again")
    return list(dict.fromkeys(listed))


def _check(folder: Path) -> None:
    found = verify_listed(folder)
    if not found.ok:
        raise VerificationError(f"{show(folder)}: not pushed: {found.problems[0]}", hint="Make the output again")


def _content(folder: Path, name: str, card: str | None) -> Path | bytes:
    """A file as it goes up: as it is, but for places of this machine in the record, and the body of the card."""
    if name == RECORD:
        return as_json(_resealed(_without_places(read_json(folder / RECORD))))
    if name == _CARD and card is not None:
        text = (folder / _CARD).read_text("utf-8", "replace")
        own = card.lstrip("\ufeff\r\n ").startswith("---")
        head = (
            text[: text.index("\n---", 3) + 4] + "\n\n" if text.startswith("---") and "\n---" in text[3:] and not own else ""
        )
        return f"{head}{card}".encode()
    return folder / name


def _without_places(content: Any) -> Any:
    """The record without where its inputs lay, which is nobody's business elsewhere."""
    if isinstance(content, dict):
        return {key: _without_places(value) for key, value in content.items() if key != "from_output"}
    return [_without_places(value) for value in content] if isinstance(content, list) else content


def _resealed(record: dict[str, Any]) -> dict[str, Any]:
    return sealed(record) if SEAL in record else record


def _commit(
    api: HfApi,
    goal: _Goal,
    content: Mapping[str, Path | bytes],
    before: Mapping[str, tuple[int, int, int]],
    uploading: Callable[[str, int], None],
) -> tuple[CommitInfo, list[str]]:
    """Weights first, where no reader sees them; then the one commit, guarded by the head that it was made for. Also what it
    removes."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = api.repo_info(goal.repo, revision=goal.branch).sha
    additions = [CommitOperationAdd(name, str(d) if isinstance(d, Path) else d) for name, d in content.items()]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):
            uploading(addition.path_in_repo, addition.upload_info.size)
            api.preupload_lfs_files(goal.repo, [addition], revision=goal.branch, create_pr=goal.create_pr)
    changed = [name for name, identity in _identities(content).items() if before[name] != identity]
    if changed:
        raise OutputError(f"{listing(changed)}: changed while it was pushed; nothing of it is seen", hint="Push it again")
    present = api.list_repo_files(goal.repo, revision=goal.branch)
    stale = [name for name in present if name not in content and _LOADED.fullmatch(name)]
    commit = api.create_commit(
        goal.repo,
        [*additions, *(CommitOperationDelete(name) for name in stale)],
        commit_message=goal.message,
        revision=goal.branch,
        create_pr=goal.create_pr,
        parent_commit=head,
    )
    return commit, stale


def _compare(api: HfApi, repo: str, content: Mapping[str, Path | bytes], commit: str) -> None:
    """Raises HubError naming files whose hash on the Hub is not that of what was sent."""
    found = {info.path: info for info in api.get_paths_info(repo, list(content), revision=commit)}
    wrong = []
    for name, data in content.items():
        info: Any = found.get(name)
        if info is None or not _is_same(data, info):
            wrong.append(name)
    if wrong:
        raise HubError(f"{show(repo)}: {counted(len(wrong), 'file')} differ from what was sent: {listing(wrong)}")


def _is_same(data: Path | bytes, info: Any) -> bool:
    size = data.stat().st_size if isinstance(data, Path) else len(data)
    if info.lfs is not None:
        return bool(info.lfs.sha256 == _digest(hashlib.sha256(), data) and info.size == size)
    git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    return bool(info.blob_id == _digest(git, data))


def _digest(digest: Any, data: Path | bytes) -> str:
    if isinstance(data, bytes):
        digest.update(data)
        return str(digest.hexdigest())
    with open(data, "rb") as file:
        while part := file.read(_HASHED):
            digest.update(part)
    return str(digest.hexdigest())


def push_edited(
    edited: EditedCheckpoint,
    repo: str,
    *,
    output: str | os.PathLike[str] | None = None,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | Path | None = None,
    verify_checksums: bool = False,
    token: str | None = None,
    **options: Any,
) -> Pushed:
    """Save to `output`, by default a folder here of the repository's own name, and push it. `options` are those of `save`.

    The folder stays, pushed or not.
    """
    folder = default_output(repo) if output is None else output
    report = edited.save(folder, **options)
    return push(
        report.output, repo, private=private, create_pr=create_pr, revision=revision, commit_message=commit_message,
        card=card, verify_checksums=verify_checksums, token=token,
    )  # fmt: skip


def default_output(repo: str) -> str:
    """The folder an edit goes to when only a repository is named: its last name."""
    return _target(repo, None)[0].rpartition("/")[2]


when_pushed(push_edited)

__all__ = ["Pushed", "push"]
