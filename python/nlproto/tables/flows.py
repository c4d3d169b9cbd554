# SPDX-License-Identifier: MIT
"""Sums up records by flow and owner, whole batches at a time, in C (flows.c)."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Any

import numpy as np

from nlproto._host import ffi, lib
from nlproto.records.wire import dtype_of
from nlproto.tables.column_table import new_slots, without

__all__ = [
    "FLOW",
    "KEY_FIELDS",
    "address_bytes",
    "address_words",
    "first_of_processes",
    "group",
    "pack_address",
    "summarize",
    "unnamed_places",
]

_WORD = (1 << 64) - 1


FLOW = without(dtype_of("flow", ffi), "zero", "dirty")
"""One flow of one owner, with its local and remote end. Of a forwarded flow these are the lower
and the higher end, and "out" is from the lower one. Addresses are the 16 bytes of the record, seen
as two numbers. Times are CLOCK_MONOTONIC ns. Packets and bytes are those of the wire, after
segmentation. how, uid, inode and comm are the last record's; flags has all that were set."""

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
"""What makes two flows different; `hash` is made of these."""


def summarize(records: np.ndarray, seed: int = 0) -> np.ndarray:
    """One FLOW for each flow and owner in `records` (RECORD), in order of appearance.

    `seed`: makes hashes that a sender of packets cannot foresee; the same for all batches that
    are put into one table.
    """
    return _sum(records, seed, ffi.NULL)


def group(records: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As summarize(); and for each record the index of its FLOW."""
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


def first_of_processes(records: np.ndarray, seed: int) -> np.ndarray:
    """Where in `records` (RECORD) each process is named first."""
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
    """Where records (RECORD) are that have no process, are not forwarded, and one of `hows`."""
    records = np.ascontiguousarray(records)
    places = np.empty(len(records), np.uint32)
    count = lib.flows_unnamed(
        ffi.from_buffer("struct sniffer_record[]", records),
        len(records),
        sum(1 << how for how in set(hows)),
        ffi.from_buffer("uint32_t[]", places),
    )
    return places[:count]


def address_words(raw: bytes) -> tuple[int, int]:
    """A record's 16 address bytes as in FLOW."""
    words = np.frombuffer(raw.ljust(16, b"\0"), np.uint64)
    return int(words[0]), int(words[1])


def address_bytes(words: np.ndarray) -> bytes:
    """The 16 address bytes of FLOW's laddr or raddr."""
    return np.ascontiguousarray(words, np.uint64).tobytes()


def pack_address(address: str) -> tuple[int, bytes]:
    """(family, 16 bytes) of an address in text; IPv4-mapped IPv6 is IPv6. Raises ValueError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return family, socket.inet_pton(family, address).ljust(16, b"\0")
    except OSError:
        raise ValueError(f"'{address}' is not an IP address") from None
