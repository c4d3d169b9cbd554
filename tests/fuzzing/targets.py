# SPDX-License-Identifier: MIT
"""What reads input of others: one function a format, and good input to begin with.

A target may raise nlproto.Error, which is how bad input is refused. Anything else is a finding.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from daemon.serve.requests import parse_request, request_id
from fleet import schema
from fleet import wire as told
from fleet.ask.questions import who
from fleet.ask.store import FlowStore, Range, open_tables
from fleet.ask.wanted import Wanted
from fleet.collect.tables import Received, hours_of
from hunter.formats import captures, ownercomment, pcapng
from hunter.sources.source_file import FileSource
from nlproto import Error
from nlproto.client.frames import Decoder, Kind, encode_json
from nlproto.filters.filter import EVERYTHING
from nlproto.filters.parse import parse
from nlproto.host import cgroups, containers, procfs
from nlproto.kernel import netlink
from nlproto.overheard import dns
from nlproto.overheard.hello import server_name
from nlproto.records import wire
from nlproto.records.process_event import decode_process

__all__ = ["SEEDS", "TARGETS"]

Target = Callable[[bytes], None]
_LIMIT = 1 << 16


def batch(data: bytes) -> None:
    """What engine module gets, and what the daemon sends: a batch of records."""
    found = wire.decode_batch(data)
    assert found.count == len(found.records)
    parse("port 53 or host 10.0.0.0/8 or pname x").mask(found.records)


def flows(data: bytes) -> None:
    """A message of group `flows`."""
    wire.decode_flows(data)


def process(data: bytes) -> None:
    """A message of group `processes`."""
    decode_process(data)


def first_bytes(data: bytes) -> None:
    """First bytes of packets."""
    wire.decode_first_bytes(data)


def attributes(data: bytes) -> None:
    """Netlink messages and their attributes."""
    for message in netlink.messages(memoryview(data)):
        for _, payload in netlink.attributes(message.payload[4:]):
            bytes(payload)


def frames(data: bytes) -> None:
    """The UNIX socket's frames, in two pieces, and the requests in them."""
    decoder = Decoder(_LIMIT)
    half = len(data) // 2
    for piece in (data[:half], data[half:]):
        for kind, payload in decoder.feed(piece):
            if kind is Kind.CONTROL:
                request_id(payload)
                parse_request(payload)


def request(data: bytes) -> None:
    """One request to the daemon."""
    request_id(data)
    parse_request(data)


def filter_text(data: bytes) -> None:
    """The filter language; what was understood means the same when it is written and read again."""
    found = parse(data.decode("utf-8", "surrogateescape"), resolve=False)
    found.mask(_RECORDS)
    again = parse(str(found), resolve=False)
    assert (again.mask(_RECORDS) == found.mask(_RECORDS)).all(), str(found)


def capture(data: bytes) -> None:
    """pcap and pcapng, as annotate reads them."""
    interfaces: list[pcapng.Interface] = []
    for block in captures.read_capture(io.BytesIO(data), "fuzz"):
        if block.kind == pcapng.SECTION:
            interfaces = []
        elif block.kind == pcapng.INTERFACE:
            interfaces.append(pcapng.Interface.of(block))
        packet = pcapng.packet_of(block, interfaces)
        if packet is not None:
            captures.look(packet)
            captures.flow_of(packet)
            pcapng.with_comment(block, "x")


def saved(data: bytes) -> None:
    """Every format that -r reads; which one is seen from the content."""
    descriptor = os.memfd_create("saved")
    try:
        os.write(descriptor, data)
        with FileSource([f"/proc/self/fd/{descriptor}"], EVERYTHING) as source:
            while source.read(0) is not None:
                pass
    finally:
        os.close(descriptor)


def comment(data: bytes) -> None:
    """The owner in a packet's comment; ValueError refuses it."""
    with contextlib.suppress(ValueError):
        ownercomment.read_comment(data.decode("utf-8", "replace"))


