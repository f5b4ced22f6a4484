"""Xet without a server of its own: the token routes send hf_xet to a folder, where it chunks, stores and reassembles.

The Hub's part is to know which Xet hash a sha256 has, which it reads from the shards hf_xet leaves (xet-core, mdb_shard), and
to hand the bytes to clients without hf_xet. One process at a time holds the folder, so the stand-in reads a copy.
"""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from .reading import commit_of
from .refusals import Refusal
from .store import Commit, Contents, File, Repo
from .wire import Call, Reply, json_reply, route

if TYPE_CHECKING:
    from .hub import Hub

_RECORD = 48  # bytes of every record of a shard's file section
_WITH_VERIFICATION, _WITH_SHA256 = 0x80000000, 0x40000000


def installed() -> bool:
    return find_spec("hf_xet") is not None


class Cas:
    """The folder hf_xet stores into. `enabled` decides whether the Hub tells clients of Xet at all."""

    def __init__(self, folder: Path, contents: Contents, endpoint: str, *, enabled: bool) -> None:
        self.folder = folder
        self.enabled = enabled
        self._contents = contents
        self._endpoint = endpoint
        self._hashes: dict[str, str] = {}  # sha256 → Xet hash
        folder.mkdir()

    @property
    def url(self) -> str:
        return f"local://{self.folder}"

    @property
    def stored(self) -> int:
        """Bytes of chunks in the folder: what uploads really brought in."""
        return sum(
            path.stat().st_size for path in (self.folder / "xet" / "xorbs" / "xorbs").glob("*") if path.suffix != ".tagset"
        )

    def headers(self, repo: Repo, commit: Commit, file: File) -> dict[str, str]:
        """What `resolve` adds for a file that hf_xet can fetch."""
        link = f'<{self._endpoint}/api/models/{repo.name}/xet-read-token/{commit.sha}>; rel="xet-auth"'
        return {"X-Xet-Hash": file.xet or "", "Link": link}

    def hash_of(self, sha256: str) -> str | None:
        """The Xet hash of a content that was uploaded by hf_xet."""
        if not self.enabled:
            return None
        if sha256 not in self._hashes:
            self._hashes |= {sha: xet for path in self._shards() for xet, sha in _files(path.read_bytes())}
        return self._hashes.get(sha256)

    def add(self, path: Path, sha256: str) -> str:
        """Stores a file as a client's upload would, and returns its Xet hash."""
        self._hashes[sha256] = _upload(path, self.url)
        return self._hashes[sha256]

    def fetch(self, xet: str, sha256: str) -> None:
        """Reassembles a content, for clients that come without hf_xet."""
        scratch = Path(mkdtemp(dir=self.folder.parent))
        (scratch / "xet").mkdir()
        shutil.copytree(self.folder / "xet" / "xorbs", scratch / "xet" / "xorbs")
        _download(xet, scratch / "whole", f"local://{scratch}")
        self._contents.keep(scratch / "whole", sha256)
        shutil.rmtree(scratch)

    def _shards(self) -> Iterator[Path]:
        return (self.folder / "xet" / "xorbs" / "shards").glob("*.mdb")


def _hex(raw: bytes) -> str:
    """A hash as xet-core writes it: four little-endian words of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    """(Xet hash, sha256) of the files a shard describes. After its 48-byte header come records of 48 bytes, file by file:
    a head (hash, flags, number of segments), the segments, as many verifications, the sha256; a hash of ones ends them.
    """
    at = _RECORD
    while (name := shard[at : at + 32]) != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        at += _RECORD * (1 + segments * (2 if flags & _WITH_VERIFICATION else 1))
        if flags & _WITH_SHA256:
            yield _hex(name), _hex(shard[at : at + 32])
            at += _RECORD


def _session(url: str) -> dict[str, Any]:
    return {"endpoint": url, "token": "stand-in", "token_expiry_unix_secs": int(time.time()) + 3600}


def _upload(path: Path, url: str) -> str:
    import hf_xet

    with hf_xet.XetSession().new_upload_commit(**_session(url)) as commit:
        handle = commit.start_upload_file(str(path), sha256=hf_xet.COMPUTE_SHA256)
    return str(handle.result().xet_info.hash)


def _download(xet: str, path: Path, url: str) -> None:
    import hf_xet

    with hf_xet.XetSession().new_file_download_group(**_session(url)) as group:
        group.start_download_file(hf_xet.XetFileInfo(xet, None), str(path))


def _token(hub: Hub) -> Reply:
    expires = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": hub.xet.url, "X-Xet-Access-Token": "xet-stand-in", "X-Xet-Token-Expiration": str(expires)}
    return json_reply({"casUrl": hub.xet.url, "accessToken": "xet-stand-in", "exp": expires}, headers=headers)


def _require(hub: Hub) -> None:
    if not hub.xet.enabled:
        raise Refusal(404, "Xet is not enabled for this repository")


@route("xet_read_token", "GET", "/api/models/{repo}/xet-read-token/{revision}")
def read_token(hub: Hub, call: Call) -> Reply:
    _require(hub)
    commit_of(hub.access.read(call.token, hub.find(call)), call["revision"])
    return _token(hub)


@route("xet_write_token", "GET", "/api/models/{repo}/xet-write-token/{revision}")
def write_token(hub: Hub, call: Call) -> Reply:
    """For a pull request the client asks with create_pr=1, and the revision may be the word None."""
    _require(hub)
    pull_request = call.flag("create_pr") or call["revision"].startswith("refs/pr/")
    hub.access.write(call.token, hub.find(call), pull_request=pull_request)
    return _token(hub)
