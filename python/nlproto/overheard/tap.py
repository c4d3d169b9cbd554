# SPDX-License-Identifier: MIT
"""Whole packets of one port in one network namespace: DNS, or data that TLS clients send.

It has a ring of its own, because engines keep no payload. The kernel drops other packets before it
copies anything. Sources: man 7 packet, Documentation/networking/packet_mmap.rst.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from nlproto._host import lib
from nlproto.errors import Error, NoPrivilege
from nlproto.kernel.sockfilter import AD, assemble, attach
from nlproto.records.clock import Clock

__all__ = ["TappedPacket", "Tap"]

SOL_PACKET = 263
PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION = 5, 6, 10
TPACKET_V2 = 1
_OTHERHOST, _OUTGOING = 3, 4
_IP, _IPV6 = 0x0800, 0x86DD
_FRAME = 1 << 12
_BLOCK = 1 << 16
_HEAD = struct.Struct("=IIIHHII")
"""struct tpacket2_hdr: status, len, snaplen, mac, net, sec, nsec."""
_FROM = struct.Struct("=HHiHB")
"""struct sockaddr_ll, behind the head: family, protocol, interface, its kind, way."""
_FROM_AT = 32
_LOOPBACK = 772  # ARPHRD_LOOPBACK
_STATUS = struct.Struct("=I")
_USER = 1  # TP_STATUS_USER
_TCP, _UDP = int(socket.IPPROTO_TCP), int(socket.IPPROTO_UDP)

_LD, _LDH, _LDB = 0x20, 0x28, 0x30
_LDH_X, _LDB_X = 0x48, 0x50
_LDX_IHL = 0xB1
_JEQ, _JGT, _JSET = 0x15, 0x25, 0x45
_LEN, _ADD_X, _SUB_X, _RSH, _LSH, _TAX = 0x80, 0x0C, 0x1C, 0x74, 0x64, 0x07
_MOST = 17 << 10  # bytes of a packet: longer than a ClientHello, shorter than uploads


def _dns() -> list[tuple[int, int, int, int]]:
    """Takes packets that come in from port 53, or go out to it."""
    return assemble(
        [
            (_LD, 0, 0, AD + 4),
            (_JEQ, "drop", 0, _OTHERHOST),
            (_LD, 0, 0, AD + 44),  # tagged frames come again on their VLAN device
            (_JSET, "drop", 0, 0x0FFF),
            (_LD, 0, 0, AD),
            (_JEQ, "v4", 0, _IP),
            (_JEQ, 0, "drop", _IPV6),
            (_LDB, 0, 0, 6),
            (_JEQ, "ports6", 0, _UDP),
            (_JEQ, 0, "drop", _TCP),
            "ports6",
            (_LD, 0, 0, AD + 4),
            (_JEQ, "out6", 0, _OUTGOING),
            (_LDH, 0, 0, 40),
            (_JEQ, "take", "drop", 53),
            "out6",
            (_LDH, 0, 0, 42),
            (_JEQ, "take", "drop", 53),
            "v4",
            (_LDH, 0, 0, 6),
            (_JSET, "drop", 0, 0x1FFF),  # a later fragment
            (_LDB, 0, 0, 9),
            (_JEQ, "ports4", 0, _UDP),
            (_JEQ, 0, "drop", _TCP),
            "ports4",
            (_LDX_IHL, 0, 0, 0),
            (_LD, 0, 0, AD + 4),
            (_JEQ, "out4", 0, _OUTGOING),
            (_LDH_X, 0, 0, 0),
            (_JEQ, "take", "drop", 53),
            "out4",
            (_LDH_X, 0, 0, 2),
            (_JEQ, "take", "drop", 53),
        ],
        _FRAME,
    )


def _tls() -> list[tuple[int, int, int, int]]:
    """Takes packets to TCP port 443 that can be the beginning of a handshake."""
    return assemble(
        [
            (_LD, 0, 0, AD + 4),
            (_JEQ, 0, "drop", _OUTGOING),
            (_LEN, 0, 0, 0),
            (_JGT, "drop", 0, _MOST),
            (_LD, 0, 0, AD),
            (_JEQ, "v4", 0, _IP),
            (_JEQ, 0, "drop", _IPV6),
            (_LDB, 0, 0, 6),
            (_JEQ, 0, "drop", _TCP),
            (_LDH, 0, 0, 42),
            (_JEQ, 0, "drop", 443),
            (_LDB, 0, 0, 52),  # length of the TCP header
            (_RSH, 0, 0, 4),
            (_LSH, 0, 0, 2),
            (_TAX, 0, 0, 0),
            (_LDH, 0, 0, 4),
            (_SUB_X, 0, 0, 0),
            (_JEQ, "drop", "take", 0),
            "v4",
            (_LDH, 0, 0, 6),
            (_JSET, "drop", 0, 0x1FFF),
            (_LDB, 0, 0, 9),
            (_JEQ, 0, "drop", _TCP),
            (_LDX_IHL, 0, 0, 0),
            (_LDH_X, 0, 0, 2),
            (_JEQ, 0, "drop", 443),
            (_LDB_X, 0, 0, 12),
            (_RSH, 0, 0, 4),
            (_LSH, 0, 0, 2),
            (_ADD_X, 0, 0, 0),
            (_TAX, 0, 0, 0),
            (_LDH, 0, 0, 2),
            (_SUB_X, 0, 0, 0),
            (_JEQ, "drop", "take", 0),
        ],
        _FRAME,
    )


@dataclass(frozen=True, slots=True)
class TappedPacket:
    """One TCP or UDP packet. Addresses are a record's 16 bytes, `time_ns` is CLOCK_MONOTONIC."""

    time_ns: int
    family: int
    proto: int
    source: bytes
    sport: int
    target: bytes
    dport: int
    seq: int
    """Sequence number of TCP; 0 for UDP."""
    ack: int
    flags: int
    payload: bytes
    length: int
    """Bytes of payload in the packet; `payload` may be cut by the capture or a fragment."""
    outgoing: bool = False
    loopback: bool = False
    """It passed a loopback device, so no network sent it."""


