"""One request and one reply as the routes see them, and the table of routes. The sockets are in server.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from .log import Request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .access import Token
    from .hub import Hub

BLOCK = 1 << 16


class Dropped(Exception):
    """The connection is to be closed without another word."""


@dataclass(frozen=True)
class Part:
    """A range of a file on disk, in bytes."""

    path: Path
    start: int
    length: int

    def blocks(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            stream.seek(self.start)
            left = self.length
            while left > 0 and (block := stream.read(min(left, BLOCK))):
                left -= len(block)
                yield block


@dataclass
class Reply:
    """What goes back. `cut` drops the connection after so many body bytes."""

    body: bytes | Part = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None

    @property
    def length(self) -> int:
        return self.body.length if isinstance(self.body, Part) else len(self.body)

    def blocks(self) -> Iterator[bytes]:
        return self.body.blocks() if isinstance(self.body, Part) else iter([self.body])


def json_reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class Call:
    """A request on its way through a route: path arguments, query, and the body, which is read once."""

    def __init__(self, method: str, target: str, headers: Mapping[str, str], body: BinaryIO, host: str) -> None:
        parts = urlsplit(target)
        self.method = method
        self.raw_path = parts.path
        self.query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.queries = parse_qs(parts.query)
        self.headers = headers
        self.arguments: dict[str, str] = {}
        self.token: Token | None = None
        self.limit: int | None = None  # drop the connection after so many bytes of the body
        self.entry = Request(
            method, host, unquote(parts.path), parts.query, "Authorization" in headers,
            headers.get("Range"), headers.get("User-Agent", ""),
        )  # fmt: skip
        self._body = body
        self._read = False
        self._form: dict[str, list[str]] | None = None

    @property
    def bearer(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def __getitem__(self, name: str) -> str:
        return self.arguments[name]

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def body(self) -> bytes:
        return b"".join(self.blocks())

    def json(self) -> Any:
        return json.loads(self.body() or b"{}")

    def form(self) -> dict[str, list[str]]:
        """A urlencoded body; read once, kept."""
        if self._form is None:
            self._form = parse_qs(self.body().decode())
        return self._form

    def save(self, path: Path) -> None:
        """Streams the body into a file; a body that is cut short leaves no file."""
        try:
            with path.open("wb") as stream:
                for block in self.blocks():
                    stream.write(block)
        except BaseException:
            path.unlink()
            raise

    def blocks(self) -> Iterator[bytes]:
        """The body, block by block; nothing the second time."""
        if self._read:
            return
        self._read = True
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        for block in self._chunks() if chunked else self._counted(int(self.headers.get("Content-Length") or 0)):
            self.entry.received += len(block)
            yield block
            if self.limit is not None and self.entry.received >= self.limit:
                raise Dropped

    def _counted(self, length: int) -> Iterator[bytes]:
        while length > 0:
            allowed = BLOCK if self.limit is None else self.limit - self.entry.received
            if not (block := self._body.read(min(length, BLOCK, allowed))):
                raise Dropped
            length -= len(block)
            yield block

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._body.readline().split(b";")[0] or b"0", 16):
            yield from self._counted(size)
            self._body.readline()
        self._body.readline()


Handler = Callable[["Hub", Call], Reply]


@dataclass(frozen=True)
class Route:
    """A name that tests and faults use, the host it lives on, and the requests it answers."""

    name: str
    host: str
    method: str
    pattern: re.Pattern[str]
    handler: Handler


ROUTES: list[Route] = []


def route(name: str, method: str, template: str, host: str = "hub") -> Callable[[Handler], Handler]:
    """Registers a handler. `{repo}` is namespace/name, `{x}` one segment (which may hold a quoted /), `{x...}` the rest."""
    text = re.sub(r"\{repo\}", r"(?P<repo>[^/]+/[^/]+)", template)
    text = re.sub(r"\{(\w+)\.\.\.\}", r"(?P<\1>.*)", text)
    text = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", text)

    def register(handler: Handler) -> Handler:
        ROUTES.append(Route(name, host, method, re.compile(text), handler))
        return handler

    return register


def find(call: Call) -> Route | None:
    """The route of a call, whose path arguments are set."""
    method = "GET" if call.method == "HEAD" else call.method
    for candidate in ROUTES:
        if (
            candidate.method == method
            and candidate.host == call.entry.host
            and (m := candidate.pattern.fullmatch(call.raw_path))
        ):
            call.arguments = {name: unquote(value) for name, value in m.groupdict().items()}
            call.entry.route = candidate.name
            call.entry.file = call.arguments.get("file")
            return candidate
    return None