def cgroup(data: bytes) -> None:
    """/proc/PID/cgroup: users choose the names in it."""
    path, _ = cgroups.path_of(data)
    cgroups.place_of(path)


def runtime_file(data: bytes) -> None:
    """What container runtimes write of a container."""
    for read in _RUNTIME_READERS:
        read(data)


def dns_answer(data: bytes) -> None:
    """An answer of DNS: whoever is asked chooses it. Names that come out are host names."""
    with contextlib.suppress(dns.MalformedDns):
        found = dns.parse(data)
        assert not found.name or dns.valid_name(found.name), found


def client_hello(data: bytes) -> None:
    """The beginning of a TLS stream, whole and cut."""
    for end in (len(data), len(data) // 2):
        name = server_name(data[:end])
        assert not name or dns.valid_name(name), name


def proc(data: bytes) -> None:
    """/proc/PID: what a process chooses in it, and all the rest too."""
    for name in ("stat", "status", "cmdline", "cgroup", "comm"):
        (_PROC / "1" / name).write_bytes(data)
    procfs.identity(1, _PROC)
    procfs.parents(1, 1 << 62, _PROC)
    procfs.parent(1, _PROC)
    procfs.owner(1, _PROC)
    procfs.details(1, 0, proc=_PROC)


def proc_net(data: bytes) -> None:
    """/proc/net/tcp and its like."""
    for name in ("tcp", "tcp6", "udp", "udp6"):
        (_PROC / "net" / name).write_bytes(data)
    procfs.tables(_PROC / "net")


_RUNTIME_READERS = (
    containers._of_docker,
    containers._of_bundle,
    lambda data: containers._of_storage(data, "a" * 64),
)


_FOLDER = tempfile.TemporaryDirectory()
_PROC = Path(_FOLDER.name)
for _name in ("1", "net"):
    (_PROC / _name).mkdir()

_RECORDS = np.zeros(4, wire.RECORD)
_RECORDS["family"], _RECORDS["proto"] = 2, (6, 17, 6, 17)
_RECORDS["dport"], _RECORDS["tgid"] = (53, 80, 443, 0), (1, 2, 3, 0)
_RECORDS["comm"] = (b"curl", b"x y", b"\xff", b"")


def _head(dtype: np.dtype[np.void], size: int, count: int) -> bytes:
    head = np.zeros(1, dtype)
    head["version"], head["record_size"], head["count"] = wire.lib.SNIFFER_VERSION, size, count
    return head.tobytes()


def _frames() -> Iterator[bytes]:
    for fields in (
        {"op": "hello", "protocol": 1},
        {"op": "who", "port": 53, "proto": "udp", "since": 60.5},
        {"op": "lookup", "keys": [{"cookie": 1}, {"tgid": 1, "start_ns": 2}]},
        {"op": "history", "proto": "tcp", "ends": [["10.0.0.1", 1], ["::1", 2]], "limit": 5},
        {"op": "subscribe", "filter": "tcp and port 80", "snaps": True},
    ):
        yield encode_json(Kind.CONTROL, {"id": 1, **fields})


def _captures() -> Iterator[bytes]:
    frame = (
        bytes(12)
        + b"\x08\x00"
        + bytes.fromhex(
            "4500003c000040004006000010000001100000021f900050000000010000000050020000000000000000"
        )
    )
    yield (
        struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
        + struct.pack("<IIII", 1, 2, len(frame), len(frame))
        + frame
    )
    head = pcapng.section_header("fuzz")
    yield head + pcapng._block(pcapng.INTERFACE, struct.pack("<HHI", 1, 0, 0))


def _rows() -> Iterator[bytes]:
    columns: dict[str, object] = {"time": "2026-01-01T00:00:00.000001Z"}
    columns |= {"dir": "out", "proto": "tcp"}
    columns |= {"saddr": "10.0.0.1", "sport": 1, "daddr": "::1", "dport": 443, "len": 60}
    columns |= {"pid": 7, "comm": "curl", "how": "context"}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows([columns, columns.values()])
    yield text.getvalue().encode()
    yield json.dumps(columns).encode() + b"\n"


_QUESTION = b"\7example\3org\0" + bytes.fromhex("00010001")


def _hello(name: bytes) -> bytes:
    """A ClientHello (RFC 8446, 4.1.2) that asks for `name`."""
    names = b"\0" + len(name).to_bytes(2) + name
    extension = b"\0\0" + (len(names) + 2).to_bytes(2) + len(names).to_bytes(2) + names
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    body += len(extension).to_bytes(2) + extension
    message = b"\1" + len(body).to_bytes(3) + body
    return b"\x16\3\1" + len(message).to_bytes(2) + message


def _plain(*texts: str) -> Callable[[], list[bytes]]:
    return lambda: [text.encode() for text in texts]


def fleet_batch(data: bytes) -> None:
    """What a collector gets from a host."""
    _stored(told.decode(data))


def fleet_body(data: bytes) -> None:
    """The same behind its compression: a kind, and a body."""
    kind, body = 1 + data[0] % 3 if data else 1, data[1:]
    size = told.ROW.itemsize if kind == told.FLOWS else 0
    count = max(1, len(body) // size) if size else body.count(b"{") or 1
    _stored(told.decode(told._packed(kind, bytes(16), 1, size, count, body)))


def _stored(found: told.HostBatch) -> None:
    """All times are taken: whatever it says goes into tables."""
    hours, _ = hours_of([Received("h", found)], (-(1 << 62), 1 << 62))
    assert sum(hour.table.num_rows for hour in hours) <= len(found)


def fleet_filter(data: bytes) -> None:
    """A filter as a condition of SQL: whatever is in it, the statement stays the statement."""
    wanted = parse(data.decode("utf-8", "surrogateescape"), resolve=False, elsewhere=True)
    total, rows = who(_asked(), Wanted(wanted), 10)
    assert total == len(rows) <= 1


@functools.cache
def _asked() -> FlowStore:
    """One flow of one process, in memory."""
    flow = dict.fromkeys(schema.FLOWS.names) | dict.fromkeys(
        ("sequence", "netns", "cookie", "flags", "packets_in", "bytes_out", "bytes_in"), 0
    )
    flow |= {"host": "h", "boot": "b", "laddr": "10.0.0.1", "lport": 4, "raddr": "10.0.0.2"}
    flow |= {"rport": 53, "protocol": 6, "forwarded": False, "tgid": 1, "start_ns": 1, "uid": 0}
    flow |= {"comm": "curl", "how": "socket", "first_ns": 1, "last_ns": 1, "packets_out": 1}
    process = dict.fromkeys(schema.PROCS.names) | {"host": "h", "boot": "b", "tgid": 1}
    process |= {"start_ns": 1, "at_ns": 1, "exe": "/usr/bin/curl", "parents": ["1 init"]}
    tables = {
        "flows": pa.Table.from_pylist([flow], schema.FLOWS),
        "procs": pa.Table.from_pylist([process], schema.PROCS),
    }
    return open_tables(tables, Range(0, 10))


def _fleet_bodies() -> Iterator[bytes]:
    rows = np.zeros(2, told.ROW)
    rows["family"], rows["nat"], rows["domain"] = 2, (0, 10), (0, 9)
    yield b"\0" + rows.tobytes()
    yield b"\0" + rows.tobytes() + b'{"9":"a.example"}'
    yield b'\1[{"tgid":1,"start_ns":2,"at_ns":3,"exe":"/bin/x","parents":["1 init"],"pod":"a/b"}]'
    yield b'\2[{"at_ns":1,"exported":1,"acknowledged":1,"spooled":0,"lost":0}]'


def _fleet_batches() -> Iterator[bytes]:
    for data in _fleet_bodies():
        kind, body = data[0] + 1, data[1:]
        size = told.ROW.itemsize if kind == told.FLOWS else 0
        yield told._packed(kind, bytes(16), 1, size, len(body) // size if size else 1, body)


TARGETS: dict[str, Target] = {
    one.__name__: one
    for one in (
        *(batch, flows, process, first_bytes, attributes, frames, request, filter_text),
        *(capture, saved, comment, cgroup, runtime_file, proc, proc_net, dns_answer, client_hello),
        *(fleet_batch, fleet_body, fleet_filter),
    )
}

SEEDS: dict[str, Callable[[], Iterator[bytes] | list[bytes]]] = {
    "batch": lambda: [_head(wire.BATCH, wire.RECORD.itemsize, 4) + _RECORDS.tobytes()],
    "flows": lambda: [
        _head(wire.BATCH, wire.FLOW_RECORD.itemsize, 1)
        + bytes(wire.FLOW_BATCH.itemsize - wire.BATCH.itemsize + wire.FLOW_RECORD.itemsize)
    ],
    "process": lambda: [bytes(wire.PROCESS.itemsize)],
    "first_bytes": lambda: [_head(wire.BATCH, 0, 1) + bytes(wire.SNAP.itemsize)],
    "attributes": lambda: [
        struct.pack("=IHHII", 28, 16, 0, 1, 0) + bytes(4) + struct.pack("=HHI", 8, 1, 7)
    ],
    "frames": lambda: _frames(),
    "request": lambda: [one[8:] for one in _frames()],
    "filter_text": _plain(
        "tcp and port 53",
        "not (host 10.0.0.1 or net 10.0.0.0/8)",
        'pname "a b" or pid 1',
        "src portrange 1-9 and greater 100",
        "container web or unit ssh.service",
        "how context",
    ),
    "capture": lambda: _captures(),
    "saved": lambda: [*_captures(), *_rows()],
    "comment": _plain("pid=7 comm=curl exe=/usr/bin/curl", "curl.7 exe=/usr/bin/curl how=context"),
    "cgroup": _plain(
        "0::/system.slice/docker-" + "a" * 64 + ".scope\n",
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope\n",
        "12:pids:/kubepods/besteffort/pod1/" + "b" * 64 + "\n0::/\n",
    ),
    "runtime_file": _plain(
        '{"ID": "a", "Name": "/web", "Config": {"Image": "nginx", "Labels": {"a": "b"}}}',
        '{"annotations": {"io.kubernetes.cri.container-name": "web"}}',
        '[{"id": "a", "names": ["web"], "metadata": "{}"}]',
    ),
    "dns_answer": lambda: [
        bytes.fromhex("123481800001000200000000")
        + _QUESTION
        + bytes.fromhex("c00c000500010000003c000603777777c00c")
        + bytes.fromhex("03777777c00c00010001000000050004c0000201")
    ],
    "fleet_filter": _plain(
        "src port 53 or not (dst net 10.0.0.0/8 and pname 'x')",
        "pname c* and parent init or exe /usr/* and how named",
        'domain "a\'; DROP TABLE flow; --" or inbound and unit $f0',
        "tcp and host 10.0.0.1 and container web",
    ),
    "fleet_batch": lambda: _fleet_batches(),
    "fleet_body": lambda: _fleet_bodies(),
    "client_hello": lambda: [_hello(b"example.org")],
    "proc": _plain("1 (a) b) S 1 1 1 0 -1 4194560 1 0 0 0 1 1 0 0 20 0 1 0 12 1 1 1 1\n"),
    "proc_net": _plain(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
        "   0: 0100007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0"
        "        0 12 1 0000000000000000 100 0 0 10 0\n",
    ),
}


def run(name: str, data: bytes) -> None:
    """Give `data` to target `name`; refusing it is right."""
    with contextlib.suppress(Error):
        TARGETS[name](data)
