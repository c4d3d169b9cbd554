# SPDX-License-Identifier: MIT
"""Records and batches as an engine gives them, with what a test says of them."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np

from nlproto.records import wire
from nlproto.tables.flows import pack_address

__all__ = ["make_batch", "make_records"]


def make_records(*rows: dict[str, Any]) -> np.ndarray:
    """RECORDs; what a row leaves out is an outgoing UDP packet of process 100."""
    records = np.zeros(len(rows), wire.RECORD)
    for record, row in zip(records, rows, strict=True):
        values = {
            "time_ns": 1_000_000_000,
            "family": socket.AF_INET,
            "proto": socket.IPPROTO_UDP,
            "dir": wire.lib.SNIFFER_DIR_OUT,
            "how": wire.lib.SNIFFER_HOW_SOCKET,
            "tgid": 100,
            "start_ns": 5_000_000_000,
            "uid": 1000,
            "netns": 4026531840,
            "len": 60,
            "hdr_len": 28,
            "gso_segs": 1,
            "sport": 40000,
            "dport": 53,
            "saddr": "10.0.0.1",
            "daddr": "10.0.0.2",
            "comm": b"client",
        } | row
        for name in ("saddr", "daddr"):
            record[name] = np.frombuffer(pack_address(values.pop(name))[1], np.uint8)
        for name, value in values.items():
            record[name] = value
    return records


def make_batch(
    records: np.ndarray, seq: int = 0, cpu: int = 0, mono_ns: int = 0, instance: int = 7
) -> wire.Batch:
    """A batch as an engine gives it: the first record has sequence `seq` on its CPU."""
    head = np.zeros(1, wire.BATCH)[0]
    head["cpu"] = cpu
    head["instance"] = instance
    head["record_seq"] = seq
    head["packets"] = seq + len(records)
    head["mono_ns"] = mono_ns or (int(records["time_ns"].max()) if len(records) else 1)
    head["real_ns"] = head["mono_ns"] + 1_700_000_000_000_000_000
    head["boot_ns"] = head["mono_ns"]
    return wire.decode_batch(wire.encode_batch(head, records))
