# SPDX-License-Identifier: MIT
"""Names records that the module could not name, by sock_diag and /proc/PID/fd.

Engine `packet` names its own records, in packet_names.py, as soon as it has read them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from nlproto.errors import Error
from nlproto.host.holders import Holders
from nlproto.host.namespace_sockets import NamespaceSockets
from nlproto.host.netns import Finder
from nlproto.host.procfs import Owner
from nlproto.host.sockdiag import TcpState
from nlproto.records.wire import lib, taken
from nlproto.running.budget import Budget, Patience
from nlproto.tables.flows import address_bytes, group, unnamed_places

__all__ = ["Namer", "RecordNamer"]

_OPEN = (lib.SNIFFER_HOW_PREDATES, lib.SNIFFER_HOW_NOT_PROBED)
"""Reasons for which user space may find a name."""
_FILLED = ("cookie", "inode", "how", "flags", "comm", "tgid", "start_ns", "uid")
_FRESH_NS = 250_000_000
_REMEMBERED_NS = 120_000_000_000
_LATE_NS = 1_000_000_000
"""Older packets are not looked up: others wait behind them."""
_AGAIN_SHARE, _AGAIN_SAVED_NS = 8, 100_000_000
"""Part of the time for lookups where the engine had no time, or cannot know."""
_AGAIN_NS = 100_000_000  # and the longest time of them at once: who subscribes waits
_LIMIT = 65536
_LOOK_SHARE = 10  # part of the time for looks for new namespaces,
_OTHERS_NS = 50_000_000  # and the longest time of one for those of users
_LOOK_S = 0.05  # and the longest wait for one: who subscribes waits

_Key = tuple[int, int, bytes, int, bytes, int]


@dataclass(frozen=True, slots=True)
class _Found:
    cookie: int
    inode: int
    owners: tuple[Owner, ...]
    asked_ns: int
    listening: bool = False


class RecordNamer(Protocol):
    """What names records in user space: Namer, or what a client's daemon knows."""

    def name(self, records: np.ndarray) -> None:
        """Fill in owner, `how` and `flags` of the RECORDs that the engine could not name."""


class Namer:
    """Looks up each flow once, and again when the answer is a quarter of a second old.

    A context manager, for one thread. `start_of` is Processes.start_of. A closed socket may still
    send: if the kernel reports the same cookie, its last owner counts.
    """

    def __init__(
        self,
        start_of: Callable[[int, int], int] = lambda tgid, start_ns: start_ns,
        holders: Holders | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
        finder: Finder | None = None,
    ) -> None:
        self._start_of = start_of
        self._holders = Holders() if holders is None else holders
        self._now_ns = now_ns
        self._namespaces = NamespaceSockets(now_ns, _LOOK_SHARE, _OTHERS_NS, finder, _LOOK_S)
        self._known: dict[tuple[int, _Key], _Found] = {}
        self._again = Budget(_AGAIN_SHARE, _AGAIN_SAVED_NS, now_ns)
        self._patience = Patience(0, 0, lambda: False, now_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._namespaces.close()

    def name(self, records: np.ndarray) -> None:
        """Fill in owner, socket, `how` and flags of unnamed RECORDs. Others stay as they are."""
        places = unnamed_places(records, _OPEN)
        places = places[self._now_ns() - records["time_ns"][places].astype(np.int64) < _LATE_NS]
        if not len(places):
            return
        flows, belongs = group(taken(records, places))
        self._patience = Patience(0, _AGAIN_NS, lambda: False, self._now_ns)
        answers = np.zeros(len(flows), records.dtype)
        for field in _FILLED:
            answers[field] = flows[field]
        again = flows["how"] == lib.SNIFFER_HOW_NOT_PROBED
        for index in np.argsort(again, kind="stable").tolist():
            if again[index] and self._patience.is_over():
                break  # to look at each would take as long
            self._answer(answers[index : index + 1], flows[index])
        for field in _FILLED:
            records[field][places] = answers[field][belongs]

    def _answer(self, answer: np.ndarray, flow: np.void) -> None:
        found = self._find(flow)
        if found is None or not found.owners:
            return
        other = flow["cookie"] and flow["cookie"] != found.cookie
        if other or (found.listening and not flow["cookie"]):
            return  # another socket: the port's next one, or the listener of a connection
        owner = found.owners[0]  # the youngest: it probably got the socket to use it
        answer["cookie"] = found.cookie
        answer["inode"] = found.inode
        answer["how"] = lib.SNIFFER_HOW_DIAG
        answer["tgid"] = owner.identity.tgid
        identity = owner.identity
        answer["start_ns"] = self._start_of(identity.tgid, identity.start_ns)
        answer["uid"] = owner.uid
        answer["comm"] = owner.comm
        if len(found.owners) > 1:
            answer["flags"] |= lib.SNIFFER_F_SHARED

    def _find(self, flow: np.void) -> _Found | None:
        key = (
            int(flow["proto"]),
            int(flow["family"]),
            address_bytes(flow["laddr"]),
            int(flow["lport"]),
            address_bytes(flow["raddr"]),
            int(flow["rport"]),
        )
        netns, now = int(flow["netns"]), self._now_ns()
        known = self._known.get((netns, key))
        if known is not None and now - known.asked_ns < _FRESH_NS:
            return known
        if flow["how"] == lib.SNIFFER_HOW_NOT_PROBED:
            if not self._again.allows():
                return None
            over = self._patience.is_over
            with self._again.spend(), self._holders.beside.waiting_until(over):
                found = self._ask(netns, key, known, now)
        else:
            found = self._ask(netns, key, known, now)
        if len(self._known) >= _LIMIT:
            self._known.clear()
        self._known[netns, key] = found
        return found

    def _ask(self, netns: int, key: _Key, known: _Found | None, now: int) -> _Found:
        diag = self._namespaces.get(netns)
        try:
            there = None if diag is None else diag.find(*key)
        except Error:
            there = None
        if there is None:
            return _Found(0, 0, (), now)
        cookie, inode = int(there["cookie"]), int(there["inode"])
        owners = self._holders.find(inode, int(there["uid"]))
        if not owners and known is not None and known.cookie == cookie:
            if now - known.asked_ns < _REMEMBERED_NS:
                owners, inode = known.owners, known.inode
        listening = key[0] == socket.IPPROTO_TCP and int(there["state"]) == TcpState.LISTEN
        return _Found(cookie, inode, owners, now, listening)
