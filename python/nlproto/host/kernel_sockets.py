# SPDX-License-Identifier: MIT
"""Sockets with all their holders, from the kernel's tables."""

from __future__ import annotations

import functools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import NamedTuple, Self

import numpy as np

from nlproto.host.holders import Holders
from nlproto.host.namespace_sockets import NamespaceSockets
from nlproto.host.netns import Finder
from nlproto.host.procfs import Owner
from nlproto.host.sockdiag import HOST_SOCKET, TcpState
from nlproto.host.sockets import held
from nlproto.records.ends import MAPPED
from nlproto.records.wire import among, text
from nlproto.running.budget import Budget, Patience

__all__ = ["Endpoint", "BoundSocket", "KernelSockets", "HeldSockets"]

_HELD_NS = 3_000_000_000
"""Time between two checks of the holders of all bound sockets."""
_CHECK_SHARE, _CHECK_SAVED_NS = 100, 20_000_000
"""The check takes at most this part of the time. With many sockets a round takes longer."""
_CHUNK = 32
"""How many are checked between two looks at the clock."""
_UNHELD_SHARE = 20
"""Looking for who holds the others, that nobody is known to hold, takes this part of the time."""
_UNHELD_NS = 250_000_000
"""So long after the first time, and twice as long each time: most of what stays is the kernel's."""
_ROUND_NS = 60_000_000_000
"""The same for a connected socket, which traffic shows sooner."""
_NEW = 2000
"""How many new sockets of users one look asks about; the next one asks about others."""
_SEARCH_NS = 200_000_000
"""How long a look may search; root's sockets come first, and the next look goes on."""
_WALK_S = 0.2  # to wait for a walk before
_WALK_SHARE = 1000  # such walks, when all is known, take this part of one core
_LOOK_S = 0.1  # to wait for a look for new namespaces
_ASKED = 200
"""How many connected sockets of a round one look asks about."""


Endpoint = tuple[int, int, int, bytes, int]
"""(netns, protocol number, family, 16 address bytes, port): the local end of a socket."""


class BoundSocket(NamedTuple):
    """A socket of the kernel's tables with one of its holders."""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int

    @property
    def key(self) -> tuple[int, int]:
        """(tgid, start_ns) of its process."""
        return self.tgid, self.start_ns


class HeldSockets(NamedTuple):
    """One entry for each holder of each socket."""

    bound: list[BoundSocket]
    """Listeners and bound UDP sockets that are new or have another holder."""
    changed: np.ndarray
    """Cookies of these sockets. Their other known holders no longer count."""
    present: np.ndarray | None
    """Cookies of all bound sockets. None: `bound` has all of them, without cookies."""
    connected: list[BoundSocket]
    """Some connected sockets. Each of them is here once in a round of a minute."""
    cookies: np.ndarray
    """Cookies of all sockets that a process still has; empty if sock_diag is refused."""


