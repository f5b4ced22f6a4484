"""Things that go wrong on purpose: an error reply, a connection that drops, a reply that is lost after the work was done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .log import Request
from .refusals import Refusal


@dataclass
class Fault:
    """What happens to the next `times` requests on `route` whose file (or else path) matches `file`, after `skip` good ones.

    refusal      answered with this error, before the route does anything
    after_bytes  the connection drops after so many body bytes: of the request for PUT and POST, of the reply for GET
    reply_lost   the route does its work, then the connection drops before the reply
    then         called first, in the server's thread: kill a process, push a rival commit …
    """

    route: str
    file: str = "*"
    times: int = 1
    skip: int = 0
    refusal: Refusal | None = None
    after_bytes: int | None = None
    reply_lost: bool = False
    then: Callable[[], object] | None = None
    seen: int = 0

    def meets(self, request: Request) -> bool:
        """Whether this request is one of those to fail; counts it."""
        if request.route != self.route or not fnmatchcase(request.file or request.path, self.file):
            return False
        if self.after_bytes is not None and request.method == "HEAD":
            return False  # there is no body to cut
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times


class Faults:
    """The faults a test has asked for, in that order; at most one meets a request, which the later ones then do not count."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def take(self, request: Request) -> Fault | None:
        with self._lock:
            return next((fault for fault in self._faults if fault.meets(request)), None)

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
