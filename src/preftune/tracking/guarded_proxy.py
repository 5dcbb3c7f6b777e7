"""A proxy of this process that lets its tools reach only what an ``AddressPolicy`` allows.

For a tool that brings an HTTP client of its own, such as W&B's service: it is told to go through here, and every connection is
judged by the address that it goes to, those of redirects and of upload URLs that a server answers with too.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from preftune.core.addresses import AddressPolicy, AddressRefused

CONNECT_SECONDS = 15.0
IDLE_SECONDS = 300.0
CHUNK = 1 << 16
_HOP = frozenset({"connection", "proxy-connection", "proxy-authorization", "keep-alive"})


class GuardedProxy:
    """Listens on a free port of loopback, in daemon threads, until it is closed or the process ends.

    ``CONNECT`` makes a tunnel, so certificates are checked by who asked; a plain request is handed on. A host that the policy
    refuses is answered with 403 and the reason.
    """

    def __init__(self, policy: AddressPolicy) -> None:
        class Handler(_Handler):
            allowed = policy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="guarded-proxy", daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a tool. Reads are unbuffered: what follows the headers is pumped from the socket."""

    allowed: AddressPolicy
    rbufsize = 0
    timeout = IDLE_SECONDS

    def do_CONNECT(self) -> None:
        """A tunnel to ``host:port``."""
        host, _, port = self.path.rpartition(":")
        other = self._reach(host, port)
        if other is None:
            return
        with other:
            self.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _pump(self.connection, other)

    def _forward(self) -> None:
        """A plain request, handed on as its origin expects it; the connection ends with its answer."""
        self.close_connection = True
        parts = urlsplit(self.path)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port:
            self.send_error(400, "a proxy takes absolute http URLs and CONNECT")
            return
        other = self._reach(parts.hostname, str(port))
        if other is None:
            return
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"{self.command} {path} HTTP/1.1", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items() if name.lower() not in _HOP]
        with other:
            other.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
            _pump(self.connection, other)

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Every other method is a plain request."""
        if name.startswith("do_"):
            return self._forward
        raise AttributeError(name)

    def _reach(self, host: str, port: str) -> socket.socket | None:
        """A connection to an address of the host that the policy allows; None where it was answered with an error."""
        self.close_connection = True
        if not port.isdigit() or not 0 < int(port) < 65_536:
            self.send_error(400, "no port")
            return None
        try:
            places = self.allowed.places(host, int(port))
            return socket.create_connection((places[0], int(port)), CONNECT_SECONDS)
        except AddressRefused as error:
            self.send_error(403, explain=str(error))
        except OSError as error:
            self.send_error(502, explain=f"{host}: {error.strerror or error}")
        return None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Nothing: paths of tools may hold what is not to be logged."""


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Bytes both ways until the far side has ended, or nothing came for IDLE_SECONDS."""
    to = {one: other, other: one}
    open_ = [one, other]
    with contextlib.suppress(OSError):
        while other in open_:
            ready, _, _ = select.select(open_, [], [], IDLE_SECONDS)
            if not ready:
                return
            for side in ready:
                content = side.recv(CHUNK)
                if content:
                    to[side].sendall(content)
                    continue
                open_.remove(side)
                to[side].shutdown(socket.SHUT_WR)
