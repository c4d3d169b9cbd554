# SPDX-License-Identifier: MIT
"""Decoding the wire: layouts, views, and messages that are wrong."""

from __future__ import annotations

import re
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlproto import Error, VersionMismatch
from nlproto.records import wire
from nlproto.records.clock import Clock
from nlproto.records.process_event import decode_process
from waiting import there

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {
    "sniffer_record": wire.RECORD,
    "sniffer_flow_record": wire.FLOW_RECORD,
    "sniffer_batch": wire.BATCH,
    "sniffer_flow_batch": wire.FLOW_BATCH,
    "sniffer_tail": wire.TAIL,
    "sniffer_flow_tail": wire.FLOW_TAIL,
    "sniffer_process": wire.PROCESS,
    "sniffer_socket": wire.SOCKET,
    "sniffer_holder": wire.HOLDER,
    "sniffer_info": wire.INFO,
    "sniffer_counters": wire.COUNTERS,
    "sniffer_snap": wire.SNAP,
}


def message(records: int = 2, record_size: int = 128, **head: int) -> bytes:
    """A batch as a C program would fill it: the records' sequence counts from 7 on."""
    first = wire.ffi.new("struct sniffer_batch *", {"version": wire.lib.SNIFFER_VERSION})
    first.record_size, first.count, first.record_seq = record_size, records, 7
    for name, value in head.items():
        setattr(first, name, value)
    out = bytes(wire.ffi.buffer(first))
    for index in range(records):
        one = wire.ffi.new("struct sniffer_record *")
        one.seq, one.tgid, one.comm, one.len = 7 + index, 4242, b"worker", 60
        one.family, one.proto, one.dir = socket.AF_INET, socket.IPPROTO_TCP, 2
        one.how, one.sport, one.dport = wire.lib.SNIFFER_HOW_CONTEXT, 40000, 443
        one.saddr[0:4] = [192, 0, 2, 1]
        one.daddr[0:4] = [192, 0, 2, 2]
        out += bytes(wire.ffi.buffer(one)).ljust(record_size, b"\xff")
    return out


@pytest.mark.parametrize("struct", DTYPES)
def test_every_dtype_has_the_compilers_offsets(struct: str) -> None:
    dtype = DTYPES[struct]
    assert dtype.itemsize == wire.ffi.sizeof(f"struct {struct}")
    fields = wire.ffi.typeof(f"struct {struct}").fields
    assert list(there(dtype.names)) == [name for name, _ in fields]
    for name, field in fields:
        assert there(dtype.fields)[name][1] == field.offset
        assert there(dtype.fields)[name][0].itemsize == wire.ffi.sizeof(field.type)


@pytest.mark.parametrize("struct", DTYPES)
def test_no_struct_has_implicit_padding(struct: str) -> None:
    dtype = DTYPES[struct]
    assert (
        sum(there(dtype.fields)[name][0].itemsize for name in there(dtype.names)) == dtype.itemsize
    )


def test_every_field_that_c_wrote_is_read_back_by_numpy() -> None:
    for struct, dtype in DTYPES.items():
        raw = bytes(range(256)) * 4
        one = wire.ffi.new(f"struct {struct} *")
        wire.ffi.buffer(one)[:] = raw[: dtype.itemsize]
        row = np.frombuffer(raw, dtype, 1)[0]
        for name in there(dtype.names):
            value = getattr(one, name)
            if isinstance(value, int):
                assert int(row[name]) == value, (struct, name)
            else:
                assert row[name].tobytes() == bytes(
                    wire.ffi.buffer(wire.ffi.addressof(one, name))
                ), (struct, name)


def test_no_python_file_repeats_a_layout_of_the_wire() -> None:
    fields = {name for dtype in DTYPES.values() for name in there(dtype.names)}
    pattern = re.compile(r"""\(\s*["'](\w+)["']\s*,\s*["'][<>=|]?[uiSV]\d+["']""")
    for path in (ROOT / "python").rglob("*.py"):
        words = set(pattern.findall(path.read_text()))
        assert len(words & fields) < 20, path


def test_strings_of_the_header_are_there() -> None:
    assert wire.ffi.string(wire.lib.SNIFFER_FAMILY) == b"sniffer"
    assert wire.ffi.string(wire.lib.SNIFFER_GROUP_PACKETS) == b"packets"


