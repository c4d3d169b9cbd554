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
    "CapturedPacket",
    "blocks",
    "comments",
    "enhanced_packet",
    "flags_of",
    "interface_description",
    "packet_of",
    "process_block",
    "section_header",
    "with_comment",
]

SECTION, INTERFACE, OBSOLETE, SIMPLE, ENHANCED = 0x0A0D0D0A, 1, 2, 3, 6
MAGIC = 0x1A2B3C4D
LINKTYPE_RAW = 101
OPT_COMMENT, SHB_APPLICATION = 1, 4
IF_NAME, IF_DESCRIPTION, IF_TSRESOL, IF_TSOFFSET, EPB_FLAGS = 2, 3, 9, 14, 2
EPB_IDS = 8
"""epb_processid_threadid: a packet's process, 0 if unknown."""
_CUSTOM, _WIRESHARK, _PROCESS = 0xBAD, 32622, 3
_NAME, _PATH, _COMMAND, _PARENT, _UID, _USER = 2, 3, 4, 5, 6, 7
MAX_BLOCK = 16 << 20
"""As in Wireshark (wiretap/pcapng.c)."""
_MAX_INTERFACES = 65536
_LEAST = {SECTION: 28, INTERFACE: 20, OBSOLETE: 32, SIMPLE: 16, ENHANCED: 32}
"""The fewest bytes of a block of each kind."""
_CAPLEN = 20
"""Where packet blocks have these fields; the data begin 8 bytes after."""

Option = tuple[int, bytes]
Ids = tuple[int, int]
"""(pid, tid); tid 0: not known."""


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
    name: str,
    linktype: int = LINKTYPE_RAW,
    snaplen: int = 0,
    resolution: int = 9,
    description: str = "",
) -> bytes:
    """Return an interface's block. Times of its packets are in 10**-resolution s."""
    options = [(IF_TSRESOL, bytes([resolution]))]
    if description:
        options.insert(0, (IF_DESCRIPTION, description.encode()))
    if name:
        options.insert(0, (IF_NAME, name.encode()))
    return _block(INTERFACE, struct.pack("<HHI", linktype, 0, snaplen) + _options(options, "<"))


def enhanced_packet(
    interface: int,
    time: int,
    data: bytes,
    length: int,
    comment: str = "",
    flags: int = 0,
    ids: Ids | None = None,
) -> bytes:
    """Return one packet; `time` in the interface's units since 1970, `length` on the wire.

    `flags`: 1 inbound, 2 outbound, 0 unknown; `ids`: of its process.
    """
    options = [(OPT_COMMENT, comment.encode())] if comment else []
    if flags:
        options.append((EPB_FLAGS, struct.pack("<I", flags)))
    if ids is not None:
        options.append((EPB_IDS, struct.pack("<II", *ids)))
    high, low = time >> 32, time & 0xFFFFFFFF
    head = struct.pack("<IIIII", interface, high, low, len(data), length)
    return _block(ENHANCED, head + _pad(data) + _options(options, "<"))


def process_block(
    pid: int,
    name: str,
    path: str = "",
    command: str = "",
    parent: int | None = None,
    uid: int | None = None,
    user: str = "",
    order: str = "<",
) -> bytes:
    """Return a block about a process that packets name by `pid` (process information).

    Empty texts are left out. Wireshark newer than 4.6 reads it; earlier ones count it as a frame,
    of a custom block.
    """
    texts = ((_NAME, name), (_PATH, path), (_COMMAND, command), (_USER, user))
    numbers = ((_PARENT, parent), (_UID, uid))
    options = [(code, text.encode("utf-8", "backslashreplace")) for code, text in texts if text]
    options += [(code, struct.pack("<I", one)) for code, one in numbers if one is not None]
    # little-endian in a section of either order
    entry = struct.pack("<I", pid) + _options(sorted(options), "<")
    head = struct.pack(f"{order}I", _WIRESHARK) + struct.pack("<II", _PROCESS, len(entry))
    return _block(_CUSTOM, head + _pad(entry), order)


@dataclass(frozen=True, slots=True)
class Block:
    """One block, as in the file; `order` is "<" or ">", `data` all its bytes."""

    kind: int
    order: str
    data: bytes
    at: int = 0
    """Its offset in the file, in bytes."""

    @property
    def body(self) -> bytes:
        return self.data[8:-4]


@dataclass(frozen=True, slots=True)
class Interface:
    """Facts about a packet's interface."""

    linktype: int
    ticks: int = 1_000_000
    """Units in a second."""
    offset_s: int = 0
    snaplen: int = 0
    name: str = ""
    description: str = ""

    @classmethod
    def of(cls, block: Block) -> Interface:
        """Read an interface description that blocks() gave."""
        linktype, _, snaplen = struct.unpack_from(f"{block.order}HHI", block.data, 8)
        ticks, offset, texts = 1_000_000, 0, {IF_NAME: "", IF_DESCRIPTION: ""}
        for code, value in _read_options(block.data[16:-4], block.order):
            if code == IF_TSRESOL and value:
                power = value[0] & 0x7F
                ticks = 1 << power if value[0] & 0x80 else 10**power
            elif code == IF_TSOFFSET and len(value) == 8:
                (offset,) = struct.unpack(f"{block.order}q", value)
            elif code in texts:
                texts[code] = _text(value)
        return cls(linktype, ticks, offset, snaplen, texts[IF_NAME], texts[IF_DESCRIPTION])


