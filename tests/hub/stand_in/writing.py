"""Routes that change a repository: create, validate, preupload, commit, branches, tags, pull requests, settings."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from . import refusals
from .card import problems
from .reading import commit_of
from .refusals import Refusal
from .store import Discussion, File, Repo, Tree, git_blob_id, is_large, lfs_pointer, matches
from .wire import Call, Reply, json_reply, route

if TYPE_CHECKING:
    from .hub import Hub


@route("create_repo", "POST", "/api/repos/create")
def create_repo(hub: Hub, call: Call) -> Reply:
    asked = call.json()
    namespace = asked.get("organization") or (call.token.user if call.token else "")
    hub.access.create(call.token, namespace)
    name = f"{namespace}/{asked['name']}"
    if name in hub.repos:
        raise refusals.repo_exists(f"{hub.endpoint}/{name}")
    hub.create(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
    return json_reply({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})


@route("delete_repo", "DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, call: Call) -> Reply:
    asked = call.json()
    repo = hub.access.write(call.token, hub.repos.get(f"{asked.get('organization')}/{asked['name']}"))
    del hub.repos[repo.name]
    return json_reply({})


@route("settings", "PUT", "/api/models/{repo}/settings")
def settings(hub: Hub, call: Call) -> Reply:
    repo = hub.access.write(call.token, hub.find(call))
    asked = call.json()
    repo.private = asked.get("private", {"private": True, "public": False}.get(asked.get("visibility"), repo.private))
    repo.gated = asked.get("gated", repo.gated)
    return json_reply({"private": repo.private, "gated": repo.gated})


@route("validate_yaml", "POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, call: Call) -> Reply:
    errors, warnings = problems(call.json()["content"])
    found: dict[str, Any] = {"errors": [{"message": x} for x in errors], "warnings": [{"message": x} for x in warnings]}
    if errors:
        found["error"] = "Invalid metadata"
    return json_reply(found, 400 if errors else 200)


@route("preupload", "POST", "/api/models/{repo}/preupload/{revision}")
def preupload(hub: Hub, call: Call) -> Reply:
    repo = hub.access.write(call.token, hub.find(call), pull_request=_for_pull_request(call))
    commit = commit_of(repo, call["revision"])
    asked = call.json()
    attributes = _attributes(hub, commit.tree)
    ignored = [line for line in asked.get("gitIgnore", "").splitlines() if line and not line.startswith("#")]

    def about(file: dict[str, Any]) -> dict[str, Any]:
        old = commit.tree.get(file["path"])
        return {
            "path": file["path"], "uploadMode": _mode(file, attributes), "shouldIgnore": matches(file["path"], ignored),
            **({"oid": old.etag} if old else {}),
        }  # fmt: skip

    return json_reply({"files": [about(file) for file in asked["files"]]})


def _for_pull_request(call: Call) -> bool:
    return call.flag("create_pr") or call["revision"].startswith("refs/pr/")


def _attributes(hub: Hub, tree: Tree) -> bytes:
    return hub.contents.path(tree[".gitattributes"].etag).read_bytes() if ".gitattributes" in tree else b""


def _mode(file: dict[str, Any], attributes: bytes) -> str:
    return "lfs" if is_large(file["path"], file["size"], base64.b64decode(file["sample"]), attributes) else "regular"


@route("commit", "POST", "/api/models/{repo}/commit/{revision}")
def commit(hub: Hub, call: Call) -> Reply:
    """One commit from lines of JSON; all of it or nothing."""
    pull_request = call.flag("create_pr")
    repo = hub.access.write(call.token, hub.find(call), pull_request=_for_pull_request(call))
    lines = [json.loads(line) for line in call.body().splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    changes = [(line["key"], line["value"]) for line in lines if line["key"] != "header"]
    with hub.lock:
        ref, parent = _target(repo, call["revision"], header, pull_request=pull_request)
        tree = dict(repo.commits[parent].tree)
        for kind, value in changes:
            _CHANGES[kind](hub, repo, tree, value)
        author = call.token.user if call.token else ""
        if pull_request:
            ref = _open(repo, header["summary"], header.get("description", ""), author, parent)
        made = repo.commit(ref, tree, header["summary"], header.get("description", ""), author, parent)
    found = {"success": True, "commitOid": made.sha, "commitUrl": f"{hub.endpoint}/{repo.name}/commit/{made.sha}"}
    if pull_request:
        found["pullRequestUrl"] = f"{hub.endpoint}/{repo.name}/discussions/{len(repo.discussions)}"
    return json_reply(found)


def _target(repo: Repo, revision: str, header: dict[str, Any], *, pull_request: bool) -> tuple[str, str]:
    """The ref to move and its present commit, which is the one the writer believes it to be."""
    ref = repo.ref_to_write(revision)
    if ref is None:
        raise refusals.no_revision(revision)
    head, believed = repo.refs[ref], header.get("parentCommit")
    if believed is not None and believed != head:
        if not (pull_request and believed in repo.commits):  # a pull request may start at an older commit
            raise refusals.stale_parent()
        head = believed
    return ref, head


def _add_regular(hub: Hub, repo: Repo, tree: dict[str, File], value: dict[str, Any]) -> None:
    data = base64.b64decode(value["content"])
    oid = git_blob_id(data)
    hub.contents.put(oid, data)
    tree[value["path"]] = File(value["path"], len(data), oid)


def _add_lfs(hub: Hub, repo: Repo, tree: dict[str, File], value: dict[str, Any]) -> None:
    sha256, path = value["oid"], value["path"]
    xet = hub.xet.hash_of(sha256)
    if xet is not None and not hub.contents.has(sha256):
        hub.xet.fetch(xet, sha256)
    if xet is None and sha256 not in repo.lfs:
        raise refusals.dangling_lfs(path)
    repo.lfs.add(sha256)
    size = hub.contents.path(sha256).stat().st_size
    tree[path] = File(path, size, git_blob_id(lfs_pointer(sha256, size)), sha256, xet)


def _delete_file(hub: Hub, repo: Repo, tree: dict[str, File], value: dict[str, Any]) -> None:
    if tree.pop(value["path"], None) is None:
        raise refusals.no_file_to_delete()


def _delete_folder(hub: Hub, repo: Repo, tree: dict[str, File], value: dict[str, Any]) -> None:
    inside = [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]
    if not inside:
        raise refusals.no_file_to_delete()
    for path in inside:
        del tree[path]


_CHANGES = {"file": _add_regular, "lfsFile": _add_lfs, "deletedFile": _delete_file, "deletedFolder": _delete_folder}


def _open(repo: Repo, title: str, description: str, author: str, start: str) -> str:
    """Opens a pull request and returns its ref."""
    num = len(repo.discussions) + 1
    repo.discussions.append(Discussion(num, title, description, author, True))
    repo.refs[f"refs/pr/{num}"] = start
    return f"refs/pr/{num}"


@route("branch", "POST", "/api/models/{repo}/branch/{branch}")
def create_branch(hub: Hub, call: Call) -> Reply:
    repo = hub.access.write(call.token, hub.find(call))
    start = commit_of(repo, call.json().get("startingPoint", "main"))
    return _make_ref(hub, repo, f"refs/heads/{call['branch']}", start.sha)


@route("branch", "DELETE", "/api/models/{repo}/branch/{branch}")
def delete_branch(hub: Hub, call: Call) -> Reply:
    return _drop_ref(hub, call, f"refs/heads/{call['branch']}", call["branch"])


@route("tag", "POST", "/api/models/{repo}/tag/{revision}")
def create_tag(hub: Hub, call: Call) -> Reply:
    repo = hub.access.write(call.token, hub.find(call))
    return _make_ref(hub, repo, f"refs/tags/{call.json()['tag']}", commit_of(repo, call["revision"]).sha)


@route("tag", "DELETE", "/api/models/{repo}/tag/{tag}")
def delete_tag(hub: Hub, call: Call) -> Reply:
    return _drop_ref(hub, call, f"refs/tags/{call['tag']}", call["tag"])


def _make_ref(hub: Hub, repo: Repo, ref: str, sha: str) -> Reply:
    with hub.lock:
        if ref in repo.refs:
            raise refusals.ref_exists(ref)
        repo.refs[ref] = sha
    return json_reply({})


def _drop_ref(hub: Hub, call: Call, ref: str, name: str) -> Reply:
    repo = hub.access.write(call.token, hub.find(call))
    if repo.refs.pop(ref, None) is None:
        raise refusals.no_revision(name)
    return json_reply({})


@route("discussions", "POST", "/api/models/{repo}/discussions")
def open_discussion(hub: Hub, call: Call) -> Reply:
    repo = hub.access.write(call.token, hub.find(call), pull_request=True)
    asked = call.json()
    if not asked["pullRequest"]:
        raise Refusal(501, "the stand-in has pull requests only")
    with hub.lock:
        ref = _open(
            repo, asked["title"], asked["description"], call.token.user if call.token else "", repo.refs["refs/heads/main"]
        )
    return json_reply({"num": int(ref.rsplit("/", 1)[-1]), "pullRequest": True})


@route("discussions", "GET", "/api/models/{repo}/discussions/{num}")
def discussion(hub: Hub, call: Call) -> Reply:
    repo = hub.access.see(call.token, hub.find(call))
    number = int(call["num"])
    if number > len(repo.discussions):
        raise Refusal(404, "Discussion not found")
    found = repo.discussions[number - 1]
    return json_reply({
        "num": number, "title": found.title, "author": {"name": found.author}, "createdAt": "2024-01-01T00:00:00.000Z",
        "status": found.status, "repo": {"name": repo.name, "type": "model"}, "isPullRequest": True, "events": [], "diff": "",
        "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [],
    })  # fmt: skip
