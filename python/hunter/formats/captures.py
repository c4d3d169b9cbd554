# SPDX-License-Identifier: MIT
"""Captures of tcpdump and Wireshark: packets one by one, and the flow that a packet belongs to."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import IO

from hunter.formats import pcapng
from hunter.formats.headers import transport
from hunter.formats.pcapng import Block
from nlproto import Error

__all__ = ["CapturedEnd", "Flow", "flow_of", "is_pcap", "look", "read_capture"]

_MAX_PACKET = 1 << 20
_SYN, _SYN_ACK = 2, 18

CapturedEnd = tuple[str, int]
"""(address, port)."""
Flow = tuple[str, CapturedEnd, CapturedEnd]
"""(proto, source, destination)."""

# ns in a unit of a packet's time, and additional bytes of its header. These are from an old patched
# libpcap, whose format Wireshark still writes ("modified tcpdump")
_MAGICS = {0xA1B2C3D4: (1000, 0), 0xA1B23C4D: (1, 0), 0xA1B2CD34: (1000, 8)}


def is_pcap(head: bytes) -> bool:
    """Return whether a file that begins with `head` is pcap."""
    return any(head[:4] == struct.pack(f"{order}I", one) for one in _MAGICS for order in "<>")


def read_capture(file: IO[bytes], name: str) -> Iterator[Block]:
    """Yield a capture, pcap or pcapng, as pcapng blocks.

    Raises Error where it is damaged, after all earlier blocks.
    """
    magic = file.read(4)
    if magic == b"\n\r\r\n":
        yield from pcapng.blocks(file, name, magic)
    else:
        yield from _pcap(file, name, magic)


def _pcap(file: IO[bytes], name: str, magic: bytes) -> Iterator[Block]:
    """Convert pcap to pcapng (draft-ietf-opsawg-pcap)."""
    head = magic + file.read(20)
    if not is_pcap(head):
        what = "neither pcap nor pcapng: editcap -F pcapng converts others"
        raise Error(f"{name} is {what if head else 'empty, no capture'}")
    if len(head) < 24:
        raise Error(f"{name} is no capture: it has {len(head)} bytes")
    order = next(one for one in "<>" if struct.unpack_from(f"{one}I", head)[0] in _MAGICS)
    unit, more = _MAGICS[struct.unpack_from(f"{order}I", head)[0]]
    snaplen, linktype = struct.unpack_from(f"{order}II", head, 16)
    linktype &= 0xFFFF
    yield Block(pcapng.SECTION, "<", pcapng.section_header("packet-hunter"))
    interface = pcapng.interface_description("", linktype, snaplen)
    yield Block(pcapng.INTERFACE, "<", interface)
    at = 24
    while record := file.read(16 + more):
        if len(record) < 16 + more:
            raise _ends(name, at)
        seconds, fraction, size, length = struct.unpack_from(f"{order}IIII", record)
        if size > _MAX_PACKET:
            raise Error(f"{name}: a packet of {size} bytes at byte {at} is impossible")
        data = file.read(size)
        if len(data) < size:
            raise _ends(name, at)
        time_ns = seconds * 10**9 + fraction * unit
        packet = pcapng.enhanced_packet(0, time_ns, data, length)
        yield Block(pcapng.ENHANCED, "<", packet, at)
        at += 16 + more + size


def _ends(name: str, at: int) -> Error:
    return Error(f"{name} ends in the middle of a packet, at byte {at}; all before it is read")


def flow_of(packet: pcapng.CapturedPacket) -> Flow | None:
    """Return the flow of a TCP or UDP packet; None for others, later fragments and cut packets."""
    found = look(packet)
    return None if isinstance(found, str) else found[0]


def look(packet: pcapng.CapturedPacket) -> tuple[Flow, int | None] | str:
    """Return the packet's flow, and the sequence number of a SYN that begins a connection.

    Without a flow, return the reason in a word: "ARP", "GRE", "link type 239 (NFLOG)".
    """
    found = transport(packet.linktype, packet.data)
    if isinstance(found, str):
        return found
    family, proto, network, at = found
    first, size = (network + 12, 4) if family == socket.AF_INET else (network + 8, 16)
    data = packet.data
    sport, dport = struct.unpack_from("!HH", data, at)
    source = socket.inet_ntop(family, data[first : first + size])
    target = socket.inet_ntop(family, data[first + size : first + 2 * size])
    name = "tcp" if proto == socket.IPPROTO_TCP else "udp"
    begins = name == "tcp" and len(data) > at + 13 and data[at + 13] & _SYN_ACK == _SYN
    sequence = struct.unpack_from("!I", data, at + 4)[0] if begins else None
    return (name, (source, sport), (target, dport)), sequence
