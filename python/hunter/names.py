# SPDX-License-Identifier: MIT
"""Names of hosts, services and users for people, looked up beside the stream."""

from __future__ import annotations

import pwd
import queue
import socket
import threading
from functools import lru_cache
from types import TracebackType
from typing import Self

__all__ = ["Names", "interface", "own_hosts", "service", "user"]


@lru_cache(4096)
def service(port: int, proto: str) -> str:
    """Return the name of a port below 49152 in /etc/services, else its number."""
    if port < 49152:  # the ephemeral range has no services, whatever the file says
        try:
            return socket.getservbyport(port, proto)
        except (OSError, OverflowError):
            pass
    return str(port)


@lru_cache(1024)
def user(uid: int) -> str:
    """Return the user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@lru_cache(256)
def interface(index: int) -> str:
    """Return the name of an interface of this network namespace, or if<N>."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"if{index}"


def own_hosts(path: str = "/etc/hosts") -> dict[str, str]:
    """Return names by address, which need no waiting: localhost is so named from the first line."""
    known: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                address, *hosts = line.partition("#")[0].split()[:2] or [""]
                if hosts:
                    known.setdefault(address, hosts[0])
    except OSError:
        pass
    return known


class Names:
    """Host names by reverse lookup in one thread of its own; a context manager.

    host() never waits: it gives the address until its name is known. At most `limit` names are
    kept, at most 1,000 wait.
    """

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._known = own_hosts()
        self._wanted: queue.Queue[str | None] = queue.Queue(1000)
        self._thread = threading.Thread(target=self._look_up, name="host names", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the thread behind: a resolver that waits for its server cannot be interrupted."""
        try:
            self._wanted.put_nowait(None)
        except queue.Full:
            pass

    def host(self, address: str) -> str:
        """Return the host's name if it is known by now, else `address`."""
        name = self._known.get(address)
        if name is None:
            if len(self._known) >= self._limit:
                self._known.clear()
            try:
                self._wanted.put_nowait(address)
            except queue.Full:
                return address
            self._known[address] = name = address
        return name

    def _look_up(self) -> None:
        while (address := self._wanted.get()) is not None:
            try:
                self._known[address] = socket.gethostbyaddr(address)[0]
            except (OSError, UnicodeError):
                continue
