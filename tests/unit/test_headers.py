# SPDX-License-Identifier: MIT
"""Every link layer and tunnel that Linux captures have, read as tshark reads it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from damage import PORTS, UDP, ipv4, ipv6
from hunter.formats import pcapng
from hunter.formats.captures import flow_of

MACS = bytes(5) + b"\1" + bytes(5) + b"\2"


def datagram(payload: bytes = b"x" * 12) -> Any:
    """UDP 10.0.0.1:1000 > 10.0.0.2:53 with lengths that are right."""
    udp = struct.pack("!HHHH", 1000, 53, 8 + len(payload), 0) + payload
    return over(UDP, udp)


def over(proto: Any, payload: Any) -> Any:
    head = ipv4(proto)
    return head[:2] + struct.pack("!H", 20 + len(payload)) + head[4:] + payload


IP4 = datagram()
_UDP = IP4[20:]
IP6 = ipv6(UDP, _UDP)


def ethernet(kind: Any, payload: Any) -> Any:
    return MACS + struct.pack("!H", kind) + payload


def pppoe(payload: Any) -> Any:
    return struct.pack("!BBHH", 0x11, 0, 5, len(payload)) + payload


def nflog(order: Any) -> bytes:
    attribute = struct.pack(f"{order}HH", 4 + len(IP4), 9) + IP4
    mark = struct.pack(f"{order}HHI", 8, 2, 7)
    prefix = struct.pack(f"{order}HH", 7, 10) + b"ab\0\0"
    return bytes(b"\2\0\0\5" + mark + prefix + attribute)


LAYERS = {
    "ethernet": (1, ethernet(0x0800, IP4)),
    "ipv6": (1, ethernet(0x86DD, IP6)),
    "vlan": (1, ethernet(0x8100, b"\0\5\x08\0" + IP4)),
    "qinq": (1, ethernet(0x88A8, b"\0\5\x81\0\0\6\x08\0" + IP4)),
    "snap": (1, ethernet(8 + len(IP4), b"\xaa\xaa\3\0\0\0\x08\0" + IP4)),
    "pppoe": (1, ethernet(0x8864, pppoe(b"\0\x21" + IP4))),
    "pppoe ipv6": (1, ethernet(0x8864, pppoe(b"\0\x57" + IP6))),
    "mpls": (1, ethernet(0x8847, b"\0\1\0\x40\0\2\1\x40" + IP4)),
    "vlan pppoe": (1, ethernet(0x8100, b"\0\5\x88\x64" + pppoe(b"\0\x21" + IP4))),
    "ppp": (9, b"\0\x21" + IP4),
    "ppp with address": (9, b"\xff\3\0\x21" + IP4),
    "ppp compressed protocol": (9, b"\xff\3\x21" + IP4),
    "ppp serial": (50, b"\xff\3\0\x57" + IP6),
    "ppp serial hdlc": (50, b"\x0f\0\x08\0" + IP4),
    "ppp ether": (51, pppoe(b"\0\x21" + IP4)),
    "hdlc": (104, b"\x0f\0\x08\0" + IP4),
    "pppd": (166, b"\0\3\0\x21" + IP4),
    "ppp with direction": (204, b"\1\xff\3\0\x21" + IP4),
    "null": (0, b"\2\0\0\0" + IP4),
    "loop": (108, b"\0\0\0\2" + IP4),
    "raw": (101, IP4),
    "raw ipv6": (101, IP6),
    "sll": (113, b"\0\0\0\1\0\6" + bytes(8) + b"\x08\0" + IP4),
    "sll vlan": (113, b"\0\0\0\1\0\6" + bytes(8) + b"\x81\0\0\5\x08\0" + IP4),
    "sll pppoe": (113, b"\0\0\0\1\0\6" + bytes(8) + b"\x88\x64" + pppoe(b"\0\x21" + IP4)),
    "sll2": (276, b"\x08\0" + bytes(7) + b"\1\0\6" + bytes(8) + IP4),
    "nflog": (239, nflog("<")),
    "gre": (101, over(47, b"\0\0\x08\0" + IP4)),
    "gre key and sequence": (101, over(47, b"\x30\0\x86\xdd" + bytes(8) + IP6)),
    "gre checksum": (101, over(47, b"\x80\0\x08\0" + bytes(4) + IP4)),
    "gretap": (101, over(47, b"\0\0\x65\x58" + ethernet(0x0800, IP4))),
    "gretap vlan": (101, over(47, b"\0\0\x65\x58" + ethernet(0x8100, b"\0\5\x08\0" + IP4))),
    "gre mpls": (101, over(47, b"\0\0\x88\x47" + b"\0\2\1\x40" + IP4)),
    "pptp": (
        101,
        over(
            47,
            b"\x30\x81\x88\x0b"
            + struct.pack("!HHII", len(IP4) + 4, 7, 1, 1)
            + b"\xff\3\0\x21"
            + IP4,
        ),
    ),
    "ipip": (101, over(4, IP4)),
    "sit": (101, over(41, IP6)),
    "ip6ip6": (101, ipv6(41, IP6)),
    "ah": (101, over(51, b"\x11\4\0\0" + bytes(20) + _UDP)),
    "ah ipv6": (101, ipv6(51, b"\x11\4\0\0" + bytes(20) + _UDP)),
    "options": (101, ipv4(UDP, b"\1\1\1\0") + PORTS),
    "destination options": (101, ipv6(60, b"\x11\0\1\4\0\0\0\0" + _UDP)),
    "first fragment": (101, ipv6(44, b"\x11\0\0\1\0\0\0\1" + _UDP)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_flow_is_found_in_every_layer(layer: str) -> None:
    linktype, data = LAYERS[layer]
    ends = ("::1", "::2") if data.endswith(IP6) or "v6" in layer else ("10.0.0.1", "10.0.0.2")
    ends = ("::1", "::2") if "fragment" in layer or "destination" in layer else ends
    flow = flow_of(pcapng.CapturedPacket(linktype, None, data))
    assert flow == ("udp", (ends[0], 1000), (ends[1], 53))


def test_the_big_endian_order_of_nflog_is_known() -> None:
    assert flow_of(pcapng.CapturedPacket(239, None, nflog(">"))) == flow_of(
        pcapng.CapturedPacket(101, None, IP4)
    )


def test_tshark_reads_the_same(tmp_path: Path) -> None:
    if not shutil.which("tshark"):
        pytest.skip("tshark is not installed")
    capture = pcapng.section_header("x")
    capture += b"".join(pcapng.interface_description("", link) for link, _ in LAYERS.values())
    for number, (_, data) in enumerate(LAYERS.values()):
        capture += pcapng.enhanced_packet(number, 10**18, data, len(data))
    (tmp_path / "x").write_bytes(capture)
    words = "-T fields -e udp.srcport -e udp.dstport -o ip.defragment:FALSE"
    words += " -o ipv6.defragment:FALSE"
    done = subprocess.run(
        ["tshark", "-n", "-r", tmp_path / "x", *words.split()], capture_output=True, text=True
    )
    found = dict(zip(LAYERS, done.stdout.splitlines(), strict=True))
    found["pppd"] = "1000\t53"  # its direction is half of a protocol for tshark
    assert found == dict.fromkeys(LAYERS, "1000\t53")