def test_a_batch_is_decoded_without_copying() -> None:
    buf = bytearray(message(3))
    batch = wire.decode_batch(memoryview(buf))
    assert len(batch.records) == 3
    assert batch.records["seq"].tolist() == [7, 8, 9]
    assert np.shares_memory(batch.records, np.frombuffer(buf, np.uint8))
    assert np.shares_memory(np.asarray(batch.head), np.frombuffer(buf, np.uint8))
    with pytest.raises(ValueError):
        batch.records["seq"] = 0


def test_longer_records_of_the_future_are_stepped_over() -> None:
    batch = wire.decode_batch(message(4, record_size=144))
    assert batch.records["seq"].tolist() == [7, 8, 9, 10]
    assert batch.records["comm"].tolist() == [b"worker"] * 4


def test_an_empty_batch_is_fine() -> None:
    assert len(wire.decode_batch(message(0)).records) == 0


def test_another_version_is_refused_with_the_next_step() -> None:
    with pytest.raises(VersionMismatch, match="version 9 .* one release"):
        wire.decode_batch(message(version=9))


def test_every_truncation_is_an_error() -> None:
    whole = message(2)
    for length in range(len(whole)):
        with pytest.raises(Error):
            wire.decode_batch(whole[:length])


@pytest.mark.parametrize("size", [0, 1, 127])
def test_records_shorter_than_ours_are_an_error(size: int) -> None:
    with pytest.raises(Error, match="at least 128"):
        wire.decode_batch(message(2, record_size=size))


def test_a_count_beyond_the_message_is_an_error() -> None:
    with pytest.raises(Error, match="do not hold"):
        wire.decode_batch(message(2, count=60000))


DECODERS = [wire.decode_batch, wire.decode_first_bytes, decode_process]


@given(st.binary(max_size=1024), st.sampled_from(DECODERS))
def test_any_bytes_decode_or_raise_error(raw: bytes, decode: Any) -> None:
    try:
        decode(raw)
    except Error:
        pass


@given(
    st.binary(min_size=78, max_size=600),
    st.integers(0, 300),
    st.integers(0, 8),
    st.sampled_from(DECODERS),
)
def test_bytes_behind_a_right_version_decode_or_raise_error(
    raw: bytes, size: int, count: int, decode: Any
) -> None:
    head = np.array([wire.lib.SNIFFER_VERSION, size, 0, count], np.uint16).tobytes()
    try:
        found = decode(head + raw)
    except Error:
        return
    if isinstance(found, wire.Batch):
        for record in found.records:
            wire.packet(record, Clock(0, 0))


def test_encode_and_decode_are_inverse() -> None:
    batch = wire.decode_batch(message(5))
    again = wire.decode_batch(wire.encode_batch(batch.head, batch.records[1:3]))
    assert again.records.tobytes() == batch.records[1:3].tobytes()
    assert int(again.head["count"]) == 2
    assert int(again.head["record_seq"]) == 7


def test_encoding_longer_records_writes_our_size() -> None:
    batch = wire.decode_batch(message(3, record_size=160))
    assert len(wire.encode_batch(batch.head, batch.records)) == 80 + 3 * 128


def test_snaps_are_read_one_behind_the_other() -> None:
    head = wire.ffi.new("struct sniffer_batch *", {"version": 1, "count": 2})
    out = bytes(wire.ffi.buffer(head))
    for payload in (b"abcde", b"12345678"):
        one = wire.ffi.new("struct sniffer_snap *", {"caplen": len(payload), "seq": 3})
        out += bytes(wire.ffi.buffer(one)) + payload.ljust(8, b"\0")
    found = wire.decode_first_bytes(out)
    assert [one.data for one in found.first_bytes] == [b"abcde", b"12345678"]
    for length in range(80, len(out)):
        with pytest.raises(Error):
            wire.decode_first_bytes(out[:length])


def test_a_process_event_becomes_text_and_numbers() -> None:
    one = wire.ffi.new("struct sniffer_process *", {"tgid": 7, "comm": b"caf\xc3", "event": 2})
    one.exe = b"/usr/bin/x"
    event = decode_process(bytes(wire.ffi.buffer(one)))
    assert (event.tgid, event.comm, event.exe, event.event) == (7, "caf\\xc3", "/usr/bin/x", 2)


def test_a_process_event_tells_how_the_process_began() -> None:
    start = {"args": b"sh\0-c\0", "args_len": 6, "parents": [{"tgid": 5, "comm": b"cron"}]}
    one = wire.ffi.new("struct sniffer_process *", {"tgid": 7, "start": start})
    raw = bytes(wire.ffi.buffer(one))
    event = decode_process(raw)
    assert (event.args, event.args_len, event.parents) == (b"sh\0-c\0", 6, ((5, "cron"),))
    assert decode_process(raw[:576]).parents == ()


