# SPDX-License-Identifier: MIT
"""Puts packets of one read together by connection and direction, for engine `packet`."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import numpy as np

from nlproto.host.socket_lookup import Tuple

__all__ = ["PacketGroup", "group_packets", "is_answer", "keys_of", "tuple_of_key"]

_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16

_KEY = np.dtype(
    {
        "names": ["proto", "family", "lport", "rport", "local", "remote"],
        "formats": ["u1", "u1", "u2", "u2", ("u1", (16,)), ("u1", (16,))],
    }
)


@dataclass(slots=True)
class PacketGroup:
    """Packets of one connection in one direction, in one read."""

    key: bytes
    out: bool
    to_all: bool
    first: bool
    """Whether it is the first of its key in this read."""
    rows: list[int]
    syn: bool = False
    """Whether it begins with the SYN of a new connection."""
    refused: bool = False
    """Whether that SYN was answered with a reset in this read."""
    over: bool = False
    """Whether another connection of the same tuple begins in this read, behind this one."""


def keys_of(records: np.ndarray, outward: np.ndarray) -> np.ndarray:
    """Return an array with the ends of each RECORD's connection, this host's first.

    `outward`: bool for each record, true if this host sent it.
    """
    keys = np.zeros(len(records), _KEY)
    keys["proto"], keys["family"] = records["proto"], records["family"]
    keys["lport"] = np.where(outward, records["sport"], records["dport"])
    keys["rport"] = np.where(outward, records["dport"], records["sport"])
    column = outward[:, np.newaxis]
    keys["local"] = np.where(column, records["saddr"], records["daddr"])
    keys["remote"] = np.where(column, records["daddr"], records["saddr"])
    return keys


def group_packets(
    records: np.ndarray, keys: np.ndarray, outward: np.ndarray, to_all: np.ndarray
) -> list[PacketGroup]:
    """Put together what has one owner: a SYN begins another connection of the same tuple."""
    raw, size = keys.tobytes(), _KEY.itemsize
    tcp = records["proto"] == socket.IPPROTO_TCP
    kinds = records["tcp_flags"] & (_SYN | _RST | _ACK)
    syns = tcp & (records["tcp_flags"] & (_SYN | _ACK) == _SYN)
    resets = set(np.flatnonzero(tcp & outward & (kinds == _RST | _ACK)).tolist())
    epochs: dict[bytes, int] = {}
    groups: dict[tuple[bytes, int, bool, bool], PacketGroup] = {}
    refused = []
    facts = zip(outward.tolist(), to_all.tolist(), syns.tolist(), strict=True)
    for index, (out, every, syn) in enumerate(facts):
        key = raw[index * size : (index + 1) * size]
        epoch = epochs.get(key)
        first = epoch is None
        if epoch is None or syn:
            epoch = epochs[key] = 0 if epoch is None else epoch + 1
        group = groups.get((key, epoch, out, every))
        if group is None:
            groups[key, epoch, out, every] = PacketGroup(key, out, every, first, [index], syn)
        else:
            group.rows.append(index)
        if index in resets:
            refused.append((key, epoch))
    for (key, epoch, _, _), group in groups.items():
        if epoch == epochs[key]:
            continue
        # SYNs alone may be the same one, sent again
        began = [groups.get((key, epoch, out, False)) for out in (False, True)]
        rows = [row for part in began if part is not None for row in part.rows]
        group.over = not np.all(syns[rows])
    for key, epoch in refused:
        asked = groups.get((key, epoch, False, False))
        if asked is not None and asked.syn:
            answers = groups[key, epoch, True, False].rows
            asked.refused = not is_answer(records[answers])
    return list(groups.values())


def is_answer(sent: np.ndarray) -> bool:
    """Whether one of the RECORDs that this end sent shows that it has a connection."""
    flags = sent["tcp_flags"]
    return bool(
        np.any(flags & (_SYN | _ACK) == _SYN | _ACK)
        or np.any(flags & _FIN)
        or np.any(sent["len"] > sent["hdr_len"])
    )


def tuple_of_key(key: np.void) -> Tuple:
    """Return one of keys_of() as plain values."""
    return Tuple(
        int(key["proto"]),
        int(key["family"]),
        key["local"].tobytes(),
        int(key["lport"]),
        key["remote"].tobytes(),
        int(key["rport"]),
    )
