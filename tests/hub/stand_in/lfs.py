"""Large files on their way in, by Git LFS: batch, PUT or the Hub's multipart to signed links, verify."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .refusals import Refusal
from .store import Repo, sha256_of
from .wire import Call, Reply, json_reply, route

if TYPE_CHECKING:
    from .hub import Hub


@dataclass
class Multipart:
    """An upload in parts, until it is completed."""

    repo: str
    sha256: str
    parts: dict[int, Path] = field(default_factory=dict)


@route("lfs_batch", "POST", r"/{repo}\.git/info/lfs/objects/batch")
def batch(hub: Hub, call: Call) -> Reply:
    """Where to send what the repository does not hold yet. Without a `ref` it is for a pull request."""
    asked = call.json()
    repo = hub.access.write(call.token, hub.find(call), pull_request="ref" not in asked or "refs/pr/" in asked["ref"]["name"])
    objects = [_object(hub, repo, item["oid"], item["size"]) for item in asked["objects"]]
    return json_reply({"transfer": "basic", "objects": objects})


def _object(hub: Hub, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    if sha256 in repo.lfs:
        return {"oid": sha256, "size": size}
    upload = _one_part(hub, repo, sha256) if size <= hub.multipart_above else _many_parts(hub, repo, sha256, size)
    verify = {"href": f"{hub.endpoint}/{repo.name}.git/info/lfs/verify"}
    return {"oid": sha256, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def _one_part(hub: Hub, repo: Repo, sha256: str) -> dict[str, Any]:
    return {"href": hub.signed(f"/lfs/{repo.name}/{sha256}")}


def _many_parts(hub: Hub, repo: Repo, sha256: str, size: int) -> dict[str, Any]:
    number = len(hub.multiparts)
    hub.multiparts.append(Multipart(repo.name, sha256))
    parts = ceil(size / hub.multipart_above)
    links = {f"{n:05}": hub.signed(f"/lfs-part/{number}/{n}") for n in range(1, parts + 1)}
    href = f"{hub.endpoint}/api/complete_multipart/{number}"
    return {"href": href, "header": {"chunk_size": str(hub.multipart_above), **links}}


@route("lfs_put", "PUT", "/lfs/{repo}/{sha256}", host="cdn")
def put(hub: Hub, call: Call) -> Reply:
    hub.check_signature(call)
    _receive(hub, call, hub.repos[call["repo"]], call["sha256"])
    return Reply(headers={"ETag": f'"{call["sha256"]}"'})


def _receive(hub: Hub, call: Call, repo: Repo, sha256: str) -> None:
    temporary = hub.contents.temporary()
    call.save(temporary)
    _keep(hub, repo, sha256, temporary)


def _keep(hub: Hub, repo: Repo, sha256: str, temporary: Path) -> None:
    if sha256_of(temporary) != sha256:
        temporary.unlink()
        raise Refusal(400, "BadDigest: the bytes are not those of the name")
    hub.contents.keep(temporary, sha256)
    repo.lfs.add(sha256)


@route("lfs_part", "PUT", "/lfs-part/{upload}/{part}", host="cdn")
def put_part(hub: Hub, call: Call) -> Reply:
    hub.check_signature(call)
    temporary = hub.contents.temporary()
    call.save(temporary)
    hub.multiparts[int(call["upload"])].parts[int(call["part"])] = temporary
    return Reply(headers={"ETag": f'"part-{call["part"]}"'})


@route("lfs_complete", "POST", "/api/complete_multipart/{upload}")
def complete(hub: Hub, call: Call) -> Reply:
    """Joins the parts in the order of the request. The link itself is the permission: the client sends no token here."""
    asked, upload = call.json(), hub.multiparts[int(call["upload"])]
    whole = hub.contents.temporary()
    with whole.open("wb") as stream:
        for part in asked["parts"]:
            stream.write(upload.parts.pop(part["partNumber"]).read_bytes())
    _keep(hub, hub.repos[upload.repo], upload.sha256, whole)
    return json_reply({"success": True})


@route("lfs_verify", "POST", r"/{repo}\.git/info/lfs/verify")
def verify(hub: Hub, call: Call) -> Reply:
    asked = call.json()
    repo = hub.access.write(call.token, hub.find(call), pull_request=True)
    if asked["oid"] not in repo.lfs or hub.contents.path(asked["oid"]).stat().st_size != asked["size"]:
        raise Refusal(404, "Object not found")
    return json_reply({"success": True})
