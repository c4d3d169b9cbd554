# SPDX-License-Identifier: MIT
"""Captures of tcpdump and Wireshark: packets one by one, and the flow that a packet belongs to."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import IO

from hunter import pcapng
from hunter.pcapng import Block
from nlproto import Error

__all__ = ["End", "Flow", "flow_of", "look", "read_capture"]

# https://www.tcpdump.org/linktypes.html: bytes before the network layer, and where its type stands
_ETHERNET, _RAW, _LOOP, _NULL, _SLL, _SLL2, _IPV4, _IPV6 = 1, 101, 108, 0, 113, 276, 228, 229
_ETHER_IPV4, _ETHER_IPV6 = 0x0800, 0x86DD
_VLANS = (0x8100, 0x88A8, 0x9100)
# IPv6 extension headers that carry a next header (RFC 8200): hop-by-hop, routing, destination
_EXTENSIONS = (0, 43, 60)
_FRAGMENT = 44
_MAX_PACKET = 1 << 20
_SYN, _SYN_ACK = 2, 18

End = tuple[str, int]
"""(address, port)."""
Flow = tuple[str, End, End]
"""(proto, source, destination)."""


def read_capture(file: IO[bytes], name: str) -> Iterator[Block]:
    """Yield a capture as pcapng blocks, whichever of pcap and pcapng it is. Raises Error."""
    magic = file.read(4)
    file.seek(0)
    if magic == b"\n\r\r\n":
        yield from pcapng.blocks(file, name)
    else:
        yield from _pcap(file, name)


def _pcap(file: IO[bytes], name: str) -> Iterator[Block]:
    """pcap as pcapng (draft-ietf-opsawg-pcap)."""
    head = file.read(24)
    if len(head) < 24:
        raise Error(f"{name} is no capture: it has {len(head)} bytes")
    for order in "<>":
        (magic,) = struct.unpack_from(f"{order}I", head)
        if magic in (0xA1B2C3D4, 0xA1B23C4D):
            break
    else:
        raise Error(f"{name} is neither pcap nor pcapng")
    unit = 1 if magic == 0xA1B23C4D else 1000
    snaplen, linktype = struct.unpack_from(f"{order}II", head, 16)
    linktype &= 0xFFFF
    yield Block(pcapng.SECTION, "<", pcapng.section_header("packet-hunter"))
    interface = pcapng.interface_description("", linktype, snaplen)
    yield Block(pcapng.INTERFACE, "<", interface)
    at = 24
    while record := file.read(16):
        if len(record) < 16:
            raise Error(f"{name} ends in the middle of a packet, at byte {at}")
        seconds, fraction, size, length = struct.unpack(f"{order}IIII", record)
        if size > _MAX_PACKET:
            raise Error(f"{name}: a packet of {size} bytes at byte {at} cannot be")
        data = file.read(size)
        if len(data) < size:
            raise Error(f"{name} ends in the middle of a packet, at byte {at}")
        time_ns = seconds * 10**9 + fraction * unit
        packet = pcapng.enhanced_packet(0, time_ns, data, length)
        yield Block(pcapng.ENHANCED, "<", packet)
        at += 16 + size


def flow_of(packet: pcapng.Packet) -> Flow | None:
    """Return whose TCP or UDP packet it is; None for others, later fragments and stumps."""
    found = look(packet)
    return None if found is None else found[0]


def look(packet: pcapng.Packet) -> tuple[Flow, int | None] | None:
    """As flow_of(); and of a SYN that begins a connection its sequence number, else None."""
    try:
        return _network(*_strip(packet.linktype, packet.data))
    except (struct.error, IndexError, ValueError, OSError):
        return None


def _strip(linktype: int, data: bytes) -> tuple[int, bytes]:
    """(EtherType, what follows the link layer)."""
    if linktype == _ETHERNET:
        at = 12
        (kind,) = struct.unpack_from("!H", data, at)
        while kind in _VLANS:
            at += 4
            (kind,) = struct.unpack_from("!H", data, at)
        return kind, data[at + 2 :]
    if linktype == _SLL:
        return struct.unpack_from("!H", data, 14)[0], data[16:]
    if linktype == _SLL2:
        return struct.unpack_from("!H", data)[0], data[20:]
    if linktype in (_NULL, _LOOP):
        data = data[4:]
    elif linktype not in (_RAW, _IPV4, _IPV6, 12, 14):
        raise ValueError(linktype)
    return (_ETHER_IPV6 if data[0] >> 4 == 6 else _ETHER_IPV4), data


def _network(kind: int, data: bytes) -> tuple[Flow, int | None] | None:
    if kind == _ETHER_IPV4:
        if struct.unpack_from("!H", data, 6)[0] & 0x1FFF:
            return None
        family, proto = socket.AF_INET, data[9]
        source, target, data = data[12:16], data[16:20], data[(data[0] & 15) * 4 :]
    elif kind == _ETHER_IPV6:
        family, proto = socket.AF_INET6, data[6]
        source, target, data = data[8:24], data[24:40], data[40:]
        while proto in _EXTENSIONS or proto == _FRAGMENT:
            if proto == _FRAGMENT:
                if struct.unpack_from("!H", data, 2)[0] & 0xFFF8:
                    return None
                proto, data = data[0], data[8:]
            else:
                proto, data = data[0], data[(data[1] + 1) * 8 :]
    else:
        return None
    name = {socket.IPPROTO_TCP: "tcp", socket.IPPROTO_UDP: "udp"}.get(proto)
    if name is None:
        return None
    sport, dport = struct.unpack_from("!HH", data)
    ends = (socket.inet_ntop(family, source), sport), (socket.inet_ntop(family, target), dport)
    begins = proto == socket.IPPROTO_TCP and len(data) > 13 and data[13] & _SYN_ACK == _SYN
    return (name, *ends), struct.unpack_from("!I", data, 4)[0] if begins else None
