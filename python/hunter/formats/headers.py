# SPDX-License-Identifier: MIT
"""Walks the headers of a captured packet, from the link layer to the ports of TCP or UDP.

Each step reads one header, copies nothing, and goes on after it. The steps are bounded, so a packet
of nothing but headers takes no longer than others. Numbers of link types:
https://www.tcpdump.org/linktypes.html; of protocols: IANA.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

__all__ = ["transport"]

_Next = tuple[int, int] | str
"""(EtherType, where its content begins), or a word for a header that cannot be walked."""

_IPV4, _IPV6 = 0x0800, 0x86DD
_MAX_HEADERS = 16  # below IP, or tunnels
_MAX_EXTENSIONS = 64  # IPv6 headers in one packet; RFC 8200 has each once, some twice
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION, _AH = 0, 43, 44, 60, 51

_LINK_NAMES = {
    105: "802.11",
    127: "802.11",
    187: "Bluetooth",
    189: "USB",
    201: "Bluetooth",
    220: "USB",
    227: "CAN",
    252: "Wireshark's upper PDU",
    253: "Netlink",
    271: "vsock",
}
_ETHERTYPES = {
    0x0806: "ARP",
    0x8035: "RARP",
    0x8863: "PPPoE discovery",
    0x888E: "EAPOL",
    0x88CC: "LLDP",
    0x88E5: "MACsec",
    0x88F7: "PTP",
}
_PROTOCOLS = {
    1: "ICMP",
    2: "IGMP",
    50: "ESP",
    58: "ICMPv6",
    89: "OSPF",
    103: "PIM",
    112: "VRRP",
    132: "SCTP",
    136: "UDP-Lite",
}


def transport(linktype: int, data: bytes) -> tuple[int, int, int, int] | str:
    """Return (family, protocol, where IP begins, where TCP or UDP does) of a packet's bytes.

    Both ports are there. Of a tunnel without ports (GRE, IP in IP) it is the inner packet.
    Otherwise returns a word for what is there: "ARP", "link type 227 (CAN)".
    """
    try:
        step = _link(linktype, data)
        for _ in range(_MAX_HEADERS):
            if isinstance(step, str):
                return step
            kind, at = step
            if kind not in (_IPV4, _IPV6):
                step = _below_ip(kind, at, data)
                continue
            inner = _ip(kind, at, data)
            if isinstance(inner, str):
                return inner
            proto, after = inner
            if proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
                struct.unpack_from("!HH", data, after)
                return (socket.AF_INET if kind == _IPV4 else socket.AF_INET6), proto, at, after
            step = _tunnel(proto, after, data)
    except (struct.error, IndexError):
        return "cut short"
    return "more headers than can be"


def _link(linktype: int, data: bytes) -> _Next:
    found = _LINKS.get(linktype)
    if found is not None:
        return found(data)
    name = _LINK_NAMES.get(linktype)
    return f"link type {linktype}" + (f" ({name})" if name else "")


def _typed(at: int, after: int) -> Callable[[bytes], _Next]:
    """A link layer of fixed size with an EtherType in it."""
    return lambda data: (_word(data, at), after)


def _word(data: bytes, at: int) -> int:
    return int(struct.unpack_from("!H", data, at)[0])


def _bare(data: bytes, at: int) -> _Next:
    """IP of either version."""
    version = data[at] >> 4
    if version not in (4, 6):
        return "malformed IP"
    return (_IPV6 if version == 6 else _IPV4), at


def _ppp(data: bytes, at: int) -> _Next:
    """PPP (RFC 1661), with or without its address and control (RFC 1662)."""
    if data[at] == 0xFF and data[at + 1] == 3:
        at += 2
    proto, size = (data[at], 1) if data[at] & 1 else (_word(data, at), 2)
    kinds = {0x21: _IPV4, 0x57: _IPV6, 0x281: _MPLS}
    if proto in kinds:
        return kinds[proto], at + size
    return "PPP control" if proto >= 0x8000 else f"PPP protocol {proto:#06x}"


def _pppoe(data: bytes, at: int) -> _Next:
    """RFC 2516; only code 0 is a session's data."""
    return "PPPoE discovery" if data[at + 1] else _ppp(data, at + 6)


def _serial(data: bytes) -> _Next:
    """PPP or Cisco's HDLC on a serial line."""
    return _hdlc(data) if data[0] in (0x0F, 0x8F) else _ppp(data, 0)


_hdlc = _typed(2, 4)


