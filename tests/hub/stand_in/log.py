"""The record of what was asked: tests read it to say "no weight file was fetched" or "the token never went to the CDN"."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass
class Request:
    """One request. `received` and `sent` count body bytes only; `token` says whether an Authorization header came along."""

    method: str
    host: str  # "hub" or "cdn"
    path: str  # unquoted, without the query
    query: str
    token: bool
    range: str | None
    agent: str
    route: str = "unsupported"
    file: str | None = None  # the path in the repository, where the route is about one file
    status: int = 0
    received: int = 0
    sent: int = 0
    dropped: bool = False


class Requests(list[Request]):
    """Requests in the order they came."""

    def of(
        self, *routes: str, method: str | None = None, path: str = "*", file: str = "*", host: str | None = None
    ) -> Requests:
        """Those on any of `routes` (all of them, if none is named) whose path and file match the globs."""
        return Requests(
            request
            for request in self
            if (not routes or request.route in routes)
            and method in (None, request.method)
            and host in (None, request.host)
            and fnmatchcase(request.path, path)
            and (file == "*" or (request.file is not None and fnmatchcase(request.file, file)))
        )

    @property
    def received(self) -> int:
        """Body bytes that clients sent."""
        return sum(request.received for request in self)

    @property
    def sent(self) -> int:
        """Body bytes that clients were sent."""
        return sum(request.sent for request in self)

    @property
    def routes(self) -> list[str]:
        return [request.route for request in self]

    def __str__(self) -> str:
        return "\n".join(_line(request) for request in self)


def _line(request: Request) -> str:
    marks: Iterable[str] = ("token" if request.token else "", request.range or "", "DROPPED" if request.dropped else "")
    size = f"in {request.received} out {request.sent}"
    return " ".join(
        (request.host, request.method, request.path, f"[{request.route}]", str(request.status), size, *filter(None, marks))
    )
