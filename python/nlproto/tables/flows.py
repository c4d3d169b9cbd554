# SPDX-License-Identifier: MIT
"""Sums up records by flow and owner, whole batches at a time."""

from __future__ import annotations

import socket

import numpy as np

from nlproto.records import wire
from nlproto.tables.column_table import mix

__all__ = [
    "FLOW",
    "KEY_FIELDS",
    "address_bytes",
    "address_words",
    "group",
    "pack_address",
    "summarize",
]

FLOW = np.dtype(
    [
        ("hash", "u8"),
        ("cookie", "u8"),
        ("start_ns", "u8"),
        ("laddr", "u8", (2,)),
        ("raddr", "u8", (2,)),
        ("tgid", "u4"),
        ("netns", "u4"),
        ("lport", "u2"),
        ("rport", "u2"),
        ("proto", "u1"),
        ("family", "u1"),
        ("forwarded", "u1"),
        ("how", "u1"),
        ("flags", "u2"),
        ("uid", "u4"),
        ("inode", "u8"),
        ("first_ns", "u8"),
        ("last_ns", "u8"),
        ("packets_in", "u8"),
        ("bytes_in", "u8"),
        ("packets_out", "u8"),
        ("bytes_out", "u8"),
        ("comm", wire.RECORD["comm"]),
    ]
)
"""One flow of one owner. Local and remote end (of a forwarded flow: the lower and the higher end,
"out" is from the lower one); addresses are the 16 bytes of the record seen as two numbers; times
are CLOCK_MONOTONIC; packets and bytes are those of the wire, after segmentation; how, uid, inode
and comm are the last record's, flags all that were set."""

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
    """One FLOW for each flow and owner in `records` (RECORD), in no order.

    `seed`: makes hashes that a sender of packets cannot foresee; the same for all batches that
    are put into one table.
    """
    return group(records, seed)[0]


def group(records: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As summarize(); and for each record the index of its FLOW."""
    if not len(records):
        return np.empty(0, FLOW), np.empty(0, np.intp)
    keys = _ends(records)
    keys["cookie"] = records["cookie"]
    keys["start_ns"] = records["start_ns"]
    for name in ("tgid", "netns", "proto", "family"):
        keys[name] = records[name]
    keys["hash"] = _hash(keys, seed)

    order = np.argsort(keys["hash"], kind="stable")
    ordered = keys[order]
    change = _differs(ordered)
    hashes = ordered["hash"]
    if np.any(change & (hashes[1:] == hashes[:-1])):
        order = np.lexsort(_columns(keys))
        ordered = keys[order]
        change = _differs(ordered)
    starts = np.concatenate(([0], np.flatnonzero(change) + 1))

    flows = ordered[starts]
    source = records[order]
    out = _is_out(source, ordered)
    segments = np.maximum(source["gso_segs"], 1).astype(np.uint64)
    size = source["len"] + (segments - np.uint64(1)) * source["hdr_len"]
    flows["packets_out"] = np.add.reduceat(segments * out, starts)
    flows["bytes_out"] = np.add.reduceat(size * out, starts)
    flows["packets_in"] = np.add.reduceat(segments * ~out, starts)
    flows["bytes_in"] = np.add.reduceat(size * ~out, starts)
    times = np.ascontiguousarray(source["time_ns"])
    flows["first_ns"] = np.minimum.reduceat(times, starts)
    flows["last_ns"] = np.maximum.reduceat(times, starts)
    flows["flags"] = np.bitwise_or.reduceat(np.ascontiguousarray(source["flags"]), starts)
    last = source[np.concatenate((starts[1:], [len(source)])) - 1]
    for name in ("how", "uid", "inode", "comm"):
        flows[name] = last[name]
    belongs = np.empty(len(records), np.intp)
    belongs[order] = np.concatenate(([0], np.cumsum(change)))
    return flows, belongs


def _ends(records: np.ndarray) -> np.ndarray:
    """FLOWs with their ends filled in, one per record."""
    flows = np.zeros(len(records), FLOW)
    source = np.ascontiguousarray(records["saddr"]).view(np.uint64)
    target = np.ascontiguousarray(records["daddr"]).view(np.uint64)
    sport, dport = records["sport"], records["dport"]
    direction = records["dir"]
    forwarded = direction == wire.lib.SNIFFER_DIR_FWD
    swap = direction == wire.lib.SNIFFER_DIR_IN
    if forwarded.any():
        swap = swap | (forwarded & _higher(source, sport, target, dport))
    column = swap[:, None]
    flows["laddr"] = np.where(column, target, source)
    flows["raddr"] = np.where(column, source, target)
    flows["lport"] = np.where(swap, dport, sport)
    flows["rport"] = np.where(swap, sport, dport)
    flows["forwarded"] = forwarded
    return flows


def _higher(
    source: np.ndarray, sport: np.ndarray, target: np.ndarray, dport: np.ndarray
) -> np.ndarray:
    """Whether the source end sorts after the target end; any fixed order will do."""
    result = source[:, 0] > target[:, 0]
    same = source[:, 0] == target[:, 0]
    result |= same & (source[:, 1] > target[:, 1])
    same &= source[:, 1] == target[:, 1]
    return np.asarray(result | (same & (sport > dport)))


def _is_out(records: np.ndarray, flows: np.ndarray) -> np.ndarray:
    out = records["dir"] == wire.lib.SNIFFER_DIR_OUT
    forwarded = flows["forwarded"] != 0
    if forwarded.any():
        source = np.ascontiguousarray(records["saddr"]).view(np.uint64)
        same = np.all(source == flows["laddr"], axis=1) & (records["sport"] == flows["lport"])
        out = np.where(forwarded, same, out)
    return np.asarray(out)


def _hash(flows: np.ndarray, seed: int) -> np.ndarray:
    ports = (
        flows["lport"].astype(np.uint64) << np.uint64(48)
        | flows["rport"].astype(np.uint64) << np.uint64(32)
        | flows["netns"]
    )
    owner = (
        flows["tgid"].astype(np.uint64) << np.uint64(24)
        | flows["proto"].astype(np.uint64) << np.uint64(16)
        | flows["family"].astype(np.uint64) << np.uint64(8)
        | flows["forwarded"]
    )
    laddr, raddr = flows["laddr"], flows["raddr"]
    parts = (
        laddr[:, 0],
        laddr[:, 1],
        raddr[:, 0],
        raddr[:, 1],
        ports,
        owner,
        flows["cookie"],
        flows["start_ns"],
    )
    return mix(parts, seed)


def _columns(flows: np.ndarray) -> list[np.ndarray]:
    columns: list[np.ndarray] = []
    for name in KEY_FIELDS:
        column = flows[name]
        columns.extend([column[:, 0], column[:, 1]] if column.ndim == 2 else [column])
    return columns


def _differs(flows: np.ndarray) -> np.ndarray:
    """For each but the first: whether its key is another than the one before it."""
    result = np.zeros(len(flows) - 1, bool)
    for column in _columns(flows):
        result |= column[1:] != column[:-1]
    return result


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
