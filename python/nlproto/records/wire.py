# SPDX-License-Identifier: MIT
"""The wire of shared_proto.h: dtypes, enum names, batches in and out, and one record for people.

Every layout comes from the compiled header (`ffi.typeof(...).fields`); nothing is repeated here.
"""

from __future__ import annotations

import functools
import ipaddress
import operator
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from nlproto._wire import ffi, lib
from nlproto.errors import Error, VersionMismatch
from nlproto.records.clock import Clock

__all__ = [
    "CUT",
    "BATCH",
    "COUNTERS",
    "FLOW_BATCH",
    "FLOW_RECORD",
    "FLOW_TAIL",
    "HOLDER",
    "HOW_NAMES",
    "INFO",
    "MAX_TEXT",
    "NO_CPU",
    "PROCESS",
    "RECORD",
    "SNAP",
    "SOCKET",
    "TAIL",
    "Batch",
    "FlowBatch",
    "Packet",
    "PacketBytes",
    "FirstBytesBatch",
    "address_text",
    "are_named",
    "among",
    "bounded",
    "decode_array",
    "decode_batch",
    "decode_flows",
    "decode_first_bytes",
    "decode_struct",
    "dtype_of",
    "encode_batch",
    "encode_first_bytes",
    "ffi",
    "how_name",
    "how_value",
    "is_named",
    "joined",
    "plain_copy",
    "lib",
    "packet",
    "taken",
    "text",
]

_UNSIGNED = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}


def dtype_of(struct: str, compiled: Any = ffi) -> np.dtype[np.void]:
    """Return the compiler's layout of a struct of unsigned fields and structs.

    `compiled` is the ffi of the extension that knows it.
    """

    def field_format(ctype: Any) -> Any:
        if ctype.kind == "struct":
            return dtype_of(ctype.cname.removeprefix("struct "), compiled)
        if ctype.kind != "array":
            return _UNSIGNED[compiled.sizeof(ctype)]
        if ctype.item.cname == "char":
            return f"S{ctype.length}"
        return (field_format(ctype.item), (ctype.length,))

    ctype = compiled.typeof(f"struct {struct}")
    return np.dtype(
        {
            "names": [name for name, _ in ctype.fields],
            "formats": [field_format(field.type) for _, field in ctype.fields],
            "offsets": [field.offset for _, field in ctype.fields],
            "itemsize": compiled.sizeof(ctype),
        }
    )


RECORD = dtype_of("sniffer_record")
BATCH = dtype_of("sniffer_batch")
FLOW_RECORD = dtype_of("sniffer_flow_record")
FLOW_BATCH = dtype_of("sniffer_flow_batch")
TAIL = dtype_of("sniffer_tail")
FLOW_TAIL = dtype_of("sniffer_flow_tail")
PROCESS = dtype_of("sniffer_process")
SOCKET = dtype_of("sniffer_socket")
HOLDER = dtype_of("sniffer_holder")
INFO = dtype_of("sniffer_info")
COUNTERS = dtype_of("sniffer_counters")
SNAP = dtype_of("sniffer_snap")

NO_CPU = 0xFFFF
"""In a TAIL of engine ebpf: counts packets for which a program was skipped, on any CPU."""

_HOW_VALUES: dict[str, int] = {
    name.removeprefix("SNIFFER_HOW_").lower(): value
    for name, value in ffi.typeof("enum sniffer_how").relements.items()
    if name != "SNIFFER_HOW_REASONS"
}
_NAMES = {value: name for name, value in _HOW_VALUES.items()}

HOW_NAMES: tuple[str, ...] = tuple(_NAMES.get(value, f"how_{value}") for value in range(256))
"""Name of every value that the field `how` can hold, indexed by it."""

DIR_NAMES = {lib.SNIFFER_DIR_IN: "in", lib.SNIFFER_DIR_OUT: "out", lib.SNIFFER_DIR_FWD: "fwd"}
PROTO_NAMES = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}
PROTO_NUMBERS = {name: number for number, name in PROTO_NAMES.items()}


