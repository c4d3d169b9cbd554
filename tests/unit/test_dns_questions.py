# SPDX-License-Identifier: MIT
"""A DNS answer counts only if a socket of this machine has asked exactly that, and only once."""

from __future__ import annotations

import dataclasses
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from nameserver import AAAA, A, answer, question
from nlproto.overheard import dns
from nlproto.overheard.dns import DnsAnswer
from nlproto.overheard.domains import Domains
from nlproto.overheard.fair_table import FairTable
from nlproto.overheard.listening import Overheard
from nlproto.overheard.names import NumberedNames
from nlproto.overheard.tap import TappedPacket
from nlproto.records.ends import flow_keys
from overhearing import flow, raw
from waiting import stand_in

NOW, PORT, ADDRESS = 4_000_000_000, 40_000, "198.51.100.1"
NEAR, FAR = raw("192.0.2.99"), raw("192.0.2.53")
SYN, ACK, PUSH = 2, 16, 24


def sent(payload: bytes, **more: Any) -> TappedPacket:
    """A packet of ours to a DNS server."""
    proto = socket.IPPROTO_TCP if "flags" in more else socket.IPPROTO_UDP
    fields = {"seq": 0, "ack": 0, "flags": 0, "outgoing": True} | more
    ends = (NEAR, PORT, FAR, 53)
    return TappedPacket(NOW, socket.AF_INET, proto, *ends, payload=payload, length=0, **fields)


def came(payload: bytes, **more: Any) -> TappedPacket:
    """A packet from a DNS server."""
    there = sent(payload, **{"outgoing": False} | more)
    return dataclasses.replace(there, source=FAR, sport=53, target=NEAR, dport=PORT)


def name_after(*packets: TappedPacket, tcp: bool = False) -> str:
    """The name of the server's address, for the process that has this socket."""
    heard = Overheard(print, "off")
    asker = flow("192.0.2.53", 53, since=NOW, lport=PORT)
    asker["proto"] = socket.IPPROTO_TCP if tcp else socket.IPPROTO_UDP
    heard.domains.stamp(asker)
    for packet in packets:
        heard._heard(7, packet)
    flows = flow(ADDRESS, since=NOW + 1)
    heard.domains.stamp(flows)
    return heard.names.text(int(flows["domain"][0]))


ASKED = question("www.example", number=77)
TOLD = answer(ASKED, [("www.example", A, 60, ADDRESS)])
FALSE = answer(ASKED, [("www.example", A, 60, "198.51.100.66")])


def of(**more: Any) -> bytes:
    return answer(question("www.example", **more), [("www.example", A, 60, ADDRESS)])


def test_an_answer_to_a_question_tells_the_name() -> None:
    assert name_after(sent(ASKED), came(TOLD)) == "www.example"
    assert name_after(sent(ASKED.replace(b"www", b"wWw")), came(TOLD)) == "www.example"


@pytest.mark.parametrize(
    "packets",
    [
        (came(TOLD),),
        (came(TOLD), sent(ASKED)),
        (sent(ASKED), came(of(number=78))),
        (sent(ASKED), came(of(number=77, kind=AAAA))),
        (sent(question("other.example", number=77)), came(TOLD)),
        (sent(ASKED), dataclasses.replace(came(TOLD), dport=PORT + 1)),
        (sent(ASKED), dataclasses.replace(came(TOLD), source=raw("192.0.2.54"))),
        (sent(ASKED), dataclasses.replace(came(TOLD), time_ns=NOW + 31_000_000_000)),
        (sent(ASKED), came(FALSE), came(TOLD)),
        (came(ASKED), came(TOLD)),
        (dataclasses.replace(came(TOLD), source=raw("127.0.0.1"), target=raw("127.0.0.1")),),
    ],
    ids=str,
)
def test_an_answer_that_nobody_asked_for_tells_nothing(packets: Any) -> None:
    assert name_after(*packets) == ""


def over_tcp(*parts: bytes, ack: int = 1001, told: bytes = TOLD) -> list[TappedPacket]:
    packets = [sent(b"", flags=SYN, seq=1000), came(b"", flags=SYN | ACK, seq=9000, ack=ack)]
    seq = 1001
    for part in parts:
        packets.append(sent(part, flags=PUSH, seq=seq, ack=9001))
        seq += len(part)
    return [*packets, came(len(told).to_bytes(2) + told, flags=PUSH, seq=9001, ack=seq)]


