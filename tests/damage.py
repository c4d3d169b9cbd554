# SPDX-License-Identifier: MIT
"""Packets for files, and damage: bytes that are changed, cut out or put in."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from hypothesis import strategies as st

CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from(
                [b"\0" * 4000, b'"', b"\n", b",", b"[" * 5000, b"9" * 5000, b"-1", b"null", b"true"]
            ),
            st.integers(0, 2**32 - 1).map(lambda one: one.to_bytes(4, "little")),
        ),
        st.sampled_from(["put over", "put in", "cut out", "end"]),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: Iterable[tuple[float, bytes, str]]) -> bytes:
    for place, piece, how in changes:
        at = int(place * len(data))
        if how == "end":
            data = data[:at]
        elif how == "put in":
            data = data[:at] + piece + data[at:]
        elif how == "cut out":
            data = data[:at] + data[at + len(piece) :]
        else:
            data = data[:at] + piece + data[at + len(piece) :]
    return data


UDP, TCP = socket.IPPROTO_UDP, socket.IPPROTO_TCP

PORTS = struct.pack("!HHHH", 1000, 53, 8, 0)


def ipv4(proto: int, options: bytes = b"", offset: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBH", 0x45 + len(options) // 4, 0, 40, 0, offset, 64, proto, 0)
    return head + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + options


def ipv6(proto: int, rest: bytes = b"") -> bytes:
    return (
        struct.pack("!IHBB", 6 << 28, len(rest), proto, 64)
        + bytes(15)
        + b"\1"
        + bytes(15)
        + b"\2"
        + rest
    )