def test_a_process_event_of_an_older_module_has_no_cgroup_and_of_a_later_one_has() -> None:
    one = wire.ffi.new("struct sniffer_process *", {"tgid": 7, "cgroup": b"/a\xff\r/b"})
    raw = bytes(wire.ffi.buffer(one))
    assert decode_process(raw + b"more").cgroup == b"/a\xff\r/b"
    assert decode_process(raw[:320]).cgroup == b""
    assert decode_process(raw[:400]).tgid == 7
    with pytest.raises(Error):
        decode_process(raw[:319])


def test_how_names_are_those_of_the_header() -> None:
    for name in ("context", "socket", "inode", "listener", "reverse", "diag", "proc"):
        assert wire.is_named(wire.how_value(name))
    for name in ("forwarded", "kernel", "no_socket", "socket_gone", "predates", "not_probed"):
        assert not wire.is_named(wire.how_value(name))
    assert wire.how_name(wire.lib.SNIFFER_HOW_FORWARDED) == "forwarded"
    assert wire.how_name(200) == "how_200"
    with pytest.raises(Error, match="unknown how 'magic'"):
        wire.how_value("magic")


def test_a_packet_for_people_has_the_time_of_day_of_its_own_moment() -> None:
    batch = wire.decode_batch(message(1, mono_ns=5_000_000_000, real_ns=1_700_000_005_000_000_000))
    record = batch.records.copy()[0]
    record["time_ns"] = 4_000_001_000
    packet = wire.packet(record, Clock.from_head(batch.head))
    assert packet.time == datetime.fromtimestamp(1_700_000_004, UTC).replace(microsecond=1)
    assert (packet.dir, packet.proto, packet.pid, packet.comm) == ("out", "tcp", 4242, "worker")
    assert (packet.src, packet.sport, packet.dst, packet.dport) == (
        "192.0.2.1",
        40000,
        "192.0.2.2",
        443,
    )


def test_an_unnamed_packet_has_no_pid_and_a_reason() -> None:
    record = wire.decode_batch(message(1)).records.copy()[0]
    record["how"] = wire.lib.SNIFFER_HOW_NO_SOCKET
    packet = wire.packet(record, Clock(0, 0))
    assert (packet.pid, packet.uid, packet.comm, packet.how) == (None, None, "", "no_socket")


def test_ipv6_addresses_are_shortened() -> None:
    raw = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    assert wire.address_text(socket.AF_INET6, raw) == "2001:db8::1"


def flows_message(*records: Any, size: Any = None) -> Any:
    """A message of group flows; each flow stands for so many records."""
    whole = np.zeros(1, wire.FLOW_BATCH)
    flows = np.zeros(len(records), wire.FLOW_RECORD)
    flows["records"] = records
    flows["last"]["len"] = 1000
    whole["batch"]["version"], whole["batch"]["count"] = wire.lib.SNIFFER_VERSION, len(records)
    whole["batch"]["record_size"] = size or wire.FLOW_RECORD.itemsize
    whole["wire_packets"], whole["wire_bytes"] = 70, 80000
    more = (size or wire.FLOW_RECORD.itemsize) - wire.FLOW_RECORD.itemsize
    return whole.tobytes() + b"".join(flow.tobytes() + bytes(more) for flow in flows)


def test_a_batch_of_flows_tells_how_many_records_it_stands_for() -> None:
    batch = wire.decode_flows(flows_message(3, 4))
    assert (batch.count, len(batch.flows)) == (7, 2)
    assert (batch.wire_packets, batch.wire_bytes) == (70, 80000)
    assert batch.flows["last"]["len"].tolist() == [1000, 1000]
    assert int(batch.head["version"]) == wire.lib.SNIFFER_VERSION


def test_longer_flow_records_of_a_later_release_are_read() -> None:
    assert wire.decode_flows(flows_message(3, 4, size=160)).flows["records"].tolist() == [3, 4]


@pytest.mark.parametrize("cut", [1, 90, 200])
def test_a_batch_of_flows_that_is_cut_is_refused(cut: int) -> None:
    with pytest.raises(Error, match="malformed"):
        wire.decode_flows(flows_message(3, 4)[:-cut])


def test_a_batch_of_flows_of_another_version_is_refused() -> None:
    message = bytearray(flows_message(1))
    message[0] += 1
    with pytest.raises(VersionMismatch):
        wire.decode_flows(bytes(message))
