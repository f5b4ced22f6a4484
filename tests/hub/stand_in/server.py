"""The sockets of the stand-in: HTTP/1.1 on 127.0.0.1. The name in the Host header says whether it is the Hub or its CDN."""

from __future__ import annotations

import secrets
import socket
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from . import lfs, reading, writing, xet  # noqa: F401 - their routes register themselves
from .faults import Fault
from .refusals import Refusal
from .wire import Call, Dropped, Reply, find, json_reply

if TYPE_CHECKING:
    from .hub import Hub

CDN_HOST = "localhost"  # another origin than 127.0.0.1, as the CDN is another than the Hub


class Server(ThreadingHTTPServer):
    """Listens on a port of 127.0.0.1 for one Hub."""

    daemon_threads = True

    def __init__(self, hub: Hub, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.hub = hub
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        """Refuses new connections and cuts those that clients keep."""
        self.shutdown()
        self.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours; what is, is in `hub.crashes`."""


class Connection(BaseHTTPRequestHandler):
    """One connection of a client, kept alive."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: `hub.requests` is the log."""

    def _serve(self) -> None:
        host = "cdn" if self.headers.get("Host", "").split(":")[0] == CDN_HOST else "hub"
        call = Call(self.command, self.path, self.headers, self.rfile, host)  # type: ignore[arg-type]
        self.server.hub.requests.append(call.entry)
        with self.server.hub.working():
            self._answer(call)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, call: Call) -> None:
        try:
            reply = answer(self.server.hub, call)
            for _ in call.blocks():
                pass  # what the route did not read would be taken for the next request
            self._send(call, reply)
        except Dropped:
            self._drop(call)
        except ConnectionError:
            self.close_connection = True

    def _send(self, call: Call, reply: Reply) -> None:
        call.entry.status = reply.status
        self.send_response(reply.status)
        for name, value in {"X-Request-Id": f"Root=1-{secrets.token_hex(4)}", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(reply.length))
        self.end_headers()
        if call.method != "HEAD":
            self._send_body(call, reply)
        self.wfile.flush()

    def _send_body(self, call: Call, reply: Reply) -> None:
        for block in reply.blocks():
            left = len(block) if reply.cut is None else reply.cut - call.entry.sent
            call.entry.sent += len(block[:left])
            self.wfile.write(block[:left])
            if left < len(block):
                raise Dropped

    def _drop(self, call: Call) -> None:
        call.entry.dropped = True
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def answer(hub: Hub, call: Call) -> Reply:
    """The reply of the route, or of the fault that meets the call."""
    try:
        return _answer(hub, call)
    except Refusal as refusal:
        return _refused(refusal)
    except (Dropped, ConnectionError):
        raise
    except Exception:
        hub.crashes.append(f"{call.method} {call.entry.path}\n{traceback.format_exc()}")
        return json_reply({"error": "the stand-in itself failed: see hub.crashes"}, 500)


def _answer(hub: Hub, call: Call) -> Reply:
    route = find(call)
    if route is None:
        raise Refusal(501, f"the stand-in has no route for {call.method} {call.entry.path}")
    fault = hub.faults.take(call.entry)
    if fault is not None:
        _begin(fault, call)
    if call.entry.host == "cdn" and call.entry.token:
        raise Refusal(400, "Only one auth mechanism allowed")  # as S3 has it: signed links come without a token
    if call.entry.host == "hub":
        call.token = hub.access.token(call.bearer)
    reply = route.handler(hub, call)
    if fault is not None:
        _end(fault, call, reply)
    return reply


def _begin(fault: Fault, call: Call) -> None:
    if fault.then is not None:
        fault.then()
    if fault.refusal is not None:
        raise fault.refusal
    if call.method in ("PUT", "POST"):
        call.limit = fault.after_bytes


def _end(fault: Fault, call: Call, reply: Reply) -> None:
    if fault.reply_lost:
        raise Dropped
    if call.method == "GET":
        reply.cut = fault.after_bytes


def _refused(refusal: Refusal) -> Reply:
    headers = {"X-Error-Message": refusal.message, **refusal.headers}
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    return json_reply({"error": refusal.message, **refusal.extra}, refusal.status, headers=headers)
