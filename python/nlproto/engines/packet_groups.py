# SPDX-License-Identifier: MIT
"""Packets of one read by connection and direction, and what they show, for engine `packet`."""

from __future__ import annotations

import itertools
import socket
import struct
from dataclasses import dataclass

import numpy as np

from nlproto.engines.listeners import PastListener
from nlproto.host.procfs import Owner
from nlproto.host.socket_lookup import Rivals, Tuple
from nlproto.records.wire import RECORD

__all__ = [
    "FollowedConnection",
    "PacketFlow",
    "PacketGroup",
    "fill",
    "follow",
    "group_packets",
    "keys_of",
    "tuple_of_key",
]

_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_SIMULTANEOUS_NS = 1_000_000_000  # between two SYNs that cross and make one connection

_NAMES = ("how", "cookie", "inode", "flags", "tgid", "start_ns", "uid", "comm")
_FACTS = np.dtype([(name, RECORD[name]) for name in _NAMES])
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
    answers: bool = False
    """Whether a packet shows that its sender has a connection: a SYN-ACK, data or a FIN."""
    resets: bool = False
    """Whether this end sent a reset with an ACK: only a packet without an ACK gets one."""


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
    answers = _answers(records).tolist()
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
            group = PacketGroup(key, out, every, first, [index], sent_ns, syn)
            groups[key, epoch, out, every] = group
        else:
            group.rows.append(index)
        group.answers |= answers[index]
        if index in resets:
            group.resets = True
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
            asked.refused = not groups[key, epoch, True, False].answers
    return list(groups.values())


def _answers(records: np.ndarray) -> np.ndarray:
    """Return which TCP packets show that their sender has a connection."""
    flags = records["tcp_flags"]
    found: np.ndarray = (flags & (_SYN | _ACK) == _SYN | _ACK) | (flags & _FIN != 0)
    return found | (records["len"] > records["hdr_len"])


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
    rivals: Rivals | None = None
    """Of a UDP socket that is not connected, until their holders are asked."""
    connection: FollowedConnection | None = None
    ends: Tuple | None = None
    """The ends by which its socket is known, where NAT changed the packet's."""
    sent_ns: int = 0
    """When the packet of the lookup passed. The socket's holder may be younger."""


def follow(known: PacketFlow | None, group: PacketGroup) -> FollowedConnection:
    """Return what is known of a TCP connection after a group of its packets."""
    before = known.connection if known is not None else None
    connection = before or FollowedConnection()
    if group.syn:
        crossed = before is not None and before.active and not group.out
        if not crossed or group.sent_ns - connection.began_ns > _SIMULTANEOUS_NS:
            connection = FollowedConnection(group.sent_ns, active=group.out)
    if group.out:
        connection.answered |= group.answers
        passive = connection.began_ns and not connection.active
        connection.refused |= bool(passive and not connection.answered and group.resets)
    connection.refused |= group.refused
    return connection


def fill(records: np.ndarray, named: list[tuple[list[int], PacketFlow]]) -> None:
    """Give the RECORDs of these rows what is known of their flows."""
    if not named:
        return
    facts = np.array([_facts(flow) for _, flow in named], _FACTS)
    counts = [len(rows) for rows, _ in named]
    rows = np.fromiter(itertools.chain.from_iterable(rows for rows, _ in named), np.intp)
    belongs = np.repeat(np.arange(len(named)), counts)
    for name in _NAMES:
        if name != "flags":
            records[name][rows] = facts[name][belongs]
    records["flags"][rows] |= facts["flags"][belongs]


def _facts(flow: PacketFlow) -> tuple[object, ...]:
    owner = flow.owner
    known = flow.how, flow.cookie, flow.inode, flow.flags
    if owner is None:
        return *known, 0, 0, 0, b""
    identity = owner.identity
    return *known, identity.tgid, identity.start_ns, owner.uid, owner.comm
