# SPDX-License-Identifier: MIT
"""Flows as OpenTelemetry logs: their names, and a receiver that is away, busy or hostile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fleet.export.deltas import Deltas
from fleet.otlp import __main__ as program
from fleet.otlp import sender as sending
from fleet.otlp.record import record_of
from fleet.otlp.sender import Receiver, Refused, Sender, Unavailable
from fleet.wire import ToldProcess
from nlproto.errors import UsageError
from nlproto.records.wire import HOW_NAMES
from nlproto.tables.flows import FLOW, pack_address
from receiving import Stub, receiver
from waiting import stand_in

PROCESS = ToldProcess(
    tgid=77,
    start_ns=5,
    at_ns=1,
    comm="curl",
    exe="/usr/bin/curl",
    ppid=1,
    uid=1000,
    user="ann\udc80",
    unit="a.service",
    container="docker:4f1c0d2e9a3b",
    container_name="web",
    image="curl:8",
    pod="default/web-0",
)


def _words(address: Any) -> Any:
    return np.frombuffer(pack_address(address)[1], np.uint64)


def flow(lport: int = 40000, rport: int = 443, **fields: Any) -> Any:
    made = np.zeros(1, FLOW)[0]
    made["laddr"], made["raddr"] = _words("192.0.2.1"), _words("192.0.2.9")
    values = {
        "family": 2, "proto": 6, "lport": lport, "rport": rport, "tgid": 77, "start_ns": 5,
        "uid": 1000, "comm": b"curl", "how": 1, "first_ns": 10, "last_ns": 20, "cookie": lport,
        "packets_out": 2, "bytes_out": 100, "packets_in": 3, "bytes_in": 1 << 60,
    }  # fmt: skip
    for name, value in (values | fields).items():
        made[name] = value
    return made


def attributes(record: Any) -> dict[Any, Any]:
    def plain(value: Any) -> Any:
        (kind, found), *_ = value.items()
        return [plain(one) for one in found["values"]] if kind == "arrayValue" else found

    return {one["key"]: plain(one["value"]) for one in record["attributes"]}


def test_a_record_has_the_names_of_both_conventions() -> None:
    record = record_of(flow(), PROCESS, "example.org", 30)
    found = attributes(record)
    assert record["timeUnixNano"] == "20" and record["eventName"] == "network.flow"
    assert found["network.transport"] == "tcp" and found["network.type"] == "ipv4"
    assert found["network.community_id"].startswith("1:")
    assert (found["source.address"], found["source.port"]) == ("192.0.2.1", "40000")
    assert (found["destination.ip"], found["destination.port"]) == ("192.0.2.9", "443")
    assert found["source.bytes"] == "100" and found["destination.bytes"] == str(1 << 60)
    assert found["network.bytes"] == str((1 << 60) + 100)
    assert found["network.direction"] == "egress" and found["destination.domain"] == "example.org"
    assert found["process.pid"] == "77" and found["process.executable.path"] == "/usr/bin/curl"
    assert found["container.id"] == "4f1c0d2e9a3b" and found["container.name"] == "web"
    assert (found["k8s.namespace.name"], found["k8s.pod.name"]) == ("default", "web-0")
    assert found["process.owner"] == "ann\\udc80"


def test_what_serves_is_the_destination() -> None:
    found = attributes(record_of(flow(443, 40000), None, "", 30))
    assert (found["destination.port"], found["network.direction"]) == ("443", "ingress")
    assert found["destination.bytes"] == "100"


@pytest.mark.parametrize(("opened", "end"), [(1, "source"), (2, "destination")])
def test_the_source_is_who_sent_the_syn_whatever_the_ports(opened: int, end: str) -> None:
    for lport, rport in ((33000, 43000), (43000, 33000)):
        found = attributes(record_of(flow(lport, rport, opened=opened), None, "", 30))
        assert found[f"{end}.address"] == "192.0.2.1" and found[f"{end}.port"] == str(lport)


def test_an_unnamed_flow_has_its_reason_and_no_process() -> None:
    how = next(n for n, name in enumerate(HOW_NAMES) if name == "no_socket")
    found = attributes(record_of(flow(tgid=0, how=how), None, "", 30))
    assert found["packet_hunter.how"] == "no_socket"
    assert not [name for name in found if name.startswith(("process.", "user."))]


def test_no_key_is_also_the_beginning_of_another() -> None:
    """An index has either a word or an object under one name."""
    keys = attributes(record_of(flow(), PROCESS, "example.org", 30)).keys()
    assert [(a, b) for a in keys for b in keys if b.startswith(f"{a}.")] == []


@pytest.fixture(name="stub")
def _stub() -> Iterator[Any]:
    with receiver() as stub:
        yield stub


class Flows:
    """What a Source is to a Sender, without a daemon."""

    failure = None

    def __init__(self) -> None:
        self.lock, self.deltas = threading.Lock(), Deltas()

    def process(self, tgid: int, start_ns: int) -> Any:
        return PROCESS

    def add(self, *flows: Any) -> None:
        made = np.zeros(len(flows), FLOW)
        for index, one in enumerate(flows):
            made[index] = one
        self.deltas.add(made, _CLOCK)


_CLOCK = type("Now", (), {"real_offset_ns": 0})()


def sender(stub: Any, headers: Any = None) -> Sender:
    return Sender(
        stand_in(Flows()), Receiver(stub.url, headers or {}), "web1", 1.0, threading.Event()
    )


def test_rows_are_sent_in_parts_with_the_key(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_AT_ONCE", 2)
    one = sender(stub, {"api-key": "secret"})
    stand_in(one.source).add(*(flow(40000 + n) for n in range(5)))
    one.flush()
    assert len(stub.taken) == one.sent == 5 and len(stub.heads) == 3
    assert {head["api-key"] for head in stub.heads} == {"secret"}


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_a_receiver_that_is_busy_is_asked_again_and_nothing_is_told_twice(
    stub: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(sending, "_AT_ONCE", 2)
    one = sender(stub)
    stand_in(one.source).add(*(flow(40000 + n) for n in range(5)))
    stub.answers = [(200, b"{}"), (code, b"busy")]
    with pytest.raises(Unavailable, match=str(code)):
        one.flush()
    assert one.sent == 2
    one.flush()
    ports = [attributes(record)["source.port"] for record in stub.taken]
    assert sorted(ports) == [str(40000 + n) for n in range(5)] and one.sent == 5


@pytest.mark.parametrize("code", [302, 400, 401, 413])
def test_what_is_refused_is_counted_and_not_sent_again(stub: Any, code: int) -> None:
    one = sender(stub)
    stand_in(one.source).add(flow())
    stub.answers = [(code, b"")]
    one.flush()
    assert (one.sent, one.refused, len(one.source.deltas)) == (0, 1, 0)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (b'{"partialSuccess":{"rejectedLogRecords":"1"}}', 1),
        (b'{"partialSuccess":{"rejectedLogRecords":-7}}', 0),
        (b'{"partialSuccess":{"rejectedLogRecords":999999}}', 2),
        (b'{"partialSuccess":[]}', 0),
        (b'{"partialSuccess":{"rejectedLogRecords":1e999}}', 0),
        (b'{"partialSuccess":{"rejectedLogRecords":NaN}}', 0),
        (b"[" * 50000, 0),
        (b"\xff<html>", 0),
        (b"", 0),
    ],
)
def test_an_answer_may_be_nonsense(stub: Any, answer: bytes, refused: int) -> None:
    one = sender(stub)
    stand_in(one.source).add(flow(), flow(40001))
    stub.answers = [(200, answer)]
    one.flush()
    assert (one.sent, one.refused) == (2 - refused, refused)


def test_what_waits_is_bounded_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "MOST", 3)
    with Stub() as gone:
        pass
    one = sender(gone)
    stand_in(one.source).add(*(flow(40000 + n, last_ns=20 + n) for n in range(5)))
    with pytest.raises(Unavailable):
        one.flush()
    assert one.lost == 2
    assert sorted(one.source.deltas.take()["lport"].tolist()) == [40002, 40003, 40004]


def test_a_redirect_takes_no_records_elsewhere(stub: Any) -> None:
    stub.answers = [(302, b"")]
    with pytest.raises(Refused, match="302"):
        Receiver(stub.url, {}).post({"resourceLogs": []})
    assert len(stub.heads) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "http://h:x/", "http://h/a b"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no address of a receiver"):
        program._checked(url)


def test_headers_come_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b, x=1")
    assert program._headers() == {"api-key": "a b", "x": "1"}
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "a=b%0d%0aEvil: 1")
    with pytest.raises(UsageError):
        program._headers()