def how_name(how: int) -> str:
    """Return the name of `how` in lower case ("context"); "how_N" for an unknown value."""
    return HOW_NAMES[how]


def how_value(name: str) -> int:
    """Return the value of a `how` name. Raises Error for another word."""
    try:
        return _HOW_VALUES[name]
    except KeyError:
        known = ", ".join(sorted(_HOW_VALUES))
        raise Error(f"unknown how '{name}': it is one of {known}") from None


def is_named(how: int) -> bool:
    """Return whether `how` is a naming rule (True) or a reason why there is no owner (False)."""
    return 0 < how < int(lib.SNIFFER_HOW_REASONS)


def are_named(hows: np.ndarray) -> np.ndarray:
    """Return one bool for each `how` in an array: whether it is a naming rule."""
    return np.asarray((hows > 0) & (hows < lib.SNIFFER_HOW_REASONS))


def text(raw: bytes) -> str:
    """Return a kernel string as str: up to the first NUL, bytes that are no UTF-8 as \\xNN."""
    return bytes(raw).split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


MAX_TEXT = 4096
"""The most bytes of UTF-8 that are kept of a text chosen by a user."""
CUT = "…[cut]"
"""Ends a text that was too long."""


def bounded(raw: bytes) -> str:
    """Return `raw` as text of at most MAX_TEXT bytes; a longer one is cut and ends with "…[cut]".

    Bytes that are no UTF-8 become \\xNN, so the result is harmless JSON text.
    """
    whole = raw[: MAX_TEXT + 1].decode("utf-8", "backslashreplace")
    if len(whole) * 4 <= MAX_TEXT or len(whole.encode()) <= MAX_TEXT:
        return whole
    room = MAX_TEXT - len(CUT.encode())
    return whole.encode()[:room].decode("utf-8", "ignore") + CUT


@dataclass(frozen=True, slots=True)
class Batch:
    """One message of the packets group.

    `head` is one BATCH, `records` an array of RECORD. Both are read-only views of the buffer
    that was decoded and live as long as its contents do.
    """

    head: np.void
    records: np.ndarray

    @property
    def count(self) -> int:
        """How many records it stands for."""
        return len(self.records)


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """One message of the flows group: views, as in Batch.

    `flows` is an array of FLOW_RECORD, `wire_packets` and `wire_bytes` what its CPU had told of
    with it, since load.
    """

    head: np.void
    flows: np.ndarray
    wire_packets: int
    wire_bytes: int

    @property
    def count(self) -> int:
        """How many records it stands for."""
        return int(self.flows["records"].sum())


@dataclass(frozen=True, slots=True)
class PacketBytes:
    """The first bytes of one packet, from its IP header on; `head` is one SNAP."""

    head: np.void
    data: bytes


@dataclass(frozen=True, slots=True)
class FirstBytesBatch:
    """One message of the group `snaps`: the first bytes of some packets."""

    head: np.void
    first_bytes: tuple[PacketBytes, ...]


def joined(parts: Sequence[np.ndarray], kind: np.dtype[np.void] = RECORD) -> np.ndarray:
    """Return arrays of `kind` joined to a new array.

    It copies plain bytes: NumPy copies the fields of structures one by one, 50 times as slow.
    """
    raw = [np.ascontiguousarray(part).view((np.void, kind.itemsize)) for part in parts]
    return np.asarray(np.concatenate(raw).view(kind)) if raw else np.empty(0, kind)


def plain_copy(rows: np.ndarray) -> np.ndarray:
    """Return the array in memory of its own, read-only. Copies plain bytes too."""
    return np.ndarray(rows.shape, rows.dtype, rows.tobytes())


