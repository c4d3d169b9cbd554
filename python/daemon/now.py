# SPDX-License-Identifier: MIT
"""Who has which sockets at this moment: the kernel's tables of the last look, checked in /proc."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from daemon.history import Question
from nlproto import procfs
from nlproto.bound import KernelSockets
from nlproto.pipeline import Pipeline
from nlproto.portmap import Owner
from nlproto.processes import Key
from nlproto.sockets import fields, fitting, held, unmapped
from nlproto.wire import text

__all__ = ["holder", "sockets_now"]

_ASKED = 500
"""Processes whose descriptors are read for one question."""

_CHECKED = 1000
"""Sockets whose holders are looked at for one question."""

Row = tuple[int, np.void]
"""(namespace, HOST_SOCKET)."""


def sockets_now(
    pipeline: Pipeline, kernel: KernelSockets, question: Question, uid: int | None
) -> tuple[int, list[dict[str, Any]]]:
    """How many sockets fit, and the first `limit` (at most _CHECKED) of them, listeners first.

    `uid`: only sockets of this owner; None: all. Each has its holders, the last known user first.
    """
    if question.port is question.pid is question.pname is question.host is None:
        return 0, []
    asked = _Asked()
    inodes = _inodes(pipeline, question, asked)
    rows = list(_rows(kernel.tables, question, inodes))
    portmap = pipeline.portmap
    by_cookie: Mapping[int, list[Owner]] = {}
    if portmap is not None and rows:
        by_cookie = portmap.with_cookies({int(row["cookie"]) for _, row in rows} - {0})
    found, total, limit = [], 0, min(question.limit, _CHECKED)
    for netns, row in rows:
        used = by_cookie.get(int(row["cookie"]), ())
        if uid is not None and row["uid"] != uid and not any(one.uid == uid for one in used):
            continue
        if len(found) >= limit:
            total += 1
            continue
        holders = _holders(pipeline, kernel, asked, row, used)
        mine = [one for one in holders if uid is None or one["uid"] == uid]
        if not mine or (inodes is not None and not any(_is(one, question) for one in mine)):
            continue
        total += 1
        found.append(fields(netns, row) | mine[0] | {"holders": mine})
    return total, found


def holder(tgid: int, start_ns: int, comm: str, uid: int) -> dict[str, Any]:
    """One process that holds a socket, as it goes to a client."""
    return {"pid": tgid, "start_ns": start_ns, "comm": comm, "uid": uid}


class _Asked:
    """Sockets of processes, each asked once."""

    def __init__(self) -> None:
        self._inodes: dict[int, frozenset[int] | None] = {}

    def inodes(self, pid: int) -> frozenset[int] | None:
        """Of the sockets that `pid` holds; None: it may not be asked, or too many were."""
        if pid not in self._inodes:
            if len(self._inodes) >= _ASKED:
                return None
            found = procfs.socket_inodes(pid)
            self._inodes[pid] = None if found is None else frozenset(found)
        return self._inodes[pid]


def _inodes(pipeline: Pipeline, question: Question, asked: _Asked) -> set[int] | None:
    """Sockets of the processes that are asked for; None: of any."""
    if question.pid is None and question.pname is None:
        return None
    found: set[int] = set()
    name = None if question.comm is None else question.comm.decode("utf-8", "replace")
    for one in pipeline.processes.find(question.pid, name):
        there = procfs.identity(one.tgid)
        if there is not None and procfs.same_start(one.start_ns, there.start_ticks):
            found.update(asked.inodes(one.tgid) or ())
    return found


def _rows(
    tables: Mapping[int, np.ndarray], question: Question, inodes: set[int] | None
) -> Iterator[Row]:
    """Listeners before others, in the order of ports."""
    parts = []
    for netns, table in tables.items():
        table = unmapped(table)
        mask = held(table) & (table["inode"] != 0)
        mask &= fitting(table, question.port, question.proto, question.host)
        if inodes is not None:
            mask &= np.isin(table["inode"], np.fromiter(inodes, np.uint64, len(inodes)))
        parts += [(int(row["dport"] != 0), int(row["sport"]), netns, row) for row in table[mask]]
    parts.sort(key=lambda part: part[:3])
    yield from ((netns, row) for _, _, netns, row in parts)


def _holders(
    pipeline: Pipeline,
    kernel: KernelSockets,
    asked: _Asked,
    row: np.void,
    used: Iterable[Owner],
) -> list[dict[str, Any]]:
    """Those who hold a socket in /proc; of processes that may not be asked, who used it."""
    inode = int(row["inode"])
    found: dict[Key, dict[str, Any]] = {}
    for one in used:
        inodes = asked.inodes(one.tgid)
        if inodes is None or inode in inodes:
            found[one.key] = holder(one.tgid, one.start_ns, one.comm, one.uid)
    known = kernel.holders_of(inode)
    if not found and not known and pipeline.portmap is not None:
        # accepted or made since the last walk: of somebody who has the same port
        for one in pipeline.portmap.who(int(row["sport"])):
            if inode in (asked.inodes(one.tgid) or ()):
                found[one.key] = holder(one.tgid, one.start_ns, one.comm, one.uid)
    for other in known:
        identity = other.identity
        start_ns = pipeline.processes.start_of(identity.tgid, identity.start_ns)
        one_holder = holder(identity.tgid, start_ns, text(other.comm), other.uid)
        found.setdefault((identity.tgid, start_ns), one_holder)
    return list(found.values())


def _is(one: Mapping[str, Any], question: Question) -> bool:
    if question.pid is not None and one["pid"] != question.pid:
        return False
    name = None if question.comm is None else question.comm.decode("utf-8", "replace")
    return name is None or one["comm"] == name