@dataclass(frozen=True, slots=True)
class CapturedPacket:
    """One captured packet. `time_ns` since 1970; None if its block has no time."""

    linktype: int
    time_ns: int | None
    data: bytes
    length: int = 0
    """On the wire."""
    interface: int = 0
    """Index of its interface in the section."""


def _text(value: bytes) -> str:
    """A string may end with a NUL, against the specification."""
    return value.rstrip(b"\0").decode("utf-8", "backslashreplace")


def _read_options(data: bytes, order: str) -> Iterator[Option]:
    at = 0
    while at + 4 <= len(data):
        code, size = struct.unpack_from(f"{order}HH", data, at)
        if code == 0:
            return
        yield code, data[at + 4 : at + 4 + size]
        at += 4 + size + (-size % 4)


def blocks(file: IO[bytes], name: str, head: bytes = b"") -> Iterator[Block]:
    """Yield the blocks of a pcapng file. `head`: its first bytes, at most 8, that are read already.

    Each block has what its kind must have. Raises Error, with file and byte, where it is damaged,
    after all earlier blocks.
    """
    order = "<"
    at = interfaces = 0
    while head := head + file.read(8 - len(head)):
        if head[:4] == b"\n\r\r\n" and len(head) == 8:
            magic = file.read(4)
            order = "<" if magic == struct.pack("<I", MAGIC) else ">"
            if order == ">" and magic != struct.pack(">I", MAGIC):
                raise Error(f"{name}: no pcapng section at byte {at}")
            head += magic
            interfaces = 0
        if len(head) < 8:
            raise _ends(name, at)
        kind, size = struct.unpack_from(f"{order}II", head)
        if size < _LEAST.get(kind, 12) or size % 4 or size > MAX_BLOCK:
            raise Error(f"{name}: a block of {size} bytes at byte {at} is impossible")
        data = head + file.read(size - len(head))
        if len(data) < size:
            raise _ends(name, at)
        if data[-4:] != data[4:8]:
            raise Error(f"{name}: the block at byte {at} has two lengths")
        if kind in (ENHANCED, OBSOLETE):
            (caplen,) = struct.unpack_from(f"{order}I", data, _CAPLEN)
            if _CAPLEN + 8 + caplen > size - 4:
                raise Error(f"{name}: the packet at byte {at} is longer than its block")
        interfaces += kind == INTERFACE
        if interfaces > _MAX_INTERFACES:
            raise Error(f"{name}: more than {_MAX_INTERFACES} interfaces at byte {at}")
        yield Block(kind, order, data, at)
        at += size
        head = b""


def _ends(name: str, at: int) -> Error:
    return Error(f"{name} ends in the middle of a block, at byte {at}; all before it is read")


def packet_of(block: Block, interfaces: Sequence[Interface]) -> CapturedPacket | None:
    """Return the packet in a packet block of a known interface, else None."""
    if block.kind in (ENHANCED, OBSOLETE):
        layout = "IIIII" if block.kind == ENHANCED else "HxxIIII"
        number, high, low, size, length = struct.unpack_from(block.order + layout, block.data, 8)
        if number >= len(interfaces):
            return None
        interface = interfaces[number]
        ticks = high << 32 | low
        time_ns = ticks * 10**9 // interface.ticks + interface.offset_s * 10**9
        return CapturedPacket(
            interface.linktype, time_ns, block.data[28 : 28 + size], length, number
        )
    if block.kind == SIMPLE and interfaces:
        (length,) = struct.unpack_from(f"{block.order}I", block.data, 8)
        size = min(length, interfaces[0].snaplen or length, len(block.data) - 16)
        return CapturedPacket(interfaces[0].linktype, None, block.data[12 : 12 + size], length)
    return None


def _options_at(block: Block) -> int:
    """Return where the options of an enhanced or obsolete packet block begin."""
    (size,) = struct.unpack_from(f"{block.order}I", block.data, _CAPLEN)
    return int(_CAPLEN + 8 + size + (-size % 4))


def comments(block: Block) -> list[str]:
    """Return the comments of an enhanced or obsolete packet block; others have none."""
    if block.kind not in (ENHANCED, OBSOLETE):
        return []
    options = _read_options(block.data[_options_at(block) : -4], block.order)
    return [_text(value) for code, value in options if code == OPT_COMMENT]


def flags_of(block: Block) -> int:
    """Return the flags of an enhanced or obsolete packet block, 0 where it has none."""
    for code, value in _read_options(block.data[_options_at(block) : -4], block.order):
        if code == EPB_FLAGS and len(value) == 4:
            return int(struct.unpack(f"{block.order}I", value)[0])
    return 0


def with_comment(block: Block, comment: str, ids: Ids | None = None) -> bytes:
    """Return the (enhanced or obsolete) packet block with another comment.

    Also adds `ids` of its process, if it is an enhanced block without; an obsolete one has no
    option for them.
    """
    at = _options_at(block)
    options = [*_read_options(block.data[at:-4], block.order), (OPT_COMMENT, comment.encode())]
    known = block.kind != ENHANCED or any(code == EPB_IDS for code, _ in options)
    if ids is not None and not known:
        options.append((EPB_IDS, struct.pack(f"{block.order}II", *ids)))
    body = block.data[8:at]
    return _block(block.kind, body + _options(options, block.order), block.order)
