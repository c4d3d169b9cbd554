# SPDX-License-Identifier: MIT
"""Flows of a process that asks a DNS server, and then connects."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np

from nlproto.tables.flows import FLOW

__all__ = ["flow", "raw"]

SECOND = 1_000_000_000


def raw(address: str) -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.inet_pton(family, address).ljust(16, b"\0")


def flow(
    remote: Any,
    rport: int = 443,
    tgid: int = 10,
    since: int = 5 * SECOND,
    lport: int = 40000,
    comm: bytes = b"curl",
    uid: int = 1000,
    out: int = 1,
) -> Any:
    flows = np.zeros(1, FLOW)
    one = flows[0]
    one["hash"] = hash((remote, rport, tgid, lport)) & (2**64 - 1)
    one["tgid"], one["start_ns"], one["netns"], one["uid"], one["comm"] = tgid, 1, 7, uid, comm
    one["family"], one["proto"] = socket.AF_INET, socket.IPPROTO_UDP if rport == 53 else 6
    one["laddr"] = np.frombuffer(raw("192.0.2.99"), np.uint64)
    one["raddr"] = np.frombuffer(raw(remote), np.uint64)
    one["lport"], one["rport"], one["packets_out"] = lport, rport, out
    one["first_ns"] = one["last_ns"] = since
    return flows
