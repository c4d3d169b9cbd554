# SPDX-License-Identifier: MIT
"""A history on a machine whose clocks a test moves: rows to fill it with, questions to ask it."""

from __future__ import annotations

import ipaddress
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from daemon.history.memory import Question
from daemon.history.store import Store
from nlproto.records.elapsed import Moment
from nlproto.tables.flows import pack_address, summarize
from nlproto.tables.processes import Process
from recording import make_records

__all__ = [
    "FOREVER",
    "QUESTIONS",
    "Clocks",
    "changes",
    "files",
    "fill",
    "ids",
    "seal",
    "some_rows",
]

FOREVER = 2**62
_IP = [pack_address(f"10.0.0.{number}")[1] for number in range(3)]


class Clocks:
    """A machine's clocks, which a test moves."""

    def __init__(self) -> None:
        self.boot_id = "first"
        self.boot = self.uptime = 1000.0
        self.real = 1_800_000_000.0

    def __call__(self) -> Moment:
        return Moment(self.boot_id, self.boot, self.uptime, self.real)

    def run(self, seconds: float) -> None:
        self.boot += seconds
        self.uptime += seconds
        self.real += seconds

    def reboot(self) -> None:
        self.boot_id += "+"
        self.boot = self.uptime = 5.0


def changes(ids: np.ndarray) -> np.ndarray:
    """Nothing in memory: every row can be sealed."""
    return np.zeros(len(ids), bool)


def fill(
    store: Store,
    rows: Iterable[dict[str, Any]],
    first_id: int = 1,
    processes: Sequence[Process] = (),
) -> np.ndarray:
    """Write `rows`, each a flow of its own, in order of their ids."""
    flows: np.ndarray = np.concatenate([summarize(make_records(row), 1) for row in rows])
    store.write(np.arange(first_id, first_id + len(flows), dtype=np.uint64), flows, processes)
    return flows


def seal(store: Store, most: int = 100) -> int:
    """Seal all that can be; how many rows went."""
    gone = 0
    while count := store.seal(changes, most):
        gone += count
    return gone


def files(path: str) -> list[str]:
    """Names of the sealed hours beside the database `path`."""
    folder, name = os.path.split(path)
    return sorted(one for one in os.listdir(folder) if one.startswith(f"{name}-0"))


def ids(store: Store, **conditions: Any) -> list[int]:
    """Ids of the flows that a question finds."""
    return [number for number, _ in store.ask(Question(**conditions), FOREVER)]


def some_rows(count: int, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Flows of several processes, hosts and ports, by chance."""
    chance = random.Random(seed)
    for number in range(count):
        v6 = chance.random() < 0.2
        host = chance.randrange(1, 6)
        yield {
            "sport": chance.choice([1, 2, 53, 443, 40_000 + number]),
            "dport": chance.choice([53, 80, 443]),
            "proto": chance.choice([6, 17]),
            "family": 10 if v6 else 2,
            "saddr": "fe80::1" if v6 else "10.0.0.1",
            "daddr": f"2001:db8::{host}" if v6 else f"10.9.{host}.7",
            "dir": chance.choice([1, 2, 3]),
            "time_ns": 10**18 + chance.randrange(10**12),
            "tgid": (pid := chance.choice([0, 11, 12, 13])),
            "start_ns": pid and chance.choice([7, 2**63 + 5]),
            "how": 3 if pid else 18,
            "uid": chance.choice([0, 5]) if pid else 0,
            "comm": chance.choice([b"curl", b"dig", b"\xff\x1b[31m", b""]) if pid else b"",
            "cookie": 2**64 - 2 - number,
            "netns": chance.choice([4026531840, 2**32 - 1]),
        }


QUESTIONS: list[dict[str, Any]] = [
    {},
    {"port": 53},
    {"port": 40_003},
    {"port": 9},
    {"proto": 6},
    {"pid": 12},
    {"pid": 99},
    {"pname": "dig"},
    {"pname": "nobody"},
    {"uid": 5},
    {"uid": 0},
    {"since_ns": 10**18 + 5 * 10**11},
    {"at_ns": 10**18},
    {"until_ns": 10**18 + 2 * 10**11},
    {"until_ns": 10**18 + 4 * 10**11, "since_ns": 10**18 + 2 * 10**11, "port": 53},
    {"netns": 2**32 - 1, "port": 443},
    {"host": ipaddress.ip_network("10.9.3.0/24")},
    {"host": ipaddress.ip_network("10.0.0.0/8")},
    {"host": ipaddress.ip_network("0.0.0.0/0")},
    {"host": ipaddress.ip_network("2001:db8::4/128")},
    {"host": ipaddress.ip_network("::/0")},
    {"port": 443, "uid": 5, "pname": "curl"},
    {"port": 53, "host": ipaddress.ip_network("2001:db8::/32"), "proto": 17},
    {"limit": 3},
    {"limit": 3, "port": 53},
    {"ends": ((2, _IP[1], 53), (2, pack_address("10.9.2.7")[1], 53))},
    {"ends": ((2, pack_address("10.9.2.7")[1], 80), (2, _IP[1], 443)), "port": 80},
]
