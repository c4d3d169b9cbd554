# SPDX-License-Identifier: MIT
"""Names that strangers send: DNS answers, ClientHellos, TCP in pieces; and whose names they are."""

from __future__ import annotations

import socket
import ssl
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nameserver import AAAA, CNAME, A, answer, encoded, question
from nlproto.overheard import dns
from nlproto.overheard.domains import Domains
from nlproto.overheard.hello import server_name
from nlproto.overheard.live import LiveEnds
from nlproto.overheard.names import NumberedNames
from nlproto.overheard.streams import TcpStreams
from nlproto.records.ends import flow_keys
from overhearing import flow, raw
from waiting import there

SECOND = 1_000_000_000


def test_an_answer_tells_the_name_and_follows_aliases_with_the_least_ttl() -> None:
    records = [("a.example", CNAME, 300, "b.example"), ("b.example", A, 20, "192.0.2.1")]
    found = dns.parse(answer(question("A.example"), records))
    assert found == dns.DnsAnswer("a.example", ((socket.AF_INET, raw("192.0.2.1"), 20),))
    six = dns.parse(answer(question("a.example", AAAA), [("a.example", AAAA, 5, "2001:db8::1")]))
    assert six.addresses == ((socket.AF_INET6, raw("2001:db8::1"), 5),)


def test_addresses_of_other_names_are_left_out() -> None:
    records = [("bank.example", A, 20, "192.0.2.1"), ("a.example", CNAME, 9, "a.example")]
    assert dns.parse(answer(question("a.example"), records)).addresses == ()


@pytest.mark.parametrize(
    "name", ["a\nb.example", "a b.example", "\x1b[31m.example", "-a.example", "ä.example", "a/b.c"]
)
def test_a_name_that_no_host_has_is_refused(name: str) -> None:
    with pytest.raises(dns.MalformedDns):
        dns.parse(answer(question(name), [(name, A, 9, "192.0.2.1")]))


def test_pointers_that_lead_nowhere_end() -> None:
    head = struct.pack(">6H", 7, 0x8180, 1, 1, 0, 0)
    for name in (b"\xc0\x0c", b"\xc0\x0e\xc0\x0c", b"\x01a\xc0\x0c", b"\xc0\xff", b"\x80", b"\x3f"):
        with pytest.raises(dns.MalformedDns):
            dns.parse(head + name + struct.pack(">HH", A, 1))
    long = head + encoded(".".join(["a" * 60] * 5)) + struct.pack(">HH", A, 1)
    with pytest.raises(dns.MalformedDns):
        dns.parse(long)


def test_what_is_cut_tells_what_it_has() -> None:
    records = [("a.example", A, 9, f"192.0.2.{n}") for n in range(200)]
    whole = answer(question("a.example"), records)
    assert len(dns.parse(whole).addresses) == 64
    assert len(dns.parse(whole[:100]).addresses) == 4


@given(st.binary(max_size=600))
def test_noise_is_harmless(noise: bytes) -> None:
    for message in (noise, struct.pack(">6H", 7, 0x8180, 1, 9, 0, 0) + noise):
        try:
            found = dns.parse(message)
        except dns.MalformedDns:
            continue
        assert dns.valid_name(found.name)
    for stream in (noise, b"\x16\x03\x01" + noise, b"\x16\x03\x01\x02\x00\x01\x00\x01" + noise):
        name = server_name(stream)
        assert not name or dns.valid_name(name)


