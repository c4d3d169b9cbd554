# SPDX-License-Identifier: MIT
"""Sums up records by flow and owner, whole batches at a time, in C (flows.c)."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import numpy as np

from nlproto._host import ffi, lib
from nlproto.errors import Error
from nlproto.records.wire import BATCH, dtype_of
from nlproto.records.wire import lib as wire
from nlproto.tables.column_table import new_slots, without

__all__ = [
    "FLOW",
    "KEY_FIELDS",
    "LOOKED",
    "address_bytes",
    "address_words",
    "decode_flows",
    "encode_flows",
    "first_of_processes",
    "group",
    "pack_address",
    "settle_opened",
    "summarize",
    "unnamed_places",
]

_WORD = (1 << 64) - 1
_SYN, _ACK = 2, 16


FLOW = without(dtype_of("flow", ffi), "zero", "dirty", "nat_zero", "reserved")
"""One flow of one owner, with its local and remote end. A forwarded flow has the lower and the
higher end in their place, and "out" is from the lower one. Addresses are the 16 bytes of the
record, as two numbers. Times are CLOCK_MONOTONIC ns. Packets and bytes are those on the wire, after
segmentation. how, uid, inode and comm are from the last record; flags has all that were ever set.
The nat_ fields are what NAT made of the ends; nat_lport 0: no translation is known. tcp_in and
tcp_out have the TCP flags of all packets in that direction. opened says who sent the SYN: 1 this
end, 2 the other one. rtt_us and retransmits are the connection's, if flags has LOOKED: the history
has them, summarize() does not."""

LOOKED = 1 << 15
"""In a FLOW's flags: the kernel was asked how the connection went."""

KEY_FIELDS = (
    "cookie",
    "start_ns",
    "laddr",
    "raddr",
    "tgid",
    "netns",
    "lport",
    "rport",
    "proto",
    "family",
    "forwarded",
)
"""The key of a flow; `hash` is made from these fields."""


def summarize(records: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return one FLOW for each flow and owner in `records` (RECORD), in order of appearance.

    `seed`: makes hashes that a sender of packets cannot foresee. It must be the same for all
    batches that go into one table.
    """
    return _sum(records, seed, ffi.NULL)


def group(records: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return what summarize() returns, and for each record the index of its FLOW."""
    belongs = np.empty(len(records), np.uint32)
    return _sum(records, seed, ffi.from_buffer("uint32_t[]", belongs)), belongs


def _sum(records: np.ndarray, seed: int, belongs: Any) -> np.ndarray:
    records = np.ascontiguousarray(records)
    flows = np.empty(len(records), FLOW)
    slots, bits = new_slots(len(records))
    count = lib.flows_sum(
        ffi.from_buffer("struct sniffer_record[]", records),
        len(records),
        seed & _WORD,
        ffi.from_buffer("struct flow[]", flows),
        belongs,
        ffi.from_buffer("uint32_t[]", slots),
        bits,
    )
    return flows[:count]


def settle_opened(flows: np.ndarray, belongs: np.ndarray, merged: np.ndarray) -> None:
    """Set `opened` of FLOWs that are the sums of FLOW_RECORDs; `belongs` as of group().

    Such a record has the TCP flags of several packets, so SYN and ACK together may mean either
    side. If both sides have a SYN here, the earlier one began. Otherwise a SYN without an ACK
    decides, or a record of one packet.
    """
    flags = merged["last"]["tcp_flags"]
    rows = np.flatnonzero((flags & _SYN) != 0)
    if not len(rows):
        return
    rows = rows[np.argsort(merged["first_ns"][rows], kind="stable")[::-1]]  # earliest last
    at, ack = belongs[rows], (flags[rows] & _ACK) != 0
    out = merged["last"]["dir"][rows] == wire.SNIFFER_DIR_OUT
    both = (flows["tcp_in"][at] & flows["tcp_out"][at] & _SYN) != 0
    sure = (both | ~ack | (merged["records"][rows] == 1)) & (flows["forwarded"][at] == 0)
    flows["opened"][at] = 0
    flows["opened"][at[sure]] = np.where(out == (both | ~ack), 1, 2)[sure]


def first_of_processes(records: np.ndarray, seed: int) -> np.ndarray:
    """Return where in `records` (RECORD) each process is named first."""
    records = np.ascontiguousarray(records)
    places = np.empty(len(records), np.uint32)
    slots, bits = new_slots(len(records))
    count = lib.flows_processes(
        ffi.from_buffer("struct sniffer_record[]", records),
        len(records),
        seed & _WORD,
        ffi.from_buffer("uint32_t[]", places),
        ffi.from_buffer("uint32_t[]", slots),
        bits,
    )
    return places[:count]


def unnamed_places(records: np.ndarray, hows: Iterable[int]) -> np.ndarray:
    """Return where records (RECORD) have no process, are not forwarded, and have one of `hows`."""
    records = np.ascontiguousarray(records)
    places = np.empty(len(records), np.uint32)
    count = lib.flows_unnamed(
        ffi.from_buffer("struct sniffer_record[]", records),
        len(records),
        sum(1 << how for how in set(hows)),
        ffi.from_buffer("uint32_t[]", places),
    )
    return places[:count]


def encode_flows(head: np.void, flows: np.ndarray) -> bytes:
    """Return the bytes of `flows` (FLOW), at most 65,535, behind `head` with size and count set."""
    first = np.zeros(1, BATCH)
    first[0] = head
    first["version"] = wire.SNIFFER_VERSION
    first["record_size"] = FLOW.itemsize
    first["count"] = len(flows)
    return first.tobytes() + flows.tobytes()


def decode_flows(payload: bytes | memoryview) -> tuple[np.void, np.ndarray]:
    """Return (BATCH, FLOWs) of what encode_flows() made in this release. Raises Error."""
    if len(payload) < BATCH.itemsize:
        raise Error(f"malformed flows: {len(payload)} bytes are less than a head")
    head: np.void = np.frombuffer(payload, BATCH, 1)[0]
    size, count = int(head["record_size"]), int(head["count"])
    if size != FLOW.itemsize or BATCH.itemsize + size * count != len(payload):
        raise Error(
            f"malformed flows: {len(payload)} bytes do not hold {count} of {size}; "
            "install client and daemon of one release"
        )
    return head, np.frombuffer(payload, FLOW, count, BATCH.itemsize)


def address_words(raw: bytes) -> tuple[int, int]:
    """Return a record's 16 address bytes as two numbers, as in FLOW."""
    words = np.frombuffer(raw.ljust(16, b"\0"), np.uint64)
    return int(words[0]), int(words[1])


def address_bytes(words: np.ndarray) -> bytes:
    """Return the 16 address bytes of FLOW's laddr or raddr."""
    return np.ascontiguousarray(words, np.uint64).tobytes()


def pack_address(address: str) -> tuple[int, bytes]:
    """Return (family, 16 bytes) of an address in text. Raises ValueError.

    An IPv4-mapped IPv6 address is IPv6."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return family, socket.inet_pton(family, address).ljust(16, b"\0")
    except OSError:
        raise ValueError(f"'{address}' is not an IP address") from None
