# SPDX-License-Identifier: MIT
"""Captures of tcpdump and Wireshark that are damaged, cut, or meant to do harm."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from damage import CHANGES, PORTS, UDP, changed, ipv4, ipv6
from hunter.formats import pcapng
from hunter.formats.captures import flow_of, look, read_capture
from hunter.formats.headers import _LINKS as LINKS
from nlproto import Error
from waiting import there


def captures() -> Iterator[Any]:
    """Bytes of pcap and pcapng, both orders, every kind of packet block."""
    frames = [
        (1, bytes(12) + b"\x08\x00" + ipv4(UDP) + PORTS),
        (1, bytes(12) + b"\x81\x00\x00\x05\x86\xdd" + ipv6(0, bytes([UDP, 0]) + bytes(6) + PORTS)),
        (113, bytes(14) + b"\x81\x00\x00\x05\x08\x00" + ipv4(UDP) + PORTS),
        (276, b"\x08\x00" + bytes(18) + ipv4(UDP) + PORTS),
        (101, ipv4(UDP) + PORTS),
    ]
    for order in "<>":
        for linktype, data in frames:
            head = struct.pack(f"{order}IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, linktype)
            packet = struct.pack(f"{order}IIII", 1, 2, len(data), len(data)) + data
            yield head + packet * 3
    section, data = pcapng.section_header("x", "y"), frames[0][1]
    interface = pcapng.interface_description("eth0", 1)
    simple = pcapng._block(3, struct.pack("<I", len(data)) + pcapng._pad(data))
    old = pcapng._block(
        2, struct.pack("<HHIIII", 0, 0, 0, 1, len(data), len(data)) + pcapng._pad(data)
    )
    new = pcapng.enhanced_packet(0, 1, data, len(data), "own", 2)
    yield section + interface + (simple + old + new) * 2


@settings(max_examples=200)
@given(data=st.sampled_from(list(captures())), changes=CHANGES)
def test_nothing_but_an_error_comes_out_of_a_damaged_trace(data: Any, changes: Any) -> None:
    interfaces: list[Any] = []
    try:
        for block in read_capture(io.BytesIO(changed(data, changes)), "x"):
            if block.kind == pcapng.SECTION:
                interfaces = []
            elif block.kind == pcapng.INTERFACE:
                interfaces.append(pcapng.Interface.of(block))
            packet = pcapng.packet_of(block, interfaces)
            if packet is not None:
                assert look(packet)
                pcapng.comments(block)
                if block.kind != pcapng.SIMPLE:
                    pcapng.with_comment(block, "x")
    except Error as error:
        assert "\n" not in str(error)


@settings(max_examples=200)
@given(st.sampled_from([*LINKS, 65535]), st.binary(max_size=200))
def test_any_bytes_are_a_flow_or_a_word(linktype: Any, data: bytes) -> None:
    found = look(pcapng.CapturedPacket(linktype, None, data))
    assert isinstance(found, str | tuple) and found


@pytest.mark.parametrize("data", list(captures()), ids=range(11))
def test_every_kind_of_capture_is_understood(data: Any) -> None:
    interfaces, flows = [], []
    for block in read_capture(io.BytesIO(data), "x"):
        if block.kind == pcapng.INTERFACE:
            interfaces.append(pcapng.Interface.of(block))
        packet = pcapng.packet_of(block, interfaces)
        flows += [packet and flow_of(packet)] if block.kind in (2, 3, 6) else []
    assert len(flows) in (3, 6)
    assert all(isinstance(flow, tuple) and (flow[1][1], flow[2][1]) == (1000, 53) for flow in flows)


@pytest.mark.parametrize(
    ("linktype", "data", "word"),
    [
        (227, b"\0" * 60, "link type 227 (CAN)"),
        (239, b"\0" * 60, "NFLOG without a packet"),
        (9, b"\xc0\x21" + b"\0" * 60, "PPP control"),
        (9, b"\0\xfd" + b"\0" * 60, "PPP protocol 0x00fd"),
        (0, b"\0\0\0\7" + b"\0" * 60, "malformed IP"),
        (147, b"\0" * 60, "link type 147"),
        (1, bytes(12) + b"\x88\x63\x11\x09" + bytes(40), "PPPoE discovery"),
        (1, bytes(12) + b"\x88\x64\x11\xa7" + bytes(40), "PPPoE discovery"),
        (1, bytes(12) + b"\x88\x47\0\0\1\0" + bytes(40), "MPLS without IP"),
        (1, bytes(12) + b"\x88\x47" + bytes(80), "more headers than can be"),
        (1, bytes(12) + b"\x08\x06" + bytes(40), "ARP"),
        (1, bytes(12) + b"\x12\x34" + bytes(40), "EtherType 0x1234"),
        (1, bytes(12) + b"\x00\x20" + bytes(40), "802.3"),
        (101, ipv4(47) + b"\x40\0\x08\0" + bytes(20), "GRE"),
        (101, ipv4(47) + b"\0\7\x08\0" + bytes(20), "GRE"),
        (101, ipv4(47) + b"\x20\x81\x88\x0b" + bytes(8), "GRE"),
        (101, ipv4(47) + b"\0\0\x88\xbe" + bytes(8), "EtherType 0x88be"),
        (101, ipv4(4) * 17, "more headers than can be"),
        (101, ipv4(41) + ipv4(UDP), "malformed IP"),
        (101, ipv4(1) + bytes(20), "ICMP"),
        (101, ipv4(253) + bytes(20), "IP protocol 253"),
        (101, ipv4(UDP, offset=1) + PORTS, "later fragments"),
        (101, ipv4(UDP), "cut short"),
        (101, b"", "cut short"),
        (101, ipv6(44, bytes([UDP, 0, 1, 0]) + bytes(4) + PORTS), "later fragments"),
        (101, ipv6(0, (b"\0" * 8) * 65 + PORTS), "more extension headers than can be"),
        (1, bytes(12) + b"\x81\x00\x00\x01" * 20 + b"\x08\x00", "more headers than can be"),
    ],
)
def test_what_is_not_understood_has_a_name(linktype: int, data: Any, word: str) -> None:
    assert look(pcapng.CapturedPacket(linktype, None, data)) == word


class Counting(bytes):
    """Counts the bytes that slices of it copy."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, bytes):
            Counting.copied += len(found)
            return Counting(found)
        return found


