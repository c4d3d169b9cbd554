# SPDX-License-Identifier: MIT
"""The port map: (netns, proto, address, port) -> the processes that own it now."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from nlproto.processes import Key
from nlproto.wire import address_text, text

__all__ = ["BoundSocket", "Endpoint", "Owner", "PortMap"]

Endpoint = tuple[int, int, int, bytes, int]
"""(netns, protocol number, family, 16 address bytes, port): the local end of a socket."""

K = TypeVar("K")
V = TypeVar("V")

_LEARNT = "hash netns proto family lport tgid start_ns uid comm cookie last_ns".split()
_SETTLED_NS = 1_000_000_000


class Owner(NamedTuple):
    """One process at one local end. (A tuple: they are made for every new flow.)"""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int
    listening: bool
    """Found in the kernel's tables as a listener or a bound UDP socket, not by its packets."""
    seen_ns: int
    """CLOCK_MONOTONIC when a packet or the kernel's tables last showed it."""

    @property
    def key(self) -> Key:
        return self.tgid, self.start_ns

    @property
    def netns(self) -> int:
        return self.endpoint[0]

    @property
    def proto(self) -> int:
        return self.endpoint[1]

    @property
    def address(self) -> str:
        return address_text(self.endpoint[2], self.endpoint[3])

    @property
    def port(self) -> int:
        return self.endpoint[4]


@dataclass(frozen=True, slots=True)
class BoundSocket:
    """A socket of the kernel's tables with one of its holders."""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int


