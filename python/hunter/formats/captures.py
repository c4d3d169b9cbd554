# SPDX-License-Identifier: MIT
"""Captures of tcpdump and Wireshark: packets one by one, and the flow that a packet belongs to."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import IO

from hunter.formats import pcapng
from hunter.formats.pcapng import Block
from nlproto import Error

__all__ = ["End", "Flow", "flow_of", "is_pcap", "look", "read_capture", "transport"]

# https://www.tcpdump.org/linktypes.html: bytes before the network layer, and where its type stands
_ETHERNET, _RAW, _LOOP, _NULL, _SLL, _SLL2, _IPV4, _IPV6 = 1, 101, 108, 0, 113, 276, 228, 229
_OLD_RAW = (12, 14)
_LINKTYPES = {9: "PPP", 50: "PPP", 51: "PPPoE", 105: "802.11", 127: "802.11", 239: "NFLOG"}
_ETHER_IPV4, _ETHER_IPV6 = 0x0800, 0x86DD
_ETHERTYPES = {
    0x0806: "ARP",
    0x8035: "RARP",
    0x8847: "MPLS",
    0x8848: "MPLS",
    0x8863: "PPPoE",
    0x8864: "PPPoE",
    0x88CC: "LLDP",
    0x88E5: "MACsec",
}
_VLANS = (0x8100, 0x88A8, 0x9100)
_MAX_VLANS = 8
_PROTOCOLS = {
    1: "ICMP",
    2: "IGMP",
    4: "IP in IP",
    41: "IP in IP",
    47: "GRE",
    50: "ESP",
    51: "AH",
    58: "ICMPv6",
    89: "OSPF",
    103: "PIM",
    112: "VRRP",
    132: "SCTP",
    136: "UDP-Lite",
}
# IPv6 extension headers that carry a next header (RFC 8200): hop-by-hop, routing, destination
_EXTENSIONS = (0, 43, 60)
_FRAGMENT = 44
_MAX_EXTENSIONS = 64  # walked; RFC 8200 has each once, some twice
_MAX_PACKET = 1 << 20
_SYN, _SYN_ACK = 2, 18

End = tuple[str, int]
"""(address, port)."""
Flow = tuple[str, End, End]
"""(proto, source, destination)."""

_MAGICS = (0xA1B2C3D4, 0xA1B23C4D)


def is_pcap(head: bytes) -> bool:
    """Whether a file that begins with `head` is pcap."""
    return any(head[:4] == struct.pack(f"{order}I", one) for one in _MAGICS for order in "<>")


def read_capture(file: IO[bytes], name: str) -> Iterator[Block]:
    """Yield a capture as pcapng blocks, whichever of pcap and pcapng it is.

    Raises Error where it is damaged, after all that stands before.
    """
    magic = file.read(4)
    if magic == b"\n\r\r\n":
        yield from pcapng.blocks(file, name, magic)
    else:
        yield from _pcap(file, name, magic)


def _pcap(file: IO[bytes], name: str, magic: bytes) -> Iterator[Block]:
    """pcap as pcapng (draft-ietf-opsawg-pcap)."""
    head = magic + file.read(20)
    if not is_pcap(head):
        what = "neither pcap nor pcapng" if head else "empty, no capture"
        raise Error(f"{name} is {what}")
    if len(head) < 24:
        raise Error(f"{name} is no capture: it has {len(head)} bytes")
    order = next(one for one in "<>" if struct.unpack_from(f"{one}I", head)[0] in _MAGICS)
    unit = 1 if struct.unpack_from(f"{order}I", head)[0] == _MAGICS[1] else 1000
    snaplen, linktype = struct.unpack_from(f"{order}II", head, 16)
    linktype &= 0xFFFF
    yield Block(pcapng.SECTION, "<", pcapng.section_header("packet-hunter"))
    interface = pcapng.interface_description("", linktype, snaplen)
    yield Block(pcapng.INTERFACE, "<", interface)
    at = 24
    while record := file.read(16):
        if len(record) < 16:
            raise _ends(name, at)
        seconds, fraction, size, length = struct.unpack(f"{order}IIII", record)
        if size > _MAX_PACKET:
            raise Error(f"{name}: a packet of {size} bytes at byte {at} cannot be")
        data = file.read(size)
        if len(data) < size:
            raise _ends(name, at)
        time_ns = seconds * 10**9 + fraction * unit
        packet = pcapng.enhanced_packet(0, time_ns, data, length)
        yield Block(pcapng.ENHANCED, "<", packet, at)
        at += 16 + size


def _ends(name: str, at: int) -> Error:
    return Error(f"{name} ends in the middle of a packet, at byte {at}; all before it is read")


def flow_of(packet: pcapng.Packet) -> Flow | None:
    """Return whose TCP or UDP packet it is; None for others, later fragments and stumps."""
    found = look(packet)
    return None if isinstance(found, str) else found[0]


def look(packet: pcapng.Packet) -> tuple[Flow, int | None] | str:
    """Return the packet's flow, and of a SYN that begins a connection its sequence number.

    Else in a word why it has none: "ARP", "GRE", "link type 239 (NFLOG)".
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


