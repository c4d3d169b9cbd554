# SPDX-License-Identifier: MIT
"""Failed connection attempts, from outgoing SYNs and the answers to them."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nlproto.tables.column_table import mix, random_seed
from nlproto.tables.outcome import ACK, RST, SYN

__all__ = ["ANSWER_NS", "Attempts", "Failed"]

ANSWER_NS = 30_000_000_000
"""After so long without an answer an attempt counts as unanswered."""
_LAST_SYN_NS = 180_000_000_000
"""The kernel sends its last SYN after some two minutes. Until then it is the same attempt."""
_MOST = 65_536
"""The most attempts that are remembered. Beyond it the oldest are dropped, uncounted."""


class Failed(NamedTuple):
    """An attempt of a process (tgid 0: unnamed) that failed."""

    tgid: int
    start_ns: int
    comm: bytes
    why: str
    """"refused" or "unanswered"."""


class Attempts:
    """Attempts under way. Not thread-safe."""

    def __init__(self) -> None:
        self._seed = random_seed()
        self._waiting: dict[int, tuple[int, Failed]] = {}
        """When each began, in this order, and what it becomes without an answer."""
        self._given_up: dict[int, int] = {}

    def take(self, flows: np.ndarray, now_ns: int) -> list[Failed]:
        """Return the attempts that have failed by these FLOWs, or by now; any steady clock."""
        failed = list(self._expire(now_ns))
        tcp = (flows["proto"] == socket.IPPROTO_TCP) & (flows["forwarded"] == 0)
        came, went = flows["tcp_in"], flows["tcp_out"]
        begins = tcp & (went & SYN != 0) & (went & ACK == 0) & (came & SYN == 0)
        of_use = begins if not self._waiting else begins | tcp & (came != 0)
        rows = np.flatnonzero(of_use)
        if not len(rows):
            return failed
        some = flows[rows]
        ports = some["lport"].astype(np.uint64) << np.uint64(16) | some["rport"]
        ends = (*some["laddr"].T, *some["raddr"].T, some["netns"].astype(np.uint64), ports)
        columns = (mix(ends, self._seed), begins[rows], some["tcp_in"])
        names = (some[name].tolist() for name in ("tgid", "start_ns", "comm"))
        owners = zip(*names, strict=True)
        for key, is_begin, flags, (tgid, start_ns, comm) in zip(
            *(one.tolist() for one in columns), owners, strict=True
        ):
            if is_begin and key not in self._waiting and key not in self._given_up:
                self._waiting[key] = now_ns, Failed(tgid, start_ns, comm, "unanswered")
            if flags and key in self._waiting:
                _, attempt = self._waiting.pop(key)
                if flags & RST and not flags & SYN:
                    failed.append(attempt._replace(why="refused"))
        for table in (self._waiting, self._given_up):
            for key in list(itertools.islice(table, max(0, len(table) - _MOST))):
                del table[key]
        return failed

    def _expire(self, now_ns: int) -> Iterator[Failed]:
        while self._waiting:
            key, (began, attempt) = next(iter(self._waiting.items()))
            if now_ns - began < ANSWER_NS:
                break
            del self._waiting[key]
            self._given_up[key] = began
            yield attempt
        while self._given_up:
            key, began = next(iter(self._given_up.items()))
            if now_ns - began < _LAST_SYN_NS:
                break
            del self._given_up[key]