def hello(name: str | None) -> bytes:
    """A real ClientHello."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    out = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


def test_a_client_hello_tells_the_name_whole_or_in_parts() -> None:
    whole = hello("www.example")
    assert server_name(whole) == "www.example"
    assert server_name(whole + b"more") == "www.example"
    parts = [server_name(whole[:size]) for size in range(len(whole))]
    assert parts == sorted(parts, key=bool)  # once it is there, it stays
    assert set(parts) == {None, "www.example"}
    assert server_name(hello(None)) == ""
    body = whole[5:]
    halves = b"".join(
        b"\x16\x03\x01" + len(part).to_bytes(2) + part for part in (body[:99], body[99:])
    )
    assert server_name(halves) == "www.example"
    assert server_name(b"GET / HTTP/1.1\r\n") == ""
    assert server_name(whole.replace(b"www.example", b"www\n.xample")) == ""


def test_streams_are_put_together_and_bounded() -> None:
    streams = TcpStreams(2, 100)
    streams.begin("a", (1 << 32) - 2)
    assert bytes(there(streams.add("a", 2, b"ef"))) == b""
    assert bytes(there(streams.add("a", (1 << 32) - 2, b"abcd"))) == b"abcdef"
    assert bytes(there(streams.add("a", 0, b"cdefgh"))) == b"abcdefgh"
    assert streams.add("a", 6, b"x" * 200) is None and "a" not in streams
    for name in "bcd":
        streams.begin(name, 0)
    assert len(streams) == 2 and "b" not in streams


class Told:
    """Domains that have heard one answer."""

    def __init__(self, ttl: int = 60, at: int = 4 * SECOND, **asker: Any) -> None:
        self.domains = Domains(NumberedNames())
        self.hear("www.example", ttl, at, **asker)

    def hear(self, name: Any, ttl: int = 60, at: int = 4 * SECOND, **asker: Any) -> None:
        asking = flow("192.0.2.53", 53, since=at, **asker)
        self.domains.stamp(asking)
        ((_, _, way),) = flow_keys(asking)
        found = dns.DnsAnswer(name, ((socket.AF_INET, raw("198.51.100.1"), ttl),))
        self.domains.add_answer(way, found, at)

    def name(self, own: bool = False, **more: Any) -> Any:
        flows = flow("198.51.100.1", **more)
        self.domains.stamp(flows)
        assert flows["domain"][0] == self.domains.number_of(next(flow_keys(flows)))
        return LiveEnds(self.domains, own=own).domain_of(next(flow_keys(flows)))


def test_a_name_is_of_who_asked() -> None:
    told = Told()
    assert told.name() == "www.example"
    assert told.name(tgid=11) == ""


def test_a_name_counts_from_its_answer_to_the_end_of_its_time() -> None:
    assert Told().name(since=3 * SECOND) == ""
    assert Told(ttl=10).name(since=19 * SECOND) == "www.example"
    assert Told(ttl=10).name(since=20 * SECOND) == ""


def test_a_flow_keeps_its_name_and_an_older_flow_gets_none() -> None:
    told = Told(ttl=1)
    assert told.name() == "www.example"
    told.hear("other.example", at=50 * SECOND)
    assert told.name(since=60 * SECOND) == "www.example"  # of the same flow
    assert told.name(since=60 * SECOND, lport=40001) == "other.example"
    fresh = Told(at=40 * SECOND)
    assert fresh.name(since=30 * SECOND) == ""
    assert fresh.name(since=45 * SECOND) == ""  # seen before


def test_an_answer_that_nobody_asked_for_is_nobodys() -> None:
    told = Told(out=0)
    assert told.name() == ""


def test_a_resolver_asks_for_all_but_not_in_the_eyes_of_who_sees_only_his() -> None:
    told = Told(tgid=2, comm=b"systemd-resolve", uid=101)
    assert told.name() == "www.example"
    assert told.name(own=True) == ""
    told.hear("other.example", tgid=2, comm=b"systemd-resolve", uid=101)
    assert told.name(lport=40001) == "other.example|www.example"
    assert Told(tgid=2, comm=b"systemd-resolve", uid=1000).name() == ""


def test_an_answer_of_an_unknown_asker_names_the_next_flow_alone() -> None:
    told = Told(tgid=0)
    assert told.name() == "www.example"
    assert told.name(lport=40001, tgid=11) == ""
    assert Told(tgid=0).name(since=10 * SECOND) == ""


def test_a_flood_of_one_user_costs_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlproto.overheard.domains._LIMIT", 64)
    told = Told()
    asking = flow("192.0.2.53", 53, tgid=66, uid=66, lport=5)
    told.domains.stamp(asking)
    ((_, _, way),) = flow_keys(asking)
    for number in range(1000):
        address = (socket.AF_INET, number.to_bytes(16), 60)
        told.domains.add_answer(way, dns.DnsAnswer(f"n{number}.example", (address,)), SECOND)
    assert len(told.domains) <= 65
    assert told.name() == "www.example"