class PortMap:
    """Bounded, thread-safe. Traffic alone keeps an owner for `ttl_ns` after its last packet.

    When `limit` owners are reached the least recently seen quarter goes (`evicted` counts them).
    """

    def __init__(self, limit: int = 262144, ttl_ns: int = 120_000_000_000) -> None:
        self.limit = limit
        self.ttl_ns = ttl_ns
        self.evicted = 0
        self._lock = threading.Lock()
        self._owners: dict[tuple[Endpoint, Key], Owner] = {}
        self._ports: dict[int, dict[tuple[Endpoint, Key], Owner]] = {}
        self._processes: dict[Key, set[tuple[Endpoint, Key]]] = {}
        self._cookies: dict[int, set[tuple[Endpoint, Key]]] = {}
        self._settled: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def update(self, flows: np.ndarray) -> None:
        """Learn from FLOWs; forwarded and unnamed ones tell nothing."""
        settled = self._settled
        if len(settled) > 65536:
            settled.clear()
        useful = flows[(flows["tgid"] != 0) & (flows["forwarded"] == 0)]
        new = [
            index
            for index, (number, last) in enumerate(
                zip(useful["hash"].tolist(), useful["last_ns"].tolist(), strict=True)
            )
            if number not in settled or settled[number] + _SETTLED_NS <= last
        ]
        if not new:
            return
        chosen = useful[new]
        raw = np.ascontiguousarray(chosen["laddr"]).tobytes()
        columns = [chosen[name].tolist() for name in _LEARNT]
        with self._lock:
            for at, row in enumerate(zip(*columns, strict=True)):
                number, netns, proto, family, port, tgid, start_ns, uid, comm, cookie, last = row
                settled[number] = last
                endpoint = (netns, proto, family, raw[16 * at : 16 * at + 16], port)
                self._put(endpoint, (tgid, start_ns), uid, text(comm), cookie, False, last)
            self._shrink()

    def replace_bound(self, sockets: Iterable[BoundSocket], now_ns: int) -> None:
        """Take the kernel's present listeners and bound sockets: those not among them are gone."""
        with self._lock:
            present = set()
            for bound in sockets:
                key = (bound.tgid, bound.start_ns)
                present.add((bound.endpoint, key))
                self._put(bound.endpoint, key, bound.uid, bound.comm, bound.cookie, True, now_ns)
            gone = [
                name
                for name, owner in self._owners.items()
                if owner.listening and name not in present
            ]
            for name in gone:
                self._drop(name)
            self._shrink()

    def keep_cookies(self, cookies: set[int], before_ns: int) -> None:
        """Drop owners whose socket is not among all the kernel's `cookies`, read after `before_ns`.

        Owners seen since then, or known without a cookie, stay until their time is over.
        """
        with self._lock:
            for name, owner in list(self._owners.items()):
                if owner.cookie and owner.seen_ns < before_ns and owner.cookie not in cookies:
                    self._drop(name)

    def forget_process(self, key: Key) -> None:
        """The process has exited."""
        with self._lock:
            for name in list(self._processes.get(key, ())):
                self._drop(name)

    def expire(self, now_ns: int) -> None:
        """Drop owners that only traffic showed, and not for `ttl_ns`."""
        with self._lock:
            for name, owner in list(self._owners.items()):
                if not owner.listening and owner.seen_ns + self.ttl_ns < now_ns:
                    self._drop(name)

    def who(
        self, port: int, proto: int | None = None, address: tuple[int, bytes] | None = None
    ) -> list[Owner]:
        """Owners of local `port`, last seen first.

        `proto` is a protocol number; `address` is (family, 16 bytes): sockets bound to exactly it
        or to the wildcard of its family (an IPv6 wildcard takes IPv4 as well).
        """
        found = self._ports.get(port)
        if not found:
            return []
        with self._lock:
            owners = list(found.items())
        return sorted(
            (
                owner
                for (endpoint, _), owner in owners
                if (proto is None or endpoint[1] == proto)
                and (address is None or _serves(endpoint, address))
            ),
            key=lambda owner: -owner.seen_ns,
        )

    def at(self, endpoint: Endpoint) -> list[Owner]:
        """Owners of exactly this local end, last seen first; else those of the wildcard."""
        netns, proto, family, address, port = endpoint
        owners = [o for o in self.who(port, proto, (family, address)) if o.netns == netns]
        exact = [o for o in owners if o.endpoint[2:4] == (family, address)]
        return exact or owners

    def with_cookie(self, cookie: int) -> list[Owner]:
        """Owners of one socket, last seen first."""
        with self._lock:
            names = self._cookies.get(cookie, ())
            owners = [self._owners[name] for name in names]
        return sorted(owners, key=lambda owner: -owner.seen_ns)

    def owned_by(self, key: Key) -> list[Owner]:
        """Every local end of one process."""
        with self._lock:
            return [self._owners[name] for name in self._processes.get(key, ())]

    def everything(self) -> list[Owner]:
        with self._lock:
            return list(self._owners.values())

    def _put(
        self,
        endpoint: Endpoint,
        key: Key,
        uid: int,
        comm: str,
        cookie: int,
        listening: bool,
        seen_ns: int,
    ) -> None:
        name = (endpoint, key)
        known = self._owners.get(name)
        if known is not None:
            # a connection accepted on the listener's own address does not take its place
            if known.listening and not listening:
                listening, cookie = True, known.cookie or cookie
            seen_ns = max(seen_ns, known.seen_ns)
            cookie = cookie or known.cookie
            comm = comm or known.comm
        owner = Owner(endpoint, *key, uid, comm, cookie, listening, seen_ns)
        if known is not None and known.cookie != cookie:
            _discard(self._cookies, known.cookie, name)
        if cookie:
            self._cookies.setdefault(cookie, set()).add(name)
        self._owners[name] = owner
        self._ports.setdefault(endpoint[4], {})[name] = owner
        if known is None:
            self._processes.setdefault(key, set()).add(name)

    def _drop(self, name: tuple[Endpoint, Key]) -> None:
        owner = self._owners.pop(name)
        _discard(self._cookies, owner.cookie, name)
        _discard(self._processes, name[1], name)
        port = name[0][4]
        at_port = self._ports[port]
        del at_port[name]
        if not at_port:
            del self._ports[port]
        self._settled.clear()

    def _shrink(self) -> None:
        if len(self._owners) <= self.limit:
            return
        excess = len(self._owners) - self.limit * 3 // 4
        oldest = sorted(self._owners, key=lambda name: self._owners[name].seen_ns)[:excess]
        for name in oldest:
            self._drop(name)
        self.evicted += excess


def _discard(index: dict[K, set[V]], key: K, value: V) -> None:
    values = index.get(key)
    if values is not None:
        values.discard(value)
        if not values:
            del index[key]


def _serves(endpoint: Endpoint, address: tuple[int, bytes]) -> bool:
    family, raw = address
    if endpoint[3] == raw and endpoint[2] == family:
        return True
    if any(endpoint[3]):
        return False
    return endpoint[2] == family or endpoint[2] > family
