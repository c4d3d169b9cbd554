# SPDX-License-Identifier: MIT
"""Present sockets and their holders: the kernel's tables of the last look, checked in /proc."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from daemon.history.memory import Question, translated_fields
from nlproto.host import procfs
from nlproto.host.kernel_sockets import KernelSockets
from nlproto.host.sockdiag import HOST_SOCKET
from nlproto.host.sockets import fields, fitting, held, listening, unmapped
from nlproto.overheard.translations import Translations
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records.ends import Translated, Way
from nlproto.records.wire import text
from nlproto.tables.port_owner import PortOwner
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import ProcessKey

__all__ = ["Looking", "holder", "sockets_now"]

_SHOWN = 1000
"""The most sockets in one answer."""
_LOOKED = 5000
"""The most sockets whose holders are searched."""
_HOLDERS = 20_000
"""The most holders of all these sockets."""
_ASKED = 2000
"""The most processes whose descriptors one question reads."""
_INODES = 4_000_000
"""The most sockets of these."""
_SAME_PORT = 500
"""The most owners of a port that are checked for a socket with unknown holders."""


class Looking:
    """The limits of one question, and what it has read already.

    `uid`: only sockets and holders of this owner are shown; None: all. `stop` raises to end the
    answer, and is called every few ms.
    """

    def __init__(self, uid: int | None = None, stop: Callable[[], None] = lambda: None) -> None:
        self.uid = uid
        self.stop = stop
        self.truncated = False
        """Whether something was left out."""
        self._inodes: dict[int, np.ndarray | None] = {}
        self._inodes_left, self._holders_left = _INODES, _HOLDERS

    def is_mine(self, uid: int | None) -> bool:
        return self.uid is None or uid == self.uid

    def inodes(self, pid: int) -> np.ndarray | None:
        """Return `pid`'s sockets, sorted; None: it may not be read, or the limit is reached."""
        if pid not in self._inodes:
            self.stop()
            if len(self._inodes) >= _ASKED or self._inodes_left <= 0:
                self.truncated = True
                return None
            held, asked = procfs.held_sockets([pid])
            self._inodes_left -= len(held)
            self._inodes[pid] = np.unique(held["inode"]) if asked else None
        return self._inodes[pid]

    def holds(self, pid: int, inode: int) -> bool | None:
        """Return whether `pid` has this socket; None: as in sockets_of(), not known."""
        inodes = self.inodes(pid)
        if inodes is None:
            return None
        place = int(np.searchsorted(inodes, np.uint64(inode)))
        return place < len(inodes) and int(inodes[place]) == inode

    def takes_holder(self) -> bool:
        """Return whether one more may be searched."""
        self.stop()
        self._holders_left -= 1
        if self._holders_left < 0:
            self.truncated = True
        return self._holders_left >= 0


def sockets_now(
    pipeline: Pipeline,
    kernel: KernelSockets,
    question: Question,
    looking: Looking,
    translations: Translations | None = None,
) -> tuple[int, list[dict[str, Any]]]:
    """Return how many sockets fit, and `limit` of them (at most _SHOWN), listeners first.

    Each has its holders, the last known user first. A translated socket may fit by either pair of
    ends. If there are more, users take turns: one with many sockets hides none of others.
    """
    portmap = pipeline.portmap
    nat = _Nat(translations)
    inodes = _inodes(pipeline, question, looking)
    numbers, rows = _rows(kernel.tables, question, inodes, looking, nat)
    if looking.uid is not None:
        mine = rows["uid"] == looking.uid
        used_by = _users(portmap, rows, looking)
        mine |= np.isin(rows["cookie"], np.fromiter(used_by, np.uint64, len(used_by)))
        numbers, rows = numbers[mine], rows[mine]
    total, limit = 0, min(question.limit, _SHOWN)
    order = np.arange(len(rows))
    if looking.uid is None and len(rows) > limit:
        order = _in_turns(rows["uid"] if portmap is None else portmap.payers(rows["uid"]))
    used_by = _users(portmap, rows[order[:_LOOKED]], looking)
    found: dict[int, dict[str, Any]] = {}
    for at, place in enumerate(order.tolist()):
        if len(found) >= limit or at >= _LOOKED:
            looking.truncated = True
            total += len(rows) - at
            break
        looking.stop()
        row, netns = rows[place], int(numbers[place])
        holders = _holders(pipeline, kernel, looking, row, used_by.get(int(row["cookie"]), ()))
        shown = [one for one in holders if looking.is_mine(one["uid"])]
        if any(_is(one, question) for one in shown):
            total += 1
            became = translated_fields(int(row["family"]), nat.of(netns, row))
            found[place] = fields(netns, row) | became | shown[0] | {"holders": shown}
    return total, [found[place] for place in sorted(found)]


