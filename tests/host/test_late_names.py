# SPDX-License-Identifier: MIT
"""Nobody is asked about packets that waited long: those behind them would wait as well (root)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet_names import PacketNames
from nlproto.host import netns
from nlproto.host.holders import Holders
from nlproto.host.sockdiag import SockDiag
from nlproto.pipeline.naming import Namer
from nlproto.records import wire
from waiting import noting

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="who holds a socket needs root")

FLOWS = 300
SECOND = 1_000_000_000


class Counting(Holders):
    """How often somebody was looked for."""

    looks = 0

    def find_soon(self, *arguments: Any) -> Any:
        self.looks += 1
        return super().find_soon(*arguments)

    def find(self, *arguments: Any) -> Any:
        self.looks += 1
        return super().find(*arguments)


@pytest.fixture
def packets() -> Iterator[Any]:
    """The first packet of each of many flows of one socket, sent `age_ns` ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def sent(age_ns: Any) -> Any:
            records = np.zeros(FLOWS, wire.RECORD)
            records["family"], records["proto"] = socket.AF_INET, socket.IPPROTO_UDP
            records["netns"], records["dir"] = netns.own(), wire.lib.SNIFFER_DIR_OUT
            records["how"] = wire.lib.SNIFFER_HOW_NOT_PROBED
            records["time_ns"] = time.monotonic_ns() - age_ns
            records["saddr"][:, :4] = records["daddr"][:, :4] = (127, 0, 0, 1)
            records["sport"], records["dport"] = sock.getsockname()[1], 1024 + np.arange(FLOWS)
            return records

        yield sent


def name_by_engine(records: Any, holders: Any) -> Any:
    with SockDiag() as diag:
        names = PacketNames(diag, holders, lambda *_: True, time.monotonic_ns)
        return names.name(records, np.zeros(len(records), bool))


def name_by_pipeline(records: Any, holders: Any) -> Any:
    with Namer(holders=holders) as namer:
        namer.name(records)
    return records


@pytest.mark.parametrize("name", [name_by_engine, name_by_pipeline])
@pytest.mark.parametrize(("age_ns", "asked"), [(0, True), (60 * SECOND, False)])
def test_only_those_of_the_last_moments_are_asked_about(
    packets: Any, name: Any, age_ns: int, asked: bool
) -> None:
    holders = Counting()
    records = name(packets(age_ns), holders)
    assert (holders.looks > 0, bool(records["tgid"].any())) == (asked, asked)
    if not asked:
        assert set(records["how"].tolist()) == {wire.lib.SNIFFER_HOW_NOT_PROBED}


def test_who_names_again_has_no_time_for_long_searches(
    packets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who subscribes waits for the worker."""
    now, over = [time.monotonic_ns()], []
    holders = Holders()

    def slow(inode: int, uid: int = 0) -> Any:
        over.append(holders.beside.is_over())
        now[0] += 30_000_000
        return ()

    monkeypatch.setattr(holders, "find", slow)
    with Namer(holders=holders, now_ns=lambda: now[0]) as namer:
        monkeypatch.setattr(namer._again, "allows", lambda: True)
        namer.name(packets(0))
        assert 2 <= len(over) <= 5 and not any(over)
        now[0] += SECOND
        over.clear()
        records = packets(0)
        records["how"] = wire.lib.SNIFFER_HOW_PREDATES  # the module cannot know: all are asked
        records["time_ns"] = now[0]
        namer.name(records)
        assert len(over) > 5 and not any(over)


@pytest.fixture
def names() -> Iterator[PacketNames]:
    with SockDiag() as diag:
        yield PacketNames(diag, Counting(), lambda *_: True, time.monotonic_ns)


def name(names: PacketNames, records: Any, late_ns: int = SECOND) -> Any:
    found = names.name(records.copy(), np.zeros(len(records), bool), late_ns)
    return found[np.argsort(found["dport"])]


def test_what_is_known_of_a_flow_names_its_late_packets(names: PacketNames, packets: Any) -> None:
    half = FLOWS // 2
    name(names, packets(0)[:half])
    found = name(names, packets(60 * SECOND))
    assert set(found["tgid"][:half].tolist()) == {os.getpid()}
    assert not found["tgid"][half:].any()
    assert set(found["how"][half:].tolist()) == {wire.lib.SNIFFER_HOW_NOT_PROBED}


def test_only_some_flows_that_were_known_are_asked_about_again(
    names: PacketNames, packets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a hurry everything is late. Those with most of the packets go first."""
    name(names, packets(0))
    for flow in names._flows.values():
        flow.checked_ns -= SECOND
    asked: list[Any] = []
    monkeypatch.setattr(names._sockets, "find", noting(asked, names._sockets.find))
    many = np.repeat(packets(0), np.where(np.arange(FLOWS) == 7, 3, 1))
    found = name(names, many, 0)
    assert len(found) == len(many)
    assert 1031 in {one.rport for one in asked} and len({one.rport for one in asked}) == 8
    assert np.count_nonzero(found["tgid"]) == 8 + 2


def test_a_late_syn_makes_its_flow_unknown(names: PacketNames, packets: Any) -> None:
    """Who began the connection was not seen: it may be another one's by now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            record = packets(0)[:1]
            record["proto"] = socket.IPPROTO_TCP
            record["sport"], record["dport"] = client.getsockname()[1], server.getsockname()[1]
            assert name(names, record)["tgid"].tolist() == [os.getpid()]
            record["time_ns"] -= np.uint64(60 * SECOND)
            assert name(names, record)["tgid"].tolist() == [os.getpid()]
            record["tcp_flags"] = 2  # SYN
            assert name(names, record)["tgid"].tolist() == [0]
            record["tcp_flags"] = 16  # ACK
            assert name(names, record)["tgid"].tolist() == [0]
            record["time_ns"] = time.monotonic_ns()
            assert name(names, record)["tgid"].tolist() == [os.getpid()]


def test_a_listener_of_today_is_not_named_for_a_connection_that_was_late(
    names: PacketNames, packets: Any
) -> None:
    """When it began nobody was asked, and who listens now may have come since."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        record = packets(60 * SECOND)[:1]
        record["proto"], record["tcp_flags"] = socket.IPPROTO_TCP, 2
        record["dir"] = wire.lib.SNIFFER_DIR_IN
        record["sport"], record["dport"] = 9, server.getsockname()[1]
        assert name(names, record)["tgid"].tolist() == [0]
        record["sport"], record["dport"] = server.getsockname()[1], 9
        record["dir"], record["tcp_flags"] = wire.lib.SNIFFER_DIR_OUT, 16
        record["len"], record["time_ns"] = 100, time.monotonic_ns()
        assert name(names, record)["tgid"].tolist() == [0]


def test_late_packets_to_others_are_told_once() -> None:
    """On the way in; what goes out again is the same packet."""
    with SockDiag() as diag:
        names = PacketNames(diag, Holders(), lambda *_: False, time.monotonic_ns)
        records = np.zeros(2, wire.RECORD)
        records["family"], records["proto"] = socket.AF_INET, socket.IPPROTO_UDP
        records["dir"] = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_DIR_OUT
        found = names.name(records, np.zeros(2, bool))
        assert found["dir"].tolist() == [wire.lib.SNIFFER_DIR_FWD]
        assert found["how"].tolist() == [wire.lib.SNIFFER_HOW_FORWARDED]
