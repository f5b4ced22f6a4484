"""Routes that change nothing: who am I, what is in a repository, and the contents of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import yaml

from . import refusals
from .card import front_matter
from .store import Commit, File, Repo, lfs_pointer
from .wire import Call, Part, Reply, json_reply, route

if TYPE_CHECKING:
    from .hub import Hub

_CLOSED_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_SUFFIX_RANGE = re.compile(r"bytes=-(\d+)")


def commit_of(repo: Repo, revision: str) -> Commit:
    commit = repo.resolve(revision)
    if commit is None:
        raise refusals.no_revision(revision)
    return commit


def date(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


@route("whoami", "GET", "/api/whoami-v2")
def whoami(hub: Hub, call: Call) -> Reply:
    if call.token is None:
        raise refusals.no_credentials()
    user, role = call.token.user, call.token.role
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": "admin"} for org in hub.access.orgs[user]]
    auth = {"type": "access_token", "accessToken": {"displayName": "stand-in", "role": role}}
    return json_reply({"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": auth})


@route("harnesses", "GET", "/api/agent-harnesses")
def harnesses(hub: Hub, call: Call) -> Reply:
    return json_reply({"standardEnvVars": [], "harnesses": {}})


@route("other_type", "GET", "/api/(?:datasets|spaces)/.*")
def other_type(hub: Hub, call: Call) -> Reply:
    raise refusals.no_repo_anonymous() if call.token is None else refusals.no_repo()


@route("info", "GET", "/api/models/{repo}")
@route("info", "GET", "/api/models/{repo}/revision/{revision}")
def info(hub: Hub, call: Call) -> Reply:
    repo = hub.access.see(call.token, hub.find(call))
    commit = commit_of(repo, call.arguments.get("revision", "main"))
    found = _info(hub, repo, commit, blobs=call.flag("blobs"))
    if wanted := call.queries.get("expand"):
        found = {key: found[key] for key in ("_id", "id", *wanted) if key in found}
    return json_reply(found)


def _info(hub: Hub, repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    card = _card(hub, commit)
    return {
        "_id": commit.sha[:24], "id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": commit.sha,
        "lastModified": date(commit), "createdAt": "2022-03-02T23:29:04.000Z", "private": repo.private, "gated": repo.gated,
        "disabled": False, "downloads": 0, "likes": 0, "tags": card.get("tags") or [],
        "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "cardData": card,
        "siblings": [_sibling(file, blobs) for file in commit.tree.values()],
        "usedStorage": sum(file.size for file in commit.tree.values()),
    }  # fmt: skip


def _card(hub: Hub, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    try:
        return {} if readme is None else front_matter(hub.contents.path(readme.etag).read_text(errors="replace")) or {}
    except yaml.YAMLError:  # a card that is none of the Hub's business
        return {}


def _sibling(file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file.path}
    lfs = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": _pointer_size(file)}} if file.sha256 else {}
    return {"rfilename": file.path, "size": file.size, "blobId": file.oid, **lfs}


def _pointer_size(file: File) -> int:
    return len(lfs_pointer(file.sha256 or "", file.size))


def _entry(file: File) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": _pointer_size(file)}} if file.sha256 else {}
    xet = {"xetHash": file.xet} if file.xet else {}
    return {"type": "file", "path": file.path, "size": file.size, "oid": file.oid, **lfs, **xet}


def _folder(path: str, commit: Commit) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": commit.sha[::-1]}


def _folders(paths: Iterable[str]) -> set[str]:
    return {str(parent) for path in paths for parent in Path(path).parents if str(parent) != "."}


def _with_commit(repo: Repo, commit: Commit, entry: dict[str, Any]) -> dict[str, Any]:
    last = repo.last_change(commit, entry["path"])
    return {**entry, "lastCommit": {"id": last.sha, "title": last.title, "date": date(last)}}


@route("tree", "GET", "/api/models/{repo}/tree/{revision}")
@route("tree", "GET", "/api/models/{repo}/tree/{revision}/{folder...}")
def tree(hub: Hub, call: Call) -> Reply:
    repo = hub.access.see(call.token, hub.find(call))
    commit = commit_of(repo, call["revision"])
    root = call.arguments.get("folder", "").strip("/")
    entries = {path: _entry(file) for path, file in commit.tree.items()}
    entries |= {path: _folder(path, commit) for path in _folders(commit.tree)}
    if root and entries.get(root, {}).get("type") != "directory":
        raise refusals.no_entry(commit.sha)
    inside = [path for path in sorted(entries) if path.startswith(f"{root}/" if root else "")]
    if not call.flag("recursive"):
        inside = [path for path in inside if "/" not in path[len(root) + 1 if root else 0 :]]
    chosen = [entries[path] for path in inside]
    if call.flag("expand"):
        chosen = [_with_commit(repo, commit, entry) for entry in chosen]
    return _page(hub, call, chosen)


def _page(hub: Hub, call: Call, entries: list[dict[str, Any]]) -> Reply:
    """One page, and the link to the next in the Link header."""
    start = int(call.query.get("cursor", 0))
    reply = json_reply(entries[start : start + hub.page_size])
    if start + hub.page_size < len(entries):
        query = urlencode({**call.query, "cursor": start + hub.page_size})
        reply.headers["Link"] = f'<{hub.endpoint}{call.raw_path}?{query}>; rel="next"'
    return reply


@route("paths_info", "POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(hub: Hub, call: Call) -> Reply:
    repo = hub.access.see(call.token, hub.find(call))
    commit = commit_of(repo, call["revision"])
    folders = _folders(commit.tree)
    wanted = call.form().get("paths", [])
    found = [_entry(commit.tree[path]) for path in wanted if path in commit.tree]
    found += [_folder(path, commit) for path in wanted if path in folders]
    if call.form().get("expand", ["false"])[0].lower() == "true":
        found = [_with_commit(repo, commit, entry) for entry in found]
    return json_reply(found)


@route("refs", "GET", "/api/models/{repo}/refs")
def refs(hub: Hub, call: Call) -> Reply:
    repo = hub.access.see(call.token, hub.find(call))
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/"}
    if call.flag("include_prs"):
        kinds["pullRequests"] = "refs/pr/"
    return json_reply({kind: [_ref(ref, sha, start) for ref, sha in repo.refs.items() if ref.startswith(start)]
                       for kind, start in kinds.items()})  # fmt: skip


def _ref(ref: str, sha: str, start: str) -> dict[str, str]:
    return {"name": ref.removeprefix(start), "ref": ref, "targetCommit": sha}


@route("commits", "GET", "/api/models/{repo}/commits/{revision}")
def commits(hub: Hub, call: Call) -> Reply:
    repo = hub.access.see(call.token, hub.find(call))
    return json_reply([_commit(made) for made in repo.history(commit_of(repo, call["revision"]))])


def _commit(made: Commit) -> dict[str, Any]:
    authors = [{"user": made.author}]
    return {"id": made.sha, "title": made.title, "message": made.description, "date": date(made), "authors": authors}


@route("auth_check", "GET", "/api/models/{repo}/auth-check")
def auth_check(hub: Hub, call: Call) -> Reply:
    hub.access.read(call.token, hub.find(call))
    return json_reply({})


@route("auth_check", "GET", "/api/models/{repo}/auth-check/write")
def auth_check_write(hub: Hub, call: Call) -> Reply:
    hub.access.write(call.token, hub.find(call))
    return json_reply({})


@route("resolve", "GET", "/{repo}/resolve/{revision}/{file...}")
def resolve(hub: Hub, call: Call) -> Reply:
    """Redirects: a large file to its signed link on the CDN, a regular one to its place on the Hub itself."""
    repo = hub.access.read(call.token, hub.find(call))
    commit = commit_of(repo, call["revision"])
    file = commit.tree.get(call["file"])
    if file is None:
        raise refusals.no_entry(commit.sha)
    headers = {
        "X-Repo-Commit": commit.sha, "X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size),
        "Accept-Ranges": "bytes",
    }  # fmt: skip
    if file.sha256 is None:
        place = f"/api/resolve-cache/models/{repo.name}/{commit.sha}/{quote(file.path)}"
        return Reply(status=307, headers={**headers, "ETag": f'"{file.oid}"', "Location": f"{place}?etag=%22{file.oid}%22"})
    if file.xet is not None:
        headers |= hub.xet.headers(repo, commit, file)
    return Reply(
        status=302, headers={**headers, "Location": hub.signed(f"/content/{repo.name}/{file.sha256}/{quote(file.path)}")}
    )


@route("resolve_cache", "GET", "/api/resolve-cache/models/{repo}/{revision}/{file...}")
def resolve_cache(hub: Hub, call: Call) -> Reply:
    repo = hub.access.read(call.token, hub.find(call))
    commit = commit_of(repo, call["revision"])
    file = commit.tree[call["file"]]
    reply = _content(hub, call, file.oid)
    reply.headers |= {"X-Repo-Commit": commit.sha, "ETag": f'"{file.oid}"'}
    return reply


@route("cdn", "GET", "/content/{repo}/{sha256}/{file...}", host="cdn")
def cdn(hub: Hub, call: Call) -> Reply:
    hub.check_signature(call)
    reply = _content(hub, call, call["sha256"])
    reply.headers["ETag"] = f'"{call["sha256"]}"'
    return reply


def _content(hub: Hub, call: Call, name: str) -> Reply:
    """The content, or the range of it that was asked for."""
    path = hub.contents.path(name)
    size = path.stat().st_size
    asked = _range(call.headers.get("Range"), size)
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if asked is None:
        return Reply(Part(path, 0, size), headers=headers)
    start, end = asked
    if start >= size or start > end:
        return Reply(status=416, headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Reply(Part(path, start, end - start + 1), 206, headers)


def _range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte of a single range; anything else is answered in full, as servers may."""
    if closed := _CLOSED_RANGE.fullmatch(header or ""):
        return int(closed[1]), min(int(closed[2] or size - 1), size - 1)
    if suffix := _SUFFIX_RANGE.fullmatch(header or ""):
        return max(size - int(suffix[1]), 0), size - 1
    return None
