# SPDX-License-Identifier: MIT
"""Packets of one read by connection and direction, and what they show, for engine `packet`."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

import numpy as np

from nlproto.engines.listeners import PastListener
from nlproto.host.procfs import Owner
from nlproto.host.socket_lookup import Tuple

__all__ = [
    "FollowedConnection",
    "PacketFlow",
    "PacketGroup",
    "follow",
    "group_packets",
    "keys_of",
    "tuple_of_key",
]

_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_SIMULTANEOUS_NS = 1_000_000_000  # between two SYNs that cross and make one connection

_unpack = struct.Struct("=BBHH16s16s").unpack
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
    sent_ns: int
    """When its first packet passed."""
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
    facts = zip(
        outward.tolist(), to_all.tolist(), syns.tolist(), records["time_ns"].tolist(), strict=True
    )
    for index, (out, every, syn, sent_ns) in enumerate(facts):
        key = raw[index * size : (index + 1) * size]
        epoch = epochs.get(key)
        first = epoch is None
        if epoch is None or syn:
            epoch = epochs[key] = 0 if epoch is None else epoch + 1
        group = groups.get((key, epoch, out, every))
        if group is None:
            groups[key, epoch, out, every] = PacketGroup(
                key, out, every, first, [index], sent_ns, syn
            )
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
            asked.refused = not _is_answer(records[answers])
    return list(groups.values())


def _is_answer(sent: np.ndarray) -> bool:
    """Whether one of the RECORDs that this end sent shows that it has a connection."""
    flags = sent["tcp_flags"]
    return bool(
        np.any(flags & (_SYN | _ACK) == _SYN | _ACK)
        or np.any(flags & _FIN)
        or np.any(sent["len"] > sent["hdr_len"])
    )


def tuple_of_key(key: bytes) -> Tuple:
    """Return the bytes of one of keys_of() as plain values."""
    proto, family, lport, rport, local, remote = _unpack(key)
    return Tuple(proto, family, local, lport, remote, rport)


@dataclass(slots=True)
class FollowedConnection:
    """What the packets of one TCP connection have shown."""

    began_ns: int = 0
    """When its SYN passed; 0: not seen."""
    active: bool = False
    """Whether this end sent the SYN. Then no listener accepted it."""
    answered: bool = False
    """Whether this end sent a SYN-ACK, data or a FIN."""
    refused: bool = False
    """Whether this end answered the SYN with a reset. Then nobody listened."""
    owned: bool = False
    """Whether its socket was found, with an owner."""
    listener: PastListener | None = None
    """Which processes listened when it began."""


@dataclass(slots=True)
class PacketFlow:
    """What is known of the packets of one connection in one direction."""

    checked_ns: int
    how: int
    flags: int = 0
    cookie: int = 0
    inode: int = 0
    owner: Owner | None = None
    settled: bool = False
    """Whether the answer may be kept for TTL_NS. If not, the next packet asks again."""
    unheld: bool = False
    """Whether there is a socket for which a quick search found no holder."""
    row: np.void | None = None
    """The socket (HOST_SOCKET) that was found."""
    connection: FollowedConnection | None = None
    ends: Tuple | None = None
    """The ends by which its socket is known, where NAT changed the packet's."""
    sent_ns: int = 0
    """When the packet of the lookup passed. The socket's holder may be younger."""


def follow(known: PacketFlow | None, group: PacketGroup, records: np.ndarray) -> FollowedConnection:
    """Return what is known of a TCP connection, after a group of `records`."""
    sent_ns = group.sent_ns
    before = known.connection if known is not None else None
    connection = before or FollowedConnection()
    if group.syn:
        crossed = before is not None and before.active and not group.out
        if not crossed or sent_ns - connection.began_ns > _SIMULTANEOUS_NS:
            connection = FollowedConnection(sent_ns, active=group.out)
    if group.out and not connection.answered:
        sent = records[group.rows]
        connection.answered |= _is_answer(sent)
        passive = connection.began_ns and not connection.active and not connection.answered
        # Only a packet without an ACK is answered by a reset with an ACK.
        reset = sent["tcp_flags"] & (_SYN | _RST | _ACK) == _RST | _ACK
        connection.refused |= bool(passive and np.any(reset))
    connection.refused |= group.refused
    return connection