def taken(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the structures at `places`, as a new array. Copies plain bytes too."""
    raw = np.ascontiguousarray(rows).view((np.void, rows.dtype.itemsize))
    return np.asarray(raw[places].view(rows.dtype))


def among(values: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Return a mask: is each of `values` one of `some`? Like np.isin(), which would import 2 MB."""
    if not len(some):
        return np.zeros(len(values), bool)
    if np.array_equal(values, some):
        return np.ones(len(values), bool)
    some = np.sort(some)
    places = np.searchsorted(some, values)
    places[places == len(some)] = 0
    return np.asarray(some[places] == values)


def decode_struct(buf: bytes | memoryview, dtype: np.dtype[np.void]) -> np.void:
    """Return one struct at the beginning of `buf`, without a copy. It may be a longer, future one.

    Raises Error if `buf` is too short.
    """
    if len(buf) < dtype.itemsize:
        raise Error(f"malformed message: {len(buf)} bytes where {dtype.itemsize} are needed")
    view = memoryview(buf).toreadonly()
    one: np.void = np.frombuffer(view, dtype, 1)[0]
    return one


def decode_array(buf: bytes | memoryview, dtype: np.dtype[np.void]) -> np.ndarray:
    """Return `buf` as a read-only array of `dtype`, shape (n,).

    Raises Error when it is no whole number of them.
    """
    if len(buf) % dtype.itemsize:
        raise Error(f"malformed message: {len(buf)} bytes are no multiple of {dtype.itemsize}")
    return np.frombuffer(memoryview(buf).toreadonly(), dtype)


_SIZE_AND_COUNT = operator.itemgetter(*map((BATCH.names or ()).index, ("record_size", "count")))


def _decode_head(buf: bytes | memoryview, dtype: np.dtype[np.void] = BATCH) -> np.void:
    """Return a BATCH, or a dtype that begins with one."""
    whole = decode_struct(buf, dtype)
    head = whole["batch"] if dtype == FLOW_BATCH else whole
    version = int(head["version"])
    if version != lib.SNIFFER_VERSION:
        raise VersionMismatch(
            f"the sender speaks version {version} of the wire, this program version"
            f" {lib.SNIFFER_VERSION}: install module, daemon and hunter of one release"
        )
    return whole


def decode_batch(buf: bytes | memoryview) -> Batch:
    """Return the batch in `buf` (attribute SNIFFER_A_RECORDS) as views, without copying.

    Records step by the head's record_size: longer records of a later release are read up to
    what this one knows. Raises VersionMismatch for a version it does not know, Error when sizes
    do not add up. Source: shared_proto.h, rules for readers.
    """
    head = _decode_head(buf)
    return Batch(head, _decode_records(buf, head, BATCH, RECORD))


def decode_flows(buf: bytes | memoryview) -> FlowBatch:
    """Return the flow records in `buf` (attribute SNIFFER_A_FLOWS); as decode_batch()."""
    whole = _decode_head(buf, FLOW_BATCH)
    flows = _decode_records(buf, whole["batch"], FLOW_BATCH, FLOW_RECORD)
    return FlowBatch(whole["batch"], flows, int(whole["wire_packets"]), int(whole["wire_bytes"]))


def _decode_records(
    buf: bytes | memoryview, head: np.void, before: np.dtype[np.void], kind: np.dtype[np.void]
) -> np.ndarray:
    size, count = _SIZE_AND_COUNT(head.item())
    if size < kind.itemsize:
        raise Error(f"malformed batch: records of {size} bytes, at least {kind.itemsize} needed")
    if before.itemsize + size * count != len(buf):
        raise Error(f"malformed batch: {len(buf)} bytes do not hold {count} records of {size}")
    return np.ndarray((count,), kind, memoryview(buf).toreadonly(), before.itemsize, (size,))


def encode_batch(head: np.void, records: np.ndarray) -> bytes:
    """Return the message for `records` (RECORD): `head` with version, size and count set for them.

    Raises Error when there are more records than a head can count.
    """
    if len(records) > np.iinfo(BATCH["count"]).max:
        raise Error(f"a batch cannot hold {len(records)} records: split it")
    first = np.zeros(1, BATCH)
    first[0] = head
    first["version"] = lib.SNIFFER_VERSION
    first["record_size"] = RECORD.itemsize
    first["count"] = len(records)
    return first.tobytes() + records.astype(RECORD, copy=False).tobytes()


def decode_first_bytes(buf: bytes | memoryview) -> FirstBytesBatch:
    """Return the first bytes in `buf` (attribute SNIFFER_A_SNAPS), all of it copied.

    Raises VersionMismatch for a version it does not know, Error when sizes do not add up.
    """
    head = _decode_head(bytes(buf[: BATCH.itemsize]))
    view = memoryview(buf).toreadonly()
    first_bytes = []
    at = BATCH.itemsize
    for _ in range(int(head["count"])):
        one = decode_struct(bytes(view[at : at + SNAP.itemsize]), SNAP)
        at += SNAP.itemsize
        caplen = int(one["caplen"])
        if at + caplen > len(view):
            raise Error(f"malformed first bytes: {caplen} bytes announced, {len(view) - at} left")
        first_bytes.append(PacketBytes(one, bytes(view[at : at + caplen])))
        at += -(-caplen // 8) * 8
    return FirstBytesBatch(head, tuple(first_bytes))


def encode_first_bytes(head: np.void, first_bytes: Sequence[PacketBytes]) -> bytes:
    """Return the message that decode_first_bytes() reads; `head` gets version and count."""
    first = np.zeros(1, BATCH)
    first[0] = head
    first["version"], first["record_size"] = lib.SNIFFER_VERSION, 0
    first["count"] = len(first_bytes)
    parts = [first.tobytes()]
    for one in first_bytes:
        parts += (one.head.tobytes(), one.data, bytes(-len(one.data) % 8))
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Packet:
    """One record for people: plain Python values, unknown ones None.

    `len` is the IP length in bytes before segmentation, `segments` the wire packets in it;
    `how` is the naming rule or the reason why `pid` is None.
    """

    time: datetime
    dir: str
    proto: str
    src: str
    sport: int
    dst: str
    dport: int
    len: int
    pid: int | None
    comm: str
    uid: int | None
    netns: int
    how: str
    flags: int
    tcp_flags: int
    segments: int
    ifindex: int
    cookie: int
    inode: int
    tid: int | None
    creator: int | None
    start_ns: int
    time_ns: int


def address_text(family: int, raw: bytes | np.ndarray) -> str:
    """Return the address in a 16-byte field as text; `family` is AF_INET or AF_INET6."""
    return _address_text(family, bytes(raw))


@functools.lru_cache(1 << 14)
def _address_text(family: int, octets: bytes) -> str:
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(octets[:4]))
    return str(ipaddress.IPv6Address(octets))


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def packet(record: np.void, clock: Clock) -> Packet:
    """Return one RECORD for people; `clock` is that of its batch's head (Clock.from_head)."""
    family = int(record["family"])
    how = int(record["how"])
    named = is_named(how)
    time_ns = int(record["time_ns"])
    return Packet(
        time=_EPOCH + timedelta(microseconds=clock.real_ns(time_ns) // 1000),
        dir=DIR_NAMES.get(int(record["dir"]), "?"),
        proto=PROTO_NAMES.get(int(record["proto"]), str(int(record["proto"]))),
        src=address_text(family, record["saddr"]),
        sport=int(record["sport"]),
        dst=address_text(family, record["daddr"]),
        dport=int(record["dport"]),
        len=int(record["len"]),
        pid=int(record["tgid"]) if named else None,
        comm=text(record["comm"]) if named else "",
        uid=int(record["uid"]) if named else None,
        netns=int(record["netns"]),
        how=HOW_NAMES[how],
        flags=int(record["flags"]),
        tcp_flags=int(record["tcp_flags"]),
        segments=max(1, int(record["gso_segs"])),
        ifindex=int(record["ifindex"]),
        cookie=int(record["cookie"]),
        inode=int(record["inode"]),
        tid=int(record["tid"]) or None,
        creator=int(record["creator"]) or None,
        start_ns=int(record["start_ns"]),
        time_ns=time_ns,
    )