def test_a_packet_of_nothing_but_headers_is_not_copied_for_each() -> None:
    """8 MiB of extension headers: with a slice a header that is 4 TiB, two minutes and more."""
    Counting.copied = 0
    data = Counting(ipv6(60) + b"\x3c\0\0\0\0\0\0\0" * (1 << 20))
    assert look(pcapng.CapturedPacket(101, None, data)) == "more extension headers than can be"
    assert Counting.copied < 1000
    ok = ipv6(60, b"\x3c\0\0\0\0\0\0\0" * 20 + b"\x11\0\0\0\0\0\0\0" + PORTS)
    assert there(flow_of(pcapng.CapturedPacket(101, None, ok)))[1:] == (("::1", 1000), ("::2", 53))


def test_an_interface_block_of_12_bytes_is_an_error_with_its_place() -> None:
    section = pcapng.section_header("x")
    data = section + struct.pack("<III", 1, 12, 12)
    with pytest.raises(Error, match=f"^x: a block .* byte {len(section)} is impossible$"):
        list(read_capture(io.BytesIO(data), "x"))


def test_a_packet_longer_than_its_block_is_an_error() -> None:
    block = bytearray(pcapng.enhanced_packet(0, 0, b"1234", 4))
    block[20:24] = struct.pack("<I", 5000)
    data = pcapng.section_header("x") + pcapng.interface_description("") + block
    with pytest.raises(Error, match="longer than its block"):
        list(read_capture(io.BytesIO(data), "x"))


def test_interfaces_without_end_do_not_fill_the_memory() -> None:
    class Endless(io.RawIOBase):
        def __init__(self) -> None:
            self.given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            one = pcapng.interface_description("")
            data = pcapng.section_header("x") if not self.given else one * (len(buffer) // len(one))
            buffer[: len(data)] = data
            self.given += len(data)
            return len(data)

    with pytest.raises(Error, match="more than 65536 interfaces"):
        for _ in read_capture(io.BufferedReader(Endless()), "x"):
            pass


@pytest.mark.parametrize("cut", [1, 7, 15, 16, 40])
@pytest.mark.parametrize("number", [0, 5, 10])
def test_a_cut_trace_is_read_to_its_last_whole_packet(number: int, cut: int) -> None:
    data = list(captures())[number]
    whole = [block.data for block in read_capture(io.BytesIO(data), "x")]
    found = []
    with pytest.raises(
        Error, match="ends in the middle of a .*, at byte .*; all before it is read"
    ):
        for block in read_capture(io.BytesIO(data[:-cut]), "x"):
            found.append(block.data)
    assert found == whole[: len(found)] and len(found) in (len(whole) - 1, len(whole) - 2)


MAGICS = {0xA1B2C3D4: (1000, 0), 0xA1B23C4D: (1, 0), 0xA1B2CD34: (1000, 8)}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("magic", MAGICS)
def test_pcap_of_each_kind_has_its_times_and_packets(magic: int, order: Any) -> None:
    unit, more = MAGICS[magic]
    data = ipv4(UDP) + PORTS
    head = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, 101)
    packet = struct.pack(f"{order}IIII", 7, 5, len(data), len(data)) + bytes(more) + data
    found = list(read_capture(io.BytesIO(head + packet * 3), "x"))
    interface = pcapng.Interface.of(found[1])
    packets = [pcapng.packet_of(block, [interface]) for block in found[2:]]
    assert [there(one).time_ns for one in packets] == [7 * 10**9 + 5 * unit] * 3
    assert all(
        there(flow_of(there(one)))[1:] == (("10.0.0.1", 1000), ("10.0.0.2", 53)) for one in packets
    )


@pytest.mark.parametrize(
    ("options", "time_ns"),
    [
        ([], 5000 * 1000),
        ([(9, b"\x09")], 5000),
        ([(9, b"\x8a")], 5000 * 10**9 // 1024),
        ([(9, b"\x0a")], 500),
        ([(9, b"\x09"), (14, struct.pack("<q", -3))], 5000 - 3 * 10**9),
    ],
)
def test_pcapng_interfaces_tell_the_unit_and_offset_of_time(
    options: list[Any], time_ns: int
) -> None:
    body = struct.pack("<HHI", 1, 0, 0) + pcapng._options(options, "<")
    blocks = [pcapng._block(1, body), pcapng.enhanced_packet(0, 5000, b"x", 1)]
    data = pcapng.section_header("x") + b"".join(blocks)
    _, interface, packet = read_capture(io.BytesIO(data), "x")
    assert there(pcapng.packet_of(packet, [pcapng.Interface.of(interface)])).time_ns == time_ns