def _in_turns(users: np.ndarray) -> np.ndarray:
    """Return the order in which each user has a first, then each a second, and so on."""
    together = np.argsort(users, kind="stable")
    sorted_users = users[together]
    begins = np.r_[True, sorted_users[1:] != sorted_users[:-1]]
    places = np.arange(len(users))
    turns = np.empty(len(users), np.int64)
    turns[together] = places - np.maximum.accumulate(np.where(begins, places, 0))
    return np.argsort(turns, kind="stable")


class _Nat:
    """The present translations of sockets by NAT."""

    def __init__(self, translations: Translations | None) -> None:
        self._translations = translations

    def of(self, netns: int, row: np.void) -> Translated | None:
        """Return what NAT makes of the ends of one HOST_SOCKET of a namespace."""
        if self._translations is None or not row["dport"]:
            return None
        near, far = (row[name].tobytes() for name in ("saddr", "daddr"))
        kind = int(row["proto"]), int(row["family"])
        way: Way = (netns, *kind, near, int(row["sport"]), far, int(row["dport"]))
        return self._translations.find_now(way)

    def fitting(
        self, netns: int, table: np.ndarray, question: Question, looking: Looking
    ) -> np.ndarray:
        """Return which HOST_SOCKETs fit by their translated ends."""
        mask = np.zeros(len(table), bool)
        if self._translations is None or (question.port, question.host) == (None, None):
            return mask
        maybe = self._translations.maybe(table["sport"], table["dport"])
        maybe &= (table["dport"] != 0) & (table["inode"] != 0)
        if question.proto is not None:
            maybe &= table["proto"] == question.proto
        for at in np.flatnonzero(maybe).tolist():
            looking.stop()
            became = self.of(netns, table[at])
            mask[at] = became is not None and _fits(table[at], became, question)
        return mask


def _fits(row: np.void, became: Translated, question: Question) -> bool:
    """Return whether a translated socket fits; each condition may fit either pair of ends."""
    _, lport, far, rport = became
    if question.port not in (None, lport, rport, int(row["sport"]), int(row["dport"])):
        return False
    if question.host is None:
        return True
    size = 4 if row["family"] == socket.AF_INET else 16
    fars = (row["daddr"].tobytes(), far)
    return any(ipaddress.ip_address(one[:size]) in question.host for one in fars)


def holder(tgid: int, start_ns: int, comm: str, uid: int) -> dict[str, Any]:
    """Return one holder of a socket, for a client."""
    return {"pid": tgid, "start_ns": start_ns, "comm": comm, "uid": uid}


def _users(
    portmap: PortMap | None, rows: np.ndarray, looking: Looking
) -> Mapping[int, list[PortOwner]]:
    """Return the known users of the sockets `rows`, by cookie."""
    cookies = rows["cookie"][rows["cookie"] != 0]
    if portmap is None or not len(cookies):
        return {}
    found = portmap.with_cookies(cookies.tolist(), looking.uid, _HOLDERS)
    looking.truncated |= sum(map(len, found.values())) >= _HOLDERS
    return found