class Tap:
    """A ring in the network namespace in which it is created.

    `tls`: outgoing ClientHellos, otherwise DNS questions and answers. Raises NoPrivilege without
    CAP_NET_RAW.
    """

    def __init__(self, ring_bytes: int, tls: bool = False) -> None:
        self.dropped = 0
        try:
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0
            )
        except PermissionError:
            raise NoPrivilege("names of far ends need CAP_NET_RAW: run as root") from None
        try:
            self._socket.setblocking(False)
            attach(self._socket, _tls() if tls else _dns())
            self._socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
            blocks = max(1, ring_bytes // _BLOCK)
            self._count = blocks * _BLOCK // _FRAME
            self._socket.setsockopt(
                SOL_PACKET,
                PACKET_RX_RING,
                struct.pack("=IIII", _BLOCK, blocks, _FRAME, self._count),
            )
            self._map = mmap.mmap(self._socket.fileno(), blocks * _BLOCK)
            code = -lib.host_capture_all(self._socket.fileno())
            if code:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            self._socket.close()
            raise Error(f"names of far ends: no ring for them: {error.strerror}") from None
        self._next = 0

    def fileno(self) -> int:
        """Return its descriptor, for poll(2)."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close ring and socket."""
        self._map.close()
        self._socket.close()

    def read(self, most: int) -> Iterator[TappedPacket]:
        """Yield up to `most` waiting packets."""
        clock = Clock.now()
        for _ in range(most):
            at = self._next * _FRAME
            status, length, size, _, net, sec, nsec = _HEAD.unpack_from(self._map, at)
            if not status & _USER:
                break
            data = self._map[at + net : at + net + size]
            *_, kind, way = _FROM.unpack_from(self._map, at + _FROM_AT)
            _STATUS.pack_into(self._map, at, 0)
            self._next = (self._next + 1) % self._count
            time_ns = sec * 1_000_000_000 + nsec - clock.real_offset_ns
            packet = _packet(time_ns, data, length, way == _OUTGOING, kind == _LOOPBACK)
            if packet is not None:
                yield packet

    def count_dropped(self) -> int:
        """Return how many packets the ring has had no room for."""
        raw = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        self.dropped += struct.unpack("=II", raw)[1]
        return self.dropped


def _packet(
    time_ns: int, data: bytes, length: int, outgoing: bool, loopback: bool
) -> TappedPacket | None:
    """`length`: of the whole packet, if `data` is cut."""
    try:
        if data[0] >> 4 == 4:
            at, total, proto = (data[0] & 15) * 4, int.from_bytes(data[2:4]), data[9]
            family, source, target = socket.AF_INET, data[12:16], data[16:20]
        else:
            at, total, proto = 40, 40 + int.from_bytes(data[4:6]), data[6]
            family, source, target = socket.AF_INET6, data[8:24], data[24:40]
        total = total if total > 40 or proto == _UDP else length
        sport, dport = struct.unpack_from(">HH", data, at)
        seq = ack = flags = 0
        if proto == _TCP:
            seq, ack = struct.unpack_from(">II", data, at + 4)
            flags, begins = data[at + 13], at + (data[at + 12] >> 4) * 4
        else:
            begins = at + 8
    except (IndexError, struct.error):
        return None
    payload = data[begins:total]
    return TappedPacket(
        time_ns,
        int(family),
        proto,
        source.ljust(16, b"\0"),
        sport,
        target.ljust(16, b"\0"),
        dport,
        seq,
        ack,
        flags,
        payload,
        max(len(payload), total - begins),
        outgoing,
        loopback,
    )