def transport(linktype: int, data: bytes) -> tuple[int, int, int, int] | str:
    """Return (family, protocol, where IP begins, where TCP or UDP does) of a packet's bytes.

    Both ports are there. Else a word for what is there instead. No byte is copied or looked at
    twice: headers take as long as they are many, and are few.
    """
    try:
        link = _strip(linktype, data)
        return link if isinstance(link, str) else _network(*link, data)
    except (struct.error, IndexError):
        return "cut short"


def _strip(linktype: int, data: bytes) -> tuple[int, int] | str:
    """(EtherType, where what follows the link layer begins)."""
    if linktype == _ETHERNET:
        return _tagged(data, 12, 14)
    if linktype == _SLL:
        return _tagged(data, 14, 16)
    if linktype == _SLL2:
        return _tagged(data, 0, 20)
    at = 4 if linktype in (_NULL, _LOOP) else 0
    if at or linktype in (_RAW, _IPV4, _IPV6, *_OLD_RAW):
        return (_ETHER_IPV6 if data[at] >> 4 == 6 else _ETHER_IPV4), at
    kind = _LINKTYPES.get(linktype)
    return f"link type {linktype}" + (f" ({kind})" if kind else "")


def _tagged(data: bytes, at: int, after: int) -> tuple[int, int] | str:
    """The EtherType at `at` and what begins at `after`, behind any tags of VLANs."""
    (kind,) = struct.unpack_from("!H", data, at)
    for _ in range(_MAX_VLANS):
        if kind not in _VLANS:
            return kind, after
        (kind,) = struct.unpack_from("!H", data, after + 2)
        after += 4
    return "more VLANs than can be"


def _network(kind: int, at: int, data: bytes) -> tuple[int, int, int, int] | str:
    begin = at
    if kind == _ETHER_IPV4:
        if data[at] >> 4 != 4 or data[at] & 15 < 5:
            return "malformed IP"
        if struct.unpack_from("!H", data, at + 6)[0] & 0x1FFF:
            return "later fragments"
        family, proto = socket.AF_INET, data[at + 9]
        at += (data[at] & 15) * 4
    elif kind == _ETHER_IPV6:
        if data[at] >> 4 != 6:
            return "malformed IP"
        family, proto = socket.AF_INET6, data[at + 6]
        at += 40
        for _ in range(_MAX_EXTENSIONS):
            if proto == _FRAGMENT:
                if struct.unpack_from("!H", data, at + 2)[0] & 0xFFF8:
                    return "later fragments"
                proto, at = data[at], at + 8
            elif proto in _EXTENSIONS:
                proto, at = data[at], at + (data[at + 1] + 1) * 8
            else:
                break
        else:
            return "more extension headers than can be"
    elif kind in _ETHERTYPES:
        return _ETHERTYPES[kind]
    else:
        return f"EtherType {kind:#06x}" if kind >= 0x600 else "802.3"
    if proto not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return _PROTOCOLS.get(proto, f"IP protocol {proto}")
    struct.unpack_from("!HH", data, at)
    return family, proto, begin, at