LENGTH = len(ASKED).to_bytes(2)
SIX = question("www.example", AAAA, number=78)


@pytest.mark.parametrize(
    "parts",
    [
        (LENGTH + ASKED,),
        (LENGTH, ASKED),
        (LENGTH + ASKED + len(SIX).to_bytes(2) + SIX,),
        (len(SIX).to_bytes(2) + SIX + LENGTH + ASKED,),
    ],
    ids=["whole", "length first", "before another", "after another"],
)
def test_over_tcp_too(parts: Any) -> None:
    assert name_after(*over_tcp(*parts), tcp=True) == "www.example"


def test_nobody_else_can_answer_over_tcp() -> None:
    assert name_after(*over_tcp(), tcp=True) == ""
    assert name_after(*over_tcp(LENGTH + ASKED, ack=5), tcp=True) == ""
    assert name_after(*over_tcp(LENGTH + ASKED, told=of(number=78)), tcp=True) == ""
    begun = over_tcp(LENGTH + ASKED)
    false = came(b"", flags=SYN | ACK, seq=70_000, ack=1001)
    assert name_after(*begun[:-1], false, begun[-1], tcp=True) == "www.example"


def test_a_flood_of_questions_stays_in_its_bounds() -> None:
    heard = Overheard(print, "off")
    for number in range(40_000):
        heard._questions.note((7, 17, 2, NEAR, number, FAR, 53), dns.question(ASKED), NOW)
    assert len(heard._questions) == 1 << 15


class Ring:
    """Has packets without end; each takes a while to read."""

    def __init__(self, name: str, read: list[str]) -> None:
        self._name, self._all = name, read

    def read(self, most: int) -> Any:
        self._all.append(self._name)
        began = time.thread_time()
        while time.thread_time() < began + 0.02:
            pass
        return ()


def test_a_users_namespace_with_many_packets_does_not_keep_roots_from_being_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard, read = Overheard(print, "off"), list[str]()
    owners = {1: 0, 2: 1000}
    monkeypatch.setattr(heard, "_owner_of", owners.get)
    for inode in owners:
        heard._taps[inode] = stand_in((SimpleNamespace(inode=inode), Ring(str(inode), read)))
    for ready in [[2]] * 50 + [[2, 1]] * 3:
        monkeypatch.setattr(
            heard, "_poll", SimpleNamespace(poll=lambda _, all=ready: [(n, 1) for n in all])
        )
        heard._read()
    assert read.count("2") < 40 and read.count("1") == 3


def test_one_users_questions_do_not_hide_who_else_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlproto.overheard.domains._ASKERS", 64)
    domains = Domains(NumberedNames())
    asking = flow("192.0.2.53", 53, since=NOW)
    domains.stamp(asking)
    for port in range(1000):
        domains.stamp(flow("192.0.2.53", 53, tgid=66, uid=66, lport=port, since=NOW))
    ((_, _, way),) = flow_keys(asking)
    domains.add_answer(way, DnsAnswer("www.example", ((socket.AF_INET, raw(ADDRESS), 60),)), NOW)
    flows = flow(ADDRESS, since=NOW + 1)
    domains.stamp(flows)
    assert domains.names.text(int(flows["domain"][0])) == "www.example"


def test_one_domains_names_take_no_room_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlproto.overheard.domains._OF_RESOLVERS", 64)
    domains = Domains(NumberedNames())
    asking = flow("192.0.2.53", 53, since=NOW, tgid=2, comm=b"systemd-resolve", uid=101)
    domains.stamp(asking)
    ((_, _, way),) = flow_keys(asking)
    names = ["www.good.example", *(f"n{number}.of.flood.example" for number in range(1000))]
    for number, name in enumerate(names):
        address = raw(ADDRESS) if not number else number.to_bytes(16)
        domains.add_answer(way, DnsAnswer(name, ((socket.AF_INET, address, 60),)), NOW)
    flows = flow(ADDRESS, since=NOW + 1)
    domains.stamp(flows)
    assert domains.names.text(int(flows["domain"][0])) == "www.good.example"


def test_whoever_has_most_gives_way() -> None:
    table: FairTable[int, str] = FairTable(100)
    for number in range(20):
        table.put(number, "few", "one")
    for number in range(1000, 3000):
        table.put(number, "many", "other")
    assert len(table) <= 100 and set(range(20)) <= set(table)
    assert max(table) == 2999 and table.get(1000) is None and table.evicted >= 1920
    table.put(0, "now", "other")
    assert table.get(0) == "now"
