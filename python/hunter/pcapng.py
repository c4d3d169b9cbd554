# SPDX-License-Identifier: MIT
"""pcapng blocks, written and read as a stream (draft-ietf-opsawg-pcapng)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from nlproto import Error

__all__ = [
    "LINKTYPE_RAW",
    "Block",
    "Interface",
    "Packet",
    "blocks",
    "enhanced_packet",
    "interface_description",
    "packet_of",
    "section_header",
    "with_comment",
]

SECTION, INTERFACE, SIMPLE, ENHANCED = 0x0A0D0D0A, 1, 3, 6
MAGIC = 0x1A2B3C4D
LINKTYPE_RAW = 101
OPT_COMMENT, SHB_APPLICATION = 1, 4
IF_NAME, IF_TSRESOL, IF_TSOFFSET, EPB_FLAGS = 2, 9, 14, 2
MAX_BLOCK = 64 << 20

Option = tuple[int, bytes]


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _options(options: Sequence[Option], order: str) -> bytes:
    if not options:
        return b""
    parts = [
        struct.pack(f"{order}HH", code, len(value[:65535])) + _pad(value[:65535])
        for code, value in options
    ]
    return b"".join(parts) + bytes(4)


def _block(kind: int, body: bytes, order: str = "<") -> bytes:
    size = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + size + body + size


def section_header(application: str, comment: str = "") -> bytes:
    """Return the block that begins a little-endian file."""
    options = [(OPT_COMMENT, comment.encode())] if comment else []
    options.append((SHB_APPLICATION, application.encode()))
    return _block(SECTION, struct.pack("<IHHq", MAGIC, 1, 0, -1) + _options(options, "<"))


def interface_description(
    name: str, linktype: int = LINKTYPE_RAW, snaplen: int = 0, resolution: int = 9
) -> bytes:
    """Return an interface's block; times of its packets are in 10**-resolution s."""
    options = [(IF_TSRESOL, bytes([resolution]))]
    if name:
        options.insert(0, (IF_NAME, name.encode()))
    return _block(INTERFACE, struct.pack("<HHI", linktype, 0, snaplen) + _options(options, "<"))


def enhanced_packet(
    interface: int, time: int, data: bytes, length: int, comment: str = "", flags: int = 0
) -> bytes:
    """Return one packet; `time` in the interface's units since 1970, `length` on the wire.

    `flags`: 1 inbound, 2 outbound, 0 unknown.
    """
    options = [(OPT_COMMENT, comment.encode())] if comment else []
    if flags:
        options.append((EPB_FLAGS, struct.pack("<I", flags)))
    high, low = time >> 32, time & 0xFFFFFFFF
    head = struct.pack("<IIIII", interface, high, low, len(data), length)
    return _block(ENHANCED, head + _pad(data) + _options(options, "<"))


@dataclass(frozen=True, slots=True)
class Block:
    """One block as it stands in a file; `order` is "<" or ">", `data` all its bytes."""

    kind: int
    order: str
    data: bytes

    @property
    def body(self) -> bytes:
        return self.data[8:-4]


@dataclass(frozen=True, slots=True)
class Interface:
    """What a packet's interface says of it."""

    linktype: int
    ticks: int = 1_000_000
    """In a second."""
    offset_s: int = 0

    @classmethod
    def of(cls, block: Block) -> Interface:
        """Read an interface description. Raises Error."""
        linktype, _, _ = struct.unpack_from(f"{block.order}HHI", block.body)
        ticks, offset = 1_000_000, 0
        for code, value in _read_options(block.body[8:], block.order):
            if code == IF_TSRESOL and value:
                power = value[0] & 0x7F
                ticks = 1 << power if value[0] & 0x80 else 10 ** min(power, 18)
            elif code == IF_TSOFFSET and len(value) == 8:
                (offset,) = struct.unpack(f"{block.order}q", value)
        return cls(linktype, ticks, offset)


@dataclass(frozen=True, slots=True)
class Packet:
    """One captured packet; `time_ns` since 1970, None when its block has no time."""

    linktype: int
    time_ns: int | None
    data: bytes


def _read_options(data: bytes, order: str) -> Iterator[Option]:
    at = 0
    while at + 4 <= len(data):
        code, size = struct.unpack_from(f"{order}HH", data, at)
        if code == 0:
            return
        yield code, data[at + 4 : at + 4 + size]
        at += 4 + size + (-size % 4)


def blocks(file: IO[bytes], name: str) -> Iterator[Block]:
    """Yield the blocks of a pcapng file. Raises Error, naming the file, where it is damaged."""
    order = "<"
    at = 0
    while head := file.read(8):
        if len(head) == 8 and head[:4] == b"\n\r\r\n":
            magic = file.read(4)
            order = "<" if magic == struct.pack("<I", MAGIC) else ">"
            if order == ">" and magic != struct.pack(">I", MAGIC):
                raise Error(f"{name}: no pcapng section at byte {at}")
            head += magic
        if len(head) < 8:
            raise Error(f"{name} ends in the middle of a block, at byte {at}")
        kind, size = struct.unpack_from(f"{order}II", head)
        if size < 12 or size % 4 or size > MAX_BLOCK:
            raise Error(f"{name}: a block of {size} bytes at byte {at} cannot be")
        data = head + file.read(size - len(head))
        if len(data) < size:
            raise Error(f"{name} ends in the middle of a block, at byte {at}")
        yield Block(kind, order, data)
        at += size


def packet_of(block: Block, interfaces: Sequence[Interface]) -> Packet | None:
    """Return the packet in an enhanced or simple packet block of a known interface, else None."""
    if block.kind == ENHANCED and len(block.data) >= 32:
        number, high, low, size, _ = struct.unpack_from(f"{block.order}IIIII", block.data, 8)
        if number >= len(interfaces):
            return None
        interface = interfaces[number]
        ticks = high << 32 | low
        time_ns = ticks * 10**9 // interface.ticks + interface.offset_s * 10**9
        return Packet(
            interface.linktype, time_ns, block.data[28 : min(28 + size, len(block.data) - 4)]
        )
    if block.kind == SIMPLE and interfaces and len(block.body) >= 4:
        return Packet(interfaces[0].linktype, None, block.body[4:])
    return None


def with_comment(block: Block, comment: str) -> bytes:
    """Return the enhanced packet block with one comment more, its other options kept."""
    body = block.body
    (size,) = struct.unpack_from(f"{block.order}I", body, 12)
    fixed = 20 + size + (-size % 4)
    options = [*_read_options(body[fixed:], block.order), (OPT_COMMENT, comment.encode())]
    return _block(ENHANCED, body[:fixed] + _options(options, block.order), block.order)
