# SPDX-License-Identifier: MIT
"""Names of hosts, services and users for people, looked up outside the stream."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Self

import numpy as np

from nlproto.host.netns import NAMED
from nlproto.host.procfs import user_name as user
from nlproto.records.wire import bounded
from nlproto.running.left_behind import LeftBehind

_SETTLED_NS = 2_000_000_000

__all__ = [
    "HostNames",
    "Namespaces",
    "interface",
    "nat",
    "netns",
    "own_hosts",
    "own_users",
    "service",
    "services",
    "user",
]


@lru_cache(1)
def services(path: str = "/etc/services") -> dict[tuple[int, str], str]:
    """Return names by port and protocol (services(5)); the first name of a port counts."""
    known: dict[tuple[int, str], str] = {}
    for name, *rest in _words(path):
        port, _, proto = rest[0].partition("/") if rest else ("", "", "")
        if _NUMBER.fullmatch(port) and proto:
            known.setdefault((int(port), proto), name)
    return known


def service(port: int, proto: str) -> str:
    """Return the name of a port below 49152 in /etc/services, else its number."""
    # the ephemeral range has no services, whatever the file says
    return services().get((port, proto), str(port)) if port < 49152 else str(port)


def nat(near: str, far: str) -> str:
    """Return in one text what NAT makes of the near and the far end; "" for the same."""
    return f"{near} <> {far}" if near and far else near or f"{'<> ' * bool(far)}{far}"


@lru_cache(256)
def interface(index: int) -> str:
    """Return the name of an interface of this network namespace, or if<N>."""
    try:
        return bounded(os.fsencode(socket.if_indextoname(index)))
    except (OSError, OverflowError):
        return f"if{index}"


def netns(inode: int, since_s: float | None = None) -> str:
    """Return the name of a network namespace by `ip netns`, else its inode.

    `since_s`: when it was seen. Inodes are reused: one seen before the names last changed keeps its
    number.
    """
    known, changed_s = _namespaces()
    if inode not in known or (since_s is not None and since_s < changed_s):
        return str(inode)
    return known[inode]


class Namespaces:
    """Says in which network namespace something is, unless that is obvious.

    `own`: the reader's, which needs no word. None: the data is from a file. Its namespaces may be
    another machine's, so they are numbers, shown only if there are several.
    """

    def __init__(self, own: int | None) -> None:
        self._own = own
        self._first = 0
        self.several = False
        """Whether a file has more than one (see())."""

    def see(self, numbers: np.ndarray) -> None:
        """Learn of namespaces before they are shown; 0 is unknown."""
        if not self.several:
            there = np.unique(numbers)
            there = there[there != 0]
            self._first = self._first or int(there[0] if len(there) else 0)
            self.several = bool(np.any(there != self._first))

    def name(self, number: int) -> str:
        """Return the word for a namespace; "" if it is obvious."""
        if number == 0 or number == self._own:
            return ""
        if self._own is None:
            return str(number) if self.several else ""
        return netns(number)


def _namespaces() -> tuple[dict[int, str], float]:
    """Names by inode, and when they last changed. Read again when the directory changes."""
    try:
        changed = os.stat(NAMED).st_mtime_ns
    except OSError:
        return {}, 0.0
    # a name that is just being created is not mounted yet
    read = _named if time.time_ns() - changed > _SETTLED_NS else _named.__wrapped__
    return read(changed), changed / 1e9


@lru_cache(1)
def _named(changed_ns: int) -> dict[int, str]:
    found = {}
    for entry in os.scandir(NAMED):
        with suppress(OSError):
            found[entry.stat().st_ino] = entry.name
    return found


def own_hosts(path: str = "/etc/hosts") -> dict[str, str]:
    """Return names by address that need no lookup: localhost has its name from the first line."""
    known: dict[str, str] = {}
    for address, *hosts in _words(path):
        if hosts:
            known.setdefault(address, hosts[0])
    return known


def own_users(path: str = "/etc/passwd") -> dict[int, str]:
    """Return the names of this machine's own users by uid (passwd(5))."""
    known: dict[int, str] = {}
    for name, _, uid, *_ in (line.split(":") for line in _lines(path) if line.count(":") > 2):
        if _NUMBER.fullmatch(uid):
            known.setdefault(int(uid), name)
    return known


def _lines(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            return [bounded(line) for line in file.read(_MAX_FILE).split(b"\n")]
    except OSError:
        return []


_NUMBER = re.compile(r"[0-9]{1,10}")
_WAITING = 1000  # the most names that wait to be looked up
_MAX_FILE = 16 << 20  # the most bytes that are read of a table of names


def _words(path: str) -> Iterator[list[str]]:
    """Yield the words of each line that has any, without comments."""
    for line in _lines(path):
        words = [word for word in re.split(r"[ \t\r\f\v]+", line.partition("#")[0]) if word]
        if words:
            yield words


class HostNames:
    """Names of hosts and users, looked up in a thread. A context manager.

    Nothing here waits: an address or uid is shown until its name is known. At most `limit` names
    are kept, and at most 1,000 wait.
    """

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._known: dict[str | int, str] = dict((*own_hosts().items(), *own_users().items()))
        self._worker = LeftBehind("names", self._look_up, _WAITING, (OSError, UnicodeError))

    def __enter__(self) -> Self:
        self._worker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()

    def host(self, address: str) -> str:
        """Return the host's name if it is known now, else `address`."""
        return self._name(address)

    def user(self, uid: int) -> str:
        """Return the user's name if it is known now, else `uid` as text."""
        return self._name(uid)

    def _name(self, key: str | int) -> str:
        name = self._known.get(key)
        if name is None:
            if len(self._known) >= self._limit:
                self._known.clear()
            name = str(key)
            self._known[key] = name  # before the thread can set the name
            if not self._worker.add(key):
                del self._known[key]
        return name

    def _look_up(self, key: str | int) -> None:
        if isinstance(key, int):
            self._known[key] = user(key)
        else:
            self._known[key] = bounded(os.fsencode(socket.gethostbyaddr(key)[0]))
