# SPDX-License-Identifier: MIT
"""The kernel's socket tables for people: the far end and the state of each socket."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import numpy as np

from nlproto.host.sockdiag import TcpState
from nlproto.records.ends import MAPPED
from nlproto.records.wire import PROTO_NAMES, address_text

__all__ = ["Network", "fields", "fitting", "held", "listening", "unmapped"]

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
"""Addresses that a question is about."""

_MAPPED = np.frombuffer(MAPPED, np.uint8)
_NOT_ACCEPTED = (TcpState.ESTABLISHED, TcpState.SYN_RECV, TcpState.CLOSE_WAIT)
_STATES = {
    1: "established",
    2: "syn-sent",
    3: "syn-received",
    4: "fin-wait-1",
    5: "fin-wait-2",
    6: "time-wait",
    7: "closed",
    8: "close-wait",
    9: "last-ack",
    10: "listening",
    11: "closing",
}
"""RFC 9293, by number (include/net/tcp_states.h)."""


def held(table: np.ndarray) -> np.ndarray:
    """Return a mask of the sockets that a process has, or will get from accept().

    It leaves out TIME_WAIT and other connections that their process has closed.
    """
    tcp = table["proto"] == socket.IPPROTO_TCP
    coming = tcp & np.isin(table["state"], _NOT_ACCEPTED)
    here = (table["inode"] != 0) & (table["state"] != TcpState.TIME_WAIT)
    return np.asarray(here | coming)


def listening(table: np.ndarray) -> np.ndarray:
    """Return a mask of TCP listeners and of UDP sockets that take datagrams from anybody."""
    tcp = table["proto"] == socket.IPPROTO_TCP
    waits = np.where(tcp, table["state"] == TcpState.LISTEN, table["dport"] == 0)
    return np.asarray(waits & (table["sport"] != 0))


def unmapped(table: np.ndarray) -> np.ndarray:
    """Return `table` (HOST_SOCKET) with IPv4 traffic of IPv6 sockets (::ffff:a.b.c.d) as IPv4."""
    mapped = (table["family"] == socket.AF_INET6) & (table["saddr"][:, :12] == _MAPPED).all(axis=1)
    if not mapped.any():
        return table
    table = table.copy()
    table["family"][mapped] = socket.AF_INET
    for name in ("saddr", "daddr"):
        address = np.zeros((np.count_nonzero(mapped), 16), np.uint8)
        address[:, :4] = table[name][mapped, 12:]
        table[name][mapped] = address
    return table


def fitting(
    table: np.ndarray,
    port: int | None = None,
    proto: int | None = None,
    network: Network | None = None,
) -> np.ndarray:
    """Return a mask of the sockets with this port at either end, and their far end in `network`."""
    mask = np.ones(len(table), bool)
    if port is not None:
        mask &= (table["sport"] == port) | (table["dport"] == port)
    if proto is not None:
        mask &= table["proto"] == proto
    if network is not None:
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        base, bits = (
            np.frombuffer(address.packed.ljust(16, b"\0"), np.uint8)
            for address in (network.network_address, network.netmask)
        )
        mask &= (table["family"] == family) & (table["dport"] != 0)
        mask &= ((table["daddr"] & bits) == base).all(axis=1)
    return mask


def fields(netns: int, row: np.void) -> dict[str, Any]:
    """Return one HOST_SOCKET for a client; `remote` and `rport` are None without a far end.

    `state` is TCP's; for UDP it is connected or unconnected.
    """
    family, proto = int(row["family"]), int(row["proto"])
    far = bool(row["dport"])
    tcp = proto == socket.IPPROTO_TCP
    state = _STATES.get(int(row["state"]), "") if tcp else "connected" if far else "unconnected"
    return {
        "netns": netns,
        "proto": PROTO_NAMES.get(proto, str(proto)),
        "address": address_text(family, row["saddr"].tobytes()),
        "port": int(row["sport"]),
        "remote": address_text(family, row["daddr"].tobytes()) if far else None,
        "rport": int(row["dport"]) if far else None,
        "state": state,
        "cookie": int(row["cookie"]),
        "drops": int(row["drops"]),
        "listening": bool(row["state"] == TcpState.LISTEN) if tcp else not far,
    }
