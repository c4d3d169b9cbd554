# SPDX-License-Identifier: MIT
"""What is new, and to whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daemon.history.sightings import known_since, listeners, seen_first, shorten
from daemon.history.store import Store
from hunter.watch.watch import _ask
from nlproto.overheard.names import number_of
from nlproto.tables.flows import FLOW, summarize
from nlproto.tables.port_owner import PortOwner
from recording import make_records
from waiting import stand_in

DAY = 86_400 * 10**9
TODAY = 20_000 * DAY


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(str(tmp_path / "history.db"))
    yield store
    store.close()


@pytest.fixture
def saw(store: Store) -> Any:
    ids = iter(range(1, 10**6))

    def saw(
        days_ago: Any, *rows: Any, text_of: Callable[..., Any] = lambda number: "", **more: Any
    ) -> None:
        found = [
            {
                "time_ns": TODAY - int(days_ago * DAY),
                "sport": 40_000,
                "dport": 443,
                "proto": 6,
                "daddr": "192.0.2.1",
                "comm": b"curl",
                "tgid": 100 + number,
                **row,
                **more,
            }
            for number, row in enumerate(rows or [{}])
        ]
        domains = [row.pop("domain", 0) for row in found]
        flows = summarize(make_records(*found), 1)
        for flow, domain in zip(flows, domains, strict=True):
            flow["domain"] = domain
        numbers = np.array([next(ids) for _ in flows], np.uint64)
        store.write(numbers, flows, (), text_of=text_of)

    return saw


def names(
    store: Any, kind: Any, days: float = 1, unseen: int = 30, uid: int | None = None
) -> list[Any]:
    found, _ = seen_first(store, kind, int(TODAY - days * DAY), unseen * DAY, uid, 100)
    return [one["name"] for one in found]


def test_what_was_seen_within_the_time_is_not_new(store: Store, saw: Any) -> None:
    saw(40, comm=b"old")
    saw(10, comm=b"lately")
    for comm in (b"old", b"lately", b"never"):
        saw(0.5, comm=comm)
        saw(0.2, comm=comm)
    assert names(store, "program") == ["never", "old"]
    assert names(store, "program", unseen=5) == ["lately", "never", "old"]
    assert names(store, "program", days=0.3) == []
    (never, old), _ = seen_first(store, "program", TODAY - DAY, 30 * DAY, None, 100)
    assert old["before"] == (TODAY - 40 * DAY) / 1e9 and never["before"] is None


def test_an_own_first_time_is_told_to_its_user_and_to_nobody_else(store: Store, saw: Any) -> None:
    saw(3, uid=0)
    saw(0.5, uid=1000)
    assert names(store, "program") == []  # somebody knew it
    assert names(store, "program", uid=1000) == ["curl"]
    assert names(store, "program", uid=1001) == []
    saw(0.5, {"uid": 7, "comm": b"both"}, {"uid": 8, "comm": b"both"})
    assert names(store, "program") == ["both"]  # once


def test_destinations_are_what_was_asked_for_by_name_or_address(store: Store, saw: Any) -> None:
    own, resolvers = number_of("example.org"), number_of("secret.example", of_resolver=True)
    texts = {own: "example.org", resolvers: "secret.example"}
    saw(
        0.5,
        {"daddr": "192.0.2.1", "domain": own},
        {"daddr": "192.0.2.2", "domain": own},
        {"daddr": "192.0.2.3", "domain": resolvers},
        {"daddr": "192.0.2.4"},
        {"daddr": "192.0.2.5", "sport": 22, "dport": 50_000},  # a client of ours
        {"daddr": "192.0.2.6", "tgid": 0},
        text_of=texts.get,
    )
    assert sorted(names(store, "destination")) == ["192.0.2.3", "192.0.2.4", "example.org"]


def test_listeners_are_known_by_address_port_and_name(store: Store) -> None:
    def owner(proto: Any, port: int, comm: Any, address: bytes = b"\x7f\0\0\1") -> PortOwner:
        return PortOwner((1, proto, 2, address.ljust(16, b"\0"), port), 5, 6, 0, comm, 9, True, 1)

    there = [owner(6, 80, "nginx"), owner(17, 53, "named"), owner(17, 40_000, "dig")]
    store.write(np.zeros(0, np.uint64), np.zeros(0, FLOW), (), listeners=[*listeners(there, TODAY)])
    assert names(store, "listener") == ["tcp 127.0.0.1.80 nginx", "udp 127.0.0.1.53 named"]
    more = [*there, owner(6, 80, "nginx", b"\0\0\0\0"), owner(6, 80, "other")]
    later = [*listeners(more, TODAY + DAY // 2)]
    store.write(np.zeros(0, np.uint64), np.zeros(0, FLOW), (), listeners=later)
    found, _ = seen_first(store, "listener", TODAY + 1, 30 * DAY, None, 100)
    assert {one["name"] for one in found} == {"tcp 0.0.0.0.80 nginx", "tcp 127.0.0.1.80 other"}
    assert {one["about"] for one in found} == {"tcp 0.0.0.0.80", "tcp 127.0.0.1.80"}


class Client:
    """What DaemonClient asks of a daemon, asked of a store; each question takes `late_s`."""

    def __init__(self, store: Store, late_s: float) -> None:
        self._store = store
        self._late_s = late_s

    def news(
        self, kind: str, *, since: float, unseen: float, limit: int, after: Any
    ) -> dict[str, Any]:
        since_ns = time.time_ns() + int((self._late_s - since) * 1e9)
        unseen_ns = int(unseen * 1e9)
        found, places = seen_first(self._store, kind, since_ns, unseen_ns, None, limit + 1, after)
        return {"news": found[:limit], "next": places[limit - 1] if len(found) > limit else None}


@pytest.mark.parametrize("count", [1, 9_999, 10_000, 32_000])
def test_many_that_come_at_once_hide_nothing_that_comes_later(store: Store, count: int) -> None:
    """In one look at the kernel's tables all new listeners have the same time."""
    then = time.time_ns() - 60 * 10**9

    def owner(number: int, name: str) -> PortOwner:
        end = (number, 6, 2, b"\x7f\0\0\1".ljust(16, b"\0"), 9)
        return PortOwner(end, 1, 2, 5, name, 0, True, 1)

    flood = [owner(number, f"flood{number}") for number in range(count)]
    for owners, at_ns in ((flood, then), ([owner(0, "later")], then + 10**8)):
        seen = [*listeners(owners, at_ns)]
        store.write(np.zeros(0, np.uint64), np.zeros(0, FLOW), (), listeners=seen)
    options = stand_in(SimpleNamespace(kinds=["listener"], unseen=86_400.0))
    answers = _ask(stand_in(Client(store, 0.5)), options, then / 1e9 - 3600)
    told = [one["name"] for answer in answers for one in answer["news"]]
    assert len(told) == len(set(told)) == count + 1 and told[-1] == "tcp 127.0.0.1.9 later"


def test_a_flood_of_one_users_names_costs_that_user_alone(store: Store, saw: Any) -> None:
    saw(1, comm=b"sshd", uid=0)
    saw(0.9, *({"comm": b"x%d" % n, "uid": 1000} for n in range(60)))
    shorten(store, 40)
    left = names(store, "program", days=2)
    assert "sshd" in left and len(left) <= 40


def test_it_is_known_since_when(store: Store) -> None:
    assert abs(known_since(store) - time.time()) < 60