class KernelSockets:
    """Sockets of every network namespace that can be entered. A context manager, for one thread.

    `others_ns`: as in NamespaceSockets. With it, a look has a limit for searches of holders too.
    """

    def __init__(
        self,
        holders: Holders | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
        others_ns: int | None = None,
        finder: Finder | None = None,
    ) -> None:
        self._holders = Holders() if holders is None else holders
        self._now_ns = now_ns
        wait_s = None if others_ns is None else _LOOK_S
        self._namespaces = NamespaceSockets(
            now_ns, others_ns=others_ns, finder=finder, wait_s=wait_s
        )
        self._hurried = others_ns is not None
        self._held: dict[int, tuple[Owner, ...]] = {}
        self._ports: dict[int, int] = {}
        self._unchecked: list[int] = []
        self._checks_ns = now_ns() + _HELD_NS
        self._unheld: set[int] = set()
        self._unheld_times = self._unheld_ns = 0
        self._unheld_budget = Budget(_UNHELD_SHARE, _CHECK_SAVED_NS, now_ns)
        self._check_budget = Budget(_CHECK_SHARE, _CHECK_SAVED_NS, now_ns)
        self._round_ns = now_ns()
        self._met, self._asked = np.zeros((2, 0), np.uint64)
        """Cookies of the last look's connections, and of those that were asked about."""
        self._new_budget = Budget(_CHECK_SHARE, _CHECK_SAVED_NS, now_ns)
        self._waiting: list[tuple[int, np.void]] = []
        self._unasked: set[int] = set()
        """Of which users there were sockets that this look did not ask about."""
        self._behind: set[int] | None = set()
        """Whose sockets the last look had no time for; None: anybody's."""
        self.tables: dict[int, np.ndarray] = {}
        """Maps each namespace to all its sockets (HOST_SOCKET), as of the last look."""
        self.looked_ns = 0
        """When that look began, CLOCK_MONOTONIC; 0: there was none yet."""
        self._ahead: Future[HeldSockets] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._namespaces.close()

    def holders_of(self, inode: int) -> Iterator[Owner]:
        """Return who holds a socket now, as far as known. From any thread."""
        return self._holders.peek(inode)

    def read(self) -> HeldSockets:
        """Look at the tables of all namespaces. The cost grows with their size. See HeldSockets."""
        if (ahead := self._ahead) is not None:
            self._ahead = None
            return ahead.result()
        return self._look()

    def look_ahead(self) -> None:
        """Begin in a thread that nobody waits for at the end. The next read() has its result."""
        ahead = self._ahead = Future[HeldSockets]()

        def look() -> None:
            try:
                ahead.set_result(self._look())
            except Exception as error:
                ahead.set_exception(error)

        threading.Thread(target=look, name="first look", daemon=True).start()

    def _look(self) -> HeldSockets:
        began = self._now_ns()
        tables = self._namespaces.tables()
        self._unasked = set()
        limit_ns = _SEARCH_NS if self._hurried else 1 << 62
        patience = Patience(0, limit_ns, lambda: False, self._now_ns)
        with self._holders.beside.waiting_until(patience.is_over):
            found = self._read(tables)
        self.tables, self.looked_ns = tables, began
        behind = self._namespaces.behind()
        self._behind = None if behind is None else behind | self._unasked
        return found

    def is_behind(self, uid: int | None) -> bool:
        """Return whether the last look had no time for all sockets of `uid`; None: of anybody."""
        behind = self._behind
        return behind is None or (bool(behind) if uid is None else uid in behind)

    def _read(self, tables: dict[int, np.ndarray]) -> HeldSockets:
        numbers = list(tables)
        parts = [tables[number][_is_bound(tables[number])] for number in numbers]
        bound = np.concatenate(parts) if parts else np.zeros(0, HOST_SOCKET)
        netns = np.repeat(np.array(numbers, np.int64), [len(part) for part in parts])
        there = [table["cookie"][held(table)] for table in tables.values()]
        cookies = np.concatenate(there) if there else np.zeros(0, np.uint64)
        whole = bool(np.any(bound["cookie"] == 0))
        if whole:
            # /proc/net has no cookies
            rows = np.arange(len(bound))
            asked = zip(bound["inode"].tolist(), bound["uid"].tolist(), strict=True)
            find, known = self._holders.find, self._holders.known
            owners = [find(inode, uid) or known(inode) for inode, uid in asked]
            self._held.clear()
        else:
            rows = self._changed(bound)
            owners = [self._held.get(cookie, ()) for cookie in bound["cookie"][rows].tolist()]
        entries = _entries_of(bound[rows], netns[rows], owners)
        return HeldSockets(
            entries,
            bound["cookie"][rows],
            None if whole else bound["cookie"],
            [*self._of_this_turn(tables), *self._of_new_ones(tables)],
            cookies[cookies != 0],
        )

    def _changed(self, bound: np.ndarray) -> np.ndarray:
        """Return rows of `bound` that are new, changed hands, or share a port with such a row.

        The port map has one row for all sockets of a process at one end, as SO_REUSEPORT allows.
        """
        cookies = bound["cookie"]
        before = np.fromiter(self._held, np.uint64, len(self._held))
        ports = set()
        for cookie in before[~among(before, cookies)].tolist():
            del self._held[cookie]
            ports.add(self._ports.pop(cookie))
        new = np.flatnonzero(~among(cookies, before))
        order = np.argsort(cookies)
        unheld = {one: None for one, owners in self._held.items() if not owners}
        rest_ns = _WALK_SHARE * self._holders.walk_took_ns
        if not unheld.keys() <= self._unheld:
            self._unheld_times, self._unheld_ns = 0, self._holders.walked_ns + rest_ns
        self._unheld = set(unheld)
        ports |= self._ask(bound[_in_turn(bound, new) if before.size else new])
        if unheld and self._now_ns() >= self._unheld_ns and self._unheld_budget.allows():
            pause_ns = min(_UNHELD_NS << self._unheld_times, _ROUND_NS)
            self._unheld_ns = self._now_ns() + max(pause_ns, rest_ns)
            self._unheld_times = min(self._unheld_times + 1, 10)
            with self._unheld_budget.spend():
                rows = _rows_of(random.sample(list(unheld), min(len(unheld), _NEW)), cookies, order)
                ports |= self._ask(bound[rows], together=True)
        now = self._now_ns()
        if not self._unchecked and now >= self._checks_ns:
            self._checks_ns = now + _HELD_NS
            self._unchecked = [one for one, owners in self._held.items() if owners]
        while self._unchecked and self._check_budget.allows():
            with self._check_budget.spend():
                part, self._unchecked = self._unchecked[:_CHUNK], self._unchecked[_CHUNK:]
                ports |= self._ask(bound[_rows_of(part, cookies, order)])
        if not ports:
            return np.zeros(0, np.intp)
        return np.flatnonzero(among(bound["sport"], np.fromiter(ports, np.uint16, len(ports))))

    def _ask(self, sockets: np.ndarray, together: bool = False) -> set[int]:
        """Search holders of some sockets (HOST_SOCKET); return the ports whose holders changed.

        When the look's time is over, the next look asks about the others.
        """
        names = ("inode", "uid", "cookie", "sport")
        inodes, uids, cookies, ports = (sockets[name].tolist() for name in names)
        holders = self._holders
        found = dict(holders.find_together(inodes) if together else holders.find_many(inodes, uids))
        changed: set[int] = set()
        for inode, uid, cookie, port in zip(inodes, uids, cookies, ports, strict=True):
            owners, before = found.get(inode), self._held.get(cookie)
            if owners is None:
                if before is None:
                    self._unasked.add(uid)
            elif owners != before:
                if before and not owners and not holders.allows(uid):
                    continue
                self._held[cookie], self._ports[cookie] = owners, port
                changed.add(port)
        return changed

    def _of_this_turn(self, tables: dict[int, np.ndarray]) -> Iterator[BoundSocket]:
        """Yield entries of the connections that are next in the round."""
        now = self._now_ns()
        if not self._waiting and now >= self._round_ns:
            self._round_ns = now + _ROUND_NS
            numbers, rows = _connected(tables)
            holders = self._holders
            age_ns = now - holders.walked_ns
            if len(rows) and age_ns > max(_HELD_NS, _WALK_SHARE * holders.walk_took_ns):
                holders.walk_beside(_WALK_S)
            self._waiting = list(zip(numbers.tolist(), rows, strict=True))
            self._asked = rows["cookie"]
        part, self._waiting = self._waiting[:_ASKED], self._waiting[_ASKED:]
        for number, row in part:
            yield from _entries(number, row, self._holders.known(int(row["inode"])))

    def _of_new_ones(self, tables: dict[int, np.ndarray]) -> Iterator[BoundSocket]:
        """Yield entries of connections that lasted for two looks: perhaps no packet shows them."""
        numbers, rows = _connected(tables)
        cookies = rows["cookie"]
        new = among(cookies, self._met) & ~among(cookies, self._asked)
        self._met = cookies
        self._asked = self._asked[among(self._asked, cookies)]
        asked = []
        for at in np.flatnonzero(new).tolist():
            if not self._new_budget.allows():
                break
            with self._new_budget.spend():
                owners = self._holders.find(int(rows["inode"][at]), int(rows["uid"][at]))
            asked.append(cookies[at])
            yield from _entries(int(numbers[at]), rows[at], owners)
        self._asked = np.concatenate([self._asked, np.array(asked, np.uint64)])


