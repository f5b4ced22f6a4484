"""The stand-in as a test holds it: start, fill, look inside, break."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from .access import Access
from .faults import Fault, Faults
from .lfs import Multipart
from .log import Requests
from .refusals import Refusal
from .server import CDN_HOST, Server
from .store import GITATTRIBUTES, Commit, Contents, File, Repo, git_blob_id, is_large, lfs_pointer
from .wire import Call
from .xet import Cas

if TYPE_CHECKING:
    from ..client import Client

USER = "me"


class Hub:
    """A Hub on loopback. User "me" owns the namespaces "me" and "team", and holds the write token `token`.

    page_size        entries of a page of `tree` (the Hub has 1000)
    multipart_above  bytes above which LFS uploads go in parts of so many bytes
    requests         every request so far
    crashes          tracebacks of the stand-in's own failures; the fixtures fail a test that leaves one
    """

    client: Client  # set by the fixtures

    def __init__(self, folder: Path, *, xet: bool = False) -> None:
        self.page_size = 1000
        self.multipart_above = 16 * 1024 * 1024
        self.requests = Requests()
        self.crashes: list[str] = []
        self.faults = Faults()
        self.repos: dict[str, Repo] = {}
        self.multiparts: list[Multipart] = []
        self.lock = threading.RLock()
        self._working = 0
        self._idle = threading.Condition()
        self._secret = secrets.token_bytes(8)
        self._salt = secrets.token_hex(8)  # commit ids differ between servers, or client caches would mix them up
        self._folder = folder
        self._server = Server(self)
        self.port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.contents = Contents(folder / "contents")
        self.xet = Cas(folder / "cas", self.contents, self.endpoint, enabled=xet)
        self.access = Access(self.endpoint)
        self.token = self.access.add_user(USER, ("team",))
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused; those that clients keep are cut."""
        self._server.stop()

    def start(self) -> None:
        """Listens again, on the same port."""
        self._server = Server(self, self.port)
        self._serve()

    # Filling it

    def create(self, name: str, *, private: bool = False, gated: str | bool = False) -> Repo:
        """A repository whose only file is .gitattributes."""
        repo = self.repos[name] = Repo(name, self._salt, private=private, gated=gated)
        attributes = self._regular(".gitattributes", GITATTRIBUTES)
        repo.commit("refs/heads/main", {attributes.path: attributes}, "initial commit", "", name.split("/")[0], None)
        return repo

    def add_model(
        self,
        name: str,
        files: Path | Mapping[str, bytes],
        *,
        revision: str = "main",
        private: bool = False,
        gated: str | bool = False,
        tags: Iterable[str] = (),
        message: str = "Add files",
    ) -> str:
        """Commits `files` (a folder, or path → bytes) on a branch, which is made where it is missing; returns the commit id.

        What .gitattributes names goes to LFS, and to Xet where the stand-in has it. `private` and `gated` (True, "auto" or
        "manual") count when the repository is new.
        """
        repo = self.repos.get(name) or self.create(name, private=private, gated="auto" if gated is True else gated)
        ref = f"refs/heads/{revision}"
        parent = repo.refs.setdefault(ref, repo.refs["refs/heads/main"])
        added = {path: self._store(repo, path, source) for path, source in _sources(files)}
        made = repo.commit(ref, {**repo.commits[parent].tree, **added}, message, "", name.split("/")[0], parent)
        repo.refs |= {f"refs/tags/{tag}": made.sha for tag in tags}
        return made.sha

    def _store(self, repo: Repo, path: str, source: Path | bytes) -> File:
        data = source if isinstance(source, bytes) else source.read_bytes()
        if not is_large(path, len(data), data[:512]):
            return self._regular(path, data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.contents.put(sha256, data)
        repo.lfs.add(sha256)
        xet = self.xet.add(self.contents.path(sha256), sha256) if self.xet.enabled else None
        return File(path, len(data), git_blob_id(lfs_pointer(sha256, len(data))), sha256, xet)

    def _regular(self, path: str, data: bytes) -> File:
        oid = git_blob_id(data)
        self.contents.put(oid, data)
        return File(path, len(data), oid)

    def add_user(self, name: str, orgs: tuple[str, ...] = ()) -> str:
        """Another user; returns their write token."""
        return self.access.add_user(name, orgs)

    def add_token(self, role: str, *, user: str = USER, repos: tuple[str, ...] = ()) -> str:
        """Another token: "read", "write", or "fineGrained" for `repos` only."""
        return self.access.add_token(user, role, repos)

    def grant(self, name: str, user: str = USER) -> None:
        """Lets a user into a gated or private repository of others."""
        self.repos[name].granted.add(user)

    # Looking inside

    def find(self, call: Call) -> Repo | None:
        return self.repos.get(call["repo"])

    def head(self, name: str, revision: str = "main") -> str:
        """The commit id of a branch, tag or ref."""
        return self._commit(name, revision).sha

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Path → content of every file, .gitattributes too."""
        return {path: self.contents.path(file.etag).read_bytes() for path, file in self._commit(name, revision).tree.items()}

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        """Newest first, down to the initial commit."""
        return list(self.repos[name].history(self._commit(name, revision)))

    def _commit(self, name: str, revision: str) -> Commit:
        commit = self.repos[name].resolve(revision)
        if commit is None:
            raise KeyError(f"{name} has no revision {revision}")
        return commit

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around every request, for `settle`."""
        with self._idle:
            self._working += 1
        try:
            yield
        finally:
            with self._idle:
                self._working -= 1
                self._idle.notify_all()

    def settle(self) -> None:
        """Waits until every request is over: after a client died, or a connection dropped, the log is late."""
        with self._idle:
            assert self._idle.wait_for(lambda: self._working == 0, timeout=10)

    # Breaking it

    def fault(
        self,
        route: str,
        *,
        file: str = "*",
        times: int = 1,
        skip: int = 0,
        status: int | None = None,
        refusal: Refusal | None = None,
        after_bytes: int | None = None,
        reply_lost: bool = False,
        then: Callable[[], object] | None = None,
    ) -> Fault:
        """Makes requests on a route fail: see faults.Fault. `status=500` is short for a refusal without words of its own."""
        if status is not None:
            refusal = Refusal(status, "Internal Error - We're working hard to fix this as soon as possible!")
        return self.faults.add(Fault(route, file, times, skip, refusal, after_bytes, reply_lost, then))

    def rival_commit(self, name: str, revision: str = "main") -> str:
        """Somebody else's commit, which makes the parent that a writer remembers stale."""
        return self.add_model(name, {"rival.txt": secrets.token_bytes(4).hex().encode()}, revision=revision, message="Rival")

    def expire_links(self) -> None:
        """Every signed link handed out so far is refused from now on."""
        self._secret = secrets.token_bytes(8)

    # Signed links, for the routes

    def signed(self, path: str) -> str:
        """A link to the CDN that says who may use it in its query, not in a header."""
        return f"http://{CDN_HOST}:{self.port}{path}?X-Amz-Signature={self._signature(unquote(path))}&X-Amz-Expires=3600"

    def check_signature(self, call: Call) -> None:
        if call.query.get("X-Amz-Signature") != self._signature(call.entry.path):
            raise Refusal(403, "Request has expired")

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()[:32]


def _sources(files: Path | Mapping[str, bytes]) -> Iterable[tuple[str, Path | bytes]]:
    if isinstance(files, Mapping):
        return files.items()
    return [(path.relative_to(files).as_posix(), path) for path in sorted(files.rglob("*")) if path.is_file()]