def _nflog(data: bytes) -> _Next:
    """Attributes (include/uapi/linux/netfilter/nfnetlink_log.h), in any order.

    One of them is the packet. The family is in the header.
    """
    for order in "<>":
        at = 4
        for _ in range(_MAX_ATTRIBUTES):
            if at + 4 > len(data):
                break
            size, kind = struct.unpack_from(f"{order}HH", data, at)
            if size < 4:
                break
            if kind & 0x7FFF == _NFULA_PAYLOAD:
                return _bare(data, at + 4)
            at += size + (-size % 4)
    return "NFLOG without a packet"


_NFULA_PAYLOAD = 9
_MAX_ATTRIBUTES = 64

_MPLS = 0x8847
_PPP_IN_GRE, _ETHERNET_IN_GRE = 0x880B, 0x6558
_ethernet = _typed(12, 14)

_LINKS: dict[int, Callable[[bytes], _Next]] = {
    0: lambda data: _bare(data, 4),  # NULL
    1: _ethernet,
    9: lambda data: _ppp(data, 0),
    12: lambda data: _bare(data, 0),  # RAW, as some systems number it
    14: lambda data: _bare(data, 0),
    50: _serial,
    51: lambda data: _pppoe(data, 0),
    101: lambda data: _bare(data, 0),  # RAW
    104: _hdlc,
    108: lambda data: _bare(data, 4),  # LOOP
    113: _typed(14, 16),  # SLL
    166: lambda data: _ppp(data, 2),  # of pppd: the address shows the direction
    204: lambda data: _ppp(data, 1),  # with a direction
    228: lambda data: _bare(data, 0),  # IPV4
    229: lambda data: _bare(data, 0),  # IPV6
    239: _nflog,
    276: _typed(0, 20),  # SLL2
}


def _below_ip(kind: int, at: int, data: bytes) -> _Next:
    """Headers between link layer and IP."""
    if kind in (0x8100, 0x88A8, 0x9100):  # VLANs
        return _word(data, at + 2), at + 4
    if kind == 0x8864:
        return _pppoe(data, at)
    if kind in (_MPLS, 0x8848):
        if not data[at + 2] & 1:  # more labels (RFC 3032)
            return kind, at + 4
        below = _bare(data, at + 4)
        return "MPLS without IP" if isinstance(below, str) else below
    if kind == _ETHERNET_IN_GRE:
        return _word(data, at + 12), at + 14
    if kind == _PPP_IN_GRE:
        return _ppp(data, at)
    if kind in _ETHERTYPES:
        return _ETHERTYPES[kind]
    if kind >= 0x600:
        return f"EtherType {kind:#06x}"
    if data[at : at + 6] == b"\xaa\xaa\x03\0\0\0":  # SNAP (RFC 1042)
        return _word(data, at + 6), at + 8
    return "802.3"


def _ip(kind: int, at: int, data: bytes) -> tuple[int, int] | str:
    """Return (protocol, where it begins), after options and extension headers."""
    if data[at] >> 4 != (4 if kind == _IPV4 else 6):
        return "malformed IP"
    if kind == _IPV4:
        if data[at] & 15 < 5:
            return "malformed IP"
        if _word(data, at + 6) & 0x1FFF:
            return "later fragments"
        proto, at = data[at + 9], at + (data[at] & 15) * 4
    else:
        proto, at = data[at + 6], at + 40
    for _ in range(_MAX_EXTENSIONS):
        if proto == _AH:
            proto, at = data[at], at + (data[at + 1] + 2) * 4
        elif kind == _IPV4:
            return proto, at
        elif proto == _FRAGMENT:
            if _word(data, at + 2) & 0xFFF8:
                return "later fragments"
            proto, at = data[at], at + 8
        elif proto in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
            proto, at = data[at], at + (data[at + 1] + 1) * 8
        else:
            return proto, at
    return "more extension headers than can be"


def _tunnel(proto: int, at: int, data: bytes) -> _Next:
    """Other protocols over IP."""
    if proto == socket.IPPROTO_IPIP:
        return _IPV4, at
    if proto == socket.IPPROTO_IPV6:
        return _IPV6, at
    if proto == socket.IPPROTO_GRE:
        return _gre(at, data)
    return _PROTOCOLS.get(proto, f"IP protocol {proto}")


def _gre(at: int, data: bytes) -> _Next:
    """GRE (RFC 2784, 2890) and PPTP's (RFC 2637)."""
    flags, kind = struct.unpack_from("!HH", data, at)
    if flags & 0x4000 or flags & 7 > 1:  # routing, which RFC 2784 removed; a later version
        return "GRE"
    at += 4
    for field in (0x8000, 0x2000, 0x1000):  # checksum, key, sequence number
        at += 4 if flags & field else 0
    if flags & 7 == 1:
        at += 4 if flags & 0x80 else 0  # acknowledgment
        if at == len(data):
            return "GRE"  # nothing but an acknowledgment
    return kind, at
