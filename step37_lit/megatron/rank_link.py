"""Connections between the ranks that watch each other."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

SEND_SECONDS = 1.0
LONGEST_LINE = 1 << 16  # bytes of a message


class Link:
    """Messages over a connection: a line of JSON each."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._received = b""
        self._lock = threading.Lock()
        connection.settimeout(SEND_SECONDS)

    def send(self, **message: Any) -> None:
        """Drops it where the other side does not take it; what becomes of that side is found out otherwise."""
        with self._lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are there, None where the connection has ended. To be called when there is something."""
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > LONGEST_LINE:
            return None
        return [json.loads(line) for line in lines]


def listening_socket(backlog: int) -> socket.socket:
    """Of a free port, over IPv6 and IPv4 where the machine has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be known and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)