def _connected(tables: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return (namespaces, HOST_SOCKETs) of all connections."""
    parts = {number: table[_is_connected(table)] for number, table in tables.items()}
    numbers = np.repeat(np.array(list(parts), np.int64), [len(part) for part in parts.values()])
    return numbers, np.concatenate([np.zeros(0, HOST_SOCKET), *parts.values()])


def _in_turn(bound: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return which `rows` of `bound` a look asks about: all of root's, and users' in turn."""
    uids = bound["uid"][rows]
    order = np.argsort(uids, kind="stable")
    in_order = uids[order]
    turns = np.arange(len(rows)) - np.searchsorted(in_order, in_order)
    roots = order[in_order == 0]
    others = order[in_order != 0][np.argsort(turns[in_order != 0], kind="stable")]
    return np.asarray(rows[np.concatenate([roots, others[:_NEW]])])


def _rows_of(some: list[int], cookies: np.ndarray, order: np.ndarray) -> list[int]:
    """Return where those of `some` that `cookies` has are in it. `order` sorts `cookies`."""
    wanted = np.fromiter(some, np.uint64, len(some))
    places = np.searchsorted(cookies, wanted, sorter=order)
    found: list[int] = order[places[places < len(order)]].tolist()
    there = set(some)
    return [row for row in found if int(cookies[row]) in there]


def _entries_of(
    sockets: np.ndarray, netns: np.ndarray, owners: list[tuple[Owner, ...]]
) -> list[BoundSocket]:
    """Return entries of `sockets`, which are in `netns` and have these `owners`."""
    raw = np.ascontiguousarray(sockets["saddr"]).tobytes()
    columns = (sockets[name].tolist() for name in ("cookie", "proto", "family", "sport"))
    about: dict[int, tuple[int, int, int, str]] = {}
    """Of each owner, by its place in memory: many sockets have the same one."""
    entries = []
    for at, number, cookie, proto, family, port, held_by in zip(
        range(0, len(raw), 16), netns.tolist(), *columns, owners, strict=True
    ):
        end = _endpoint(number, proto, family, raw[at : at + 16], port)
        for one in held_by:
            fields = about.get(id(one))
            if fields is None:
                fields = about[id(one)] = _fields(one)
            entries.append(BoundSocket(end, *fields, cookie))
    return entries


def _entries(netns: int, row: np.void, owners: tuple[Owner, ...]) -> Iterator[BoundSocket]:
    end = _endpoint(
        netns, int(row["proto"]), int(row["family"]), row["saddr"].tobytes(), int(row["sport"])
    )
    for owner in owners:
        yield BoundSocket(end, *_fields(owner), int(row["cookie"]))


def _endpoint(netns: int, proto: int, family: int, address: bytes, port: int) -> Endpoint:
    if family == socket.AF_INET6 and address.startswith(MAPPED):
        family, address = socket.AF_INET, address[len(MAPPED) :].ljust(16, b"\0")
    return netns, proto, family, address, port


def _fields(owner: Owner) -> tuple[int, int, int, str]:
    identity = owner.identity
    return identity.tgid, identity.start_ns, owner.uid, _text(owner.comm)


_text = functools.lru_cache(4096)(text)


def _is_connected(table: np.ndarray) -> np.ndarray:
    return np.asarray((table["dport"] != 0) & (table["inode"] != 0) & (table["cookie"] != 0))


def _is_bound(table: np.ndarray) -> np.ndarray:
    udp = table["proto"] == socket.IPPROTO_UDP
    listening = ~udp & (table["state"] == TcpState.LISTEN)
    bound = udp & (table["dport"] == 0) & (table["sport"] != 0)
    return np.asarray((listening | bound) & (table["inode"] != 0))