def _inodes(pipeline: Pipeline, question: Question, looking: Looking) -> np.ndarray | None:
    """Return the sockets of the processes that are asked for; None: of any."""
    if question.pid is None and question.pname is None:
        return None
    found = [np.zeros(0, np.uint64)]
    name = None if question.comm is None else question.comm.decode("utf-8", "replace")
    for one in pipeline.processes.find(question.pid, name):
        looking.stop()
        if not looking.is_mine(one.uid):
            continue
        there = procfs.identity(one.tgid)
        if there is not None and procfs.same_start(one.start_ns, there.start_ticks):
            inodes = looking.inodes(one.tgid)
            if inodes is not None:
                found.append(inodes)
    return np.unique(np.concatenate(found))


def _rows(
    tables: Mapping[int, np.ndarray],
    question: Question,
    inodes: np.ndarray | None,
    looking: Looking,
    nat: _Nat,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (namespaces, HOST_SOCKETs): listeners first, in order of ports."""
    numbers, parts = [np.zeros(0, np.int64)], [np.zeros(0, HOST_SOCKET)]
    for netns, table in tables.items():
        looking.stop()
        if question.netns not in (None, netns):
            continue
        table = unmapped(table)
        mask = held(table) & (table["inode"] != 0)
        mask &= fitting(table, question.port, question.proto, question.host) | nat.fitting(
            netns, table, question, looking
        )
        if question.listening:
            mask &= listening(table)
        if inodes is not None:
            mask &= np.isin(table["inode"], inodes)
        parts.append(table[mask])
        numbers.append(np.full(len(parts[-1]), netns, np.int64))
    rows, where = np.concatenate(parts), np.concatenate(numbers)
    order = np.lexsort((where, rows["sport"], rows["dport"] != 0))
    return where[order], rows[order]


def _holders(
    pipeline: Pipeline,
    kernel: KernelSockets,
    looking: Looking,
    row: np.void,
    used: Iterable[PortOwner],
) -> list[dict[str, Any]]:
    """Return a socket's holders by /proc, or its known users if /proc is refused."""
    inode = int(row["inode"])
    found: dict[ProcessKey, dict[str, Any]] = {}
    start_of = pipeline.processes.start_of
    for one in used:
        if looking.takes_holder() and looking.holds(one.tgid, inode) is not False:
            start_ns = start_of(one.tgid, one.start_ns)
            found[one.tgid, start_ns] = holder(one.tgid, start_ns, one.comm, one.uid)
    known = list(_known(kernel, inode, looking))
    if not found and not known and pipeline.portmap is not None:
        # accepted or created since the last walk: its holder may be another owner of the same port
        port = int(row["sport"])
        same_port = pipeline.portmap.who(port, uid=looking.uid, limit=_SAME_PORT + 1)
        looking.truncated |= len(same_port) > _SAME_PORT
        for one in same_port[:_SAME_PORT]:
            if looking.holds(one.tgid, inode):
                start_ns = start_of(one.tgid, one.start_ns)
                found[one.tgid, start_ns] = holder(one.tgid, start_ns, one.comm, one.uid)
    for other in known:
        identity = other.identity
        start_ns = start_of(identity.tgid, identity.start_ns)
        one_holder = holder(identity.tgid, start_ns, text(other.comm), other.uid)
        found.setdefault((identity.tgid, start_ns), one_holder)
    return list(found.values())


def _known(kernel: KernelSockets, inode: int, looking: Looking) -> Iterator[procfs.Owner]:
    for one in kernel.holders_of(inode):
        if not looking.takes_holder():
            break
        yield one


def _is(one: Mapping[str, Any], question: Question) -> bool:
    if question.pid is not None and one["pid"] != question.pid:
        return False
    name = None if question.comm is None else question.comm.decode("utf-8", "replace")
    return name is None or one["comm"] == name
