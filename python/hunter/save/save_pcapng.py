# SPDX-License-Identifier: MIT
"""Captures as pcapng: each packet with its process as a comment."""

from __future__ import annotations

import socket
import struct
from typing import Any

import numpy as np

from hunter.formats.headers import transport
from hunter.formats.ownercomment import comment_of
from hunter.formats.pcapng import (
    LINKTYPE_RAW,
    enhanced_packet,
    interface_description,
    process_block,
    section_header,
)
from hunter.save.capturefile import CaptureFile
from hunter.show.columns import COLUMNS, Columns, cells
from nlproto import __version__
from nlproto.records.first_bytes import FirstBytes
from nlproto.records.wire import lib
from nlproto.tables.processes import Process

__all__ = ["PcapngSaver", "rebuilt"]

_FLAGS = {"in": 1, "out": 2}
_LOOPBACK = 1  # the index of lo in every network namespace
_IN_PACKET = ("proto", "src", "sport", "dst", "dport", "tcp_flags")
_APART = ("time", "dir", "len", "netns", "interface", "ifindex", "community_id")
"""Columns that the file has in other places."""
_WORDS = tuple(name for name in COLUMNS if name not in (*_IN_PACKET, *_APART))


class PcapngSaver:
    """Packets have real bytes where `first_bytes` has them, else headers made from the record.

    Option 8 has the pid and tid of the process: of the sender of an outbound packet, of the
    receiver of an inbound one. `process_blocks`: each process has a block before its first packet.
    Made headers have the real addresses, ports, lengths and TCP flags. Fields that a record lacks
    (sequence numbers, time to live, checksums of the payload) are zero. The comment says so.
    """

    def __init__(
        self, file: CaptureFile, first_bytes: FirstBytes | None, process_blocks: bool = False
    ) -> None:
        self._file = file
        self._process_blocks = process_blocks
        self._described: dict[int, Process] = {}
        self._first_bytes = first_bytes
        self._interfaces: dict[tuple[int, int, str], int] = {}
        self._loopback: set[str] = set()
        file.write(section_header(f"packet-hunter {__version__}"))

    @property
    def rows(self) -> int:
        return self._file.rows

    @property
    def note(self) -> str:
        """What people should know about the file."""
        if self._loopback < {"in", "out"}:
            return ""
        return (
            f"{self._file.path} has each packet of lo twice, as it was sent and as it was received;"
            " -Q in saves one of them"
        )

    def add(self, table: Columns) -> None:
        """Append the packets of `table`. Raises Error, BrokenPipeError."""
        batch, records = table.batch, table.batch.records
        values = cells(table)
        real = batch.clock.real_times(records["time_ns"]).view(np.int64).tolist()
        parts: list[bytes] = []
        for i, time_ns in enumerate(real):
            record, way, length = records[i], table.dir[i], table.len[i]
            found = None if self._first_bytes is None else self._first_bytes.find(record)
            data = rebuilt(record) if found is None else found.data
            row: dict[str, Any] = {name: values[name][i] for name in _WORDS}
            if not _tells(data, record):
                row |= {name: values[name][i] for name in _IN_PACKET}
            if length < len(data):
                row["len"] = length
            if way not in _FLAGS:
                row["dir"] = way
            head, interface = self._interface(values, i)
            if values["ifindex"][i] == _LOOPBACK:
                self._loopback.add(way)
            text = comment_of(row, made=found is None)
            flags, length = _FLAGS.get(way, 0), max(length, len(data))
            pid, process = row["pid"], table.process[i]
            ids = None if pid is None else (pid, row["tid"] or 0)
            if self._process_blocks and process is not None:
                head += self._description(process)
            # this block and those before its first packet are written together or not at all
            packet = enhanced_packet(interface, time_ns, data, length, text, flags, ids)
            parts.append(head + packet)
        self._file.write_rows(parts)

    def _interface(self, values: dict[str, list[Any]], i: int) -> tuple[bytes, int]:
        """Return its block, if it is new, and its number."""
        name = values["interface"][i] or ""
        netns, ifindex = values["netns"][i], values["ifindex"][i] or 0
        key = (netns, ifindex, name)
        number = self._interfaces.get(key)
        if number is not None:
            return b"", number
        number = self._interfaces[key] = len(self._interfaces)
        description = f"netns {netns} ifindex {ifindex}"
        return interface_description(
            name, LINKTYPE_RAW, lib.SNIFFER_SNAP_LEN, description=description
        ), number

    def _description(self, process: Process) -> bytes:
        """Yield its block, if its pid had another one before, or none."""
        if self._described.get(process.tgid) == process:
            return b""
        self._described[process.tgid] = process
        return process_block(
            process.tgid,
            process.comm,
            process.exe,
            process.cmdline,
            process.ppid,
            process.uid,
            process.user,
        )

    def close(self) -> None:
        self._file.close()


def _tells(data: bytes, record: np.void) -> bool:
    """Return whether the packet's headers agree with the record."""
    found = transport(LINKTYPE_RAW, data)
    if isinstance(found, str):
        return False
    family, proto, network, at = found
    first, size = (network + 12, 4) if family == socket.AF_INET else (network + 8, 16)
    tcp = proto == socket.IPPROTO_TCP
    return bool(
        (family, proto) == (record["family"], record["proto"])
        and data[first : first + size] == record["saddr"].tobytes()[:size]
        and data[first + size : first + 2 * size] == record["daddr"].tobytes()[:size]
        and data[at : at + 4] == struct.pack("!HH", record["sport"], record["dport"])
        and (not tcp or data[at + 13 : at + 14] == record["tcp_flags"].tobytes())
    )


def rebuilt(record: np.void) -> bytes:
    """Return IP and TCP or UDP headers with the facts of a RECORD."""
    tcp = record["proto"] == socket.IPPROTO_TCP
    length = int(record["len"])
    ports = struct.pack("!HH", record["sport"], record["dport"])
    saddr, daddr = record["saddr"].tobytes(), record["daddr"].tobytes()
    ip = 20 if record["family"] == socket.AF_INET else 40
    if tcp:
        # options count as header, or what follows would count as payload
        size = min(max(int(record["hdr_len"]) - ip, 20), 60) // 4 * 4
        transport = ports + struct.pack("!IIBBHHH", 0, 0, size << 2, record["tcp_flags"], 0, 0, 0)
        transport += bytes(size - 20)
    else:
        transport = ports + struct.pack("!HH", max(min(length - ip, 65535), 8), 0)
    proto = int(record["proto"])
    if record["family"] == socket.AF_INET:
        total = min(length, 65535)
        head: bytes = (
            struct.pack("!BBHHHBBH", 0x45, 0, total, 0, 0, 0, proto, 0) + saddr[:4] + daddr[:4]
        )
        head = head[:10] + struct.pack("!H", _checksum(head)) + head[12:]
    else:
        head = (
            struct.pack("!IHBB", 6 << 28, max(min(length - 40, 65535), 0), proto, 0) + saddr + daddr
        )
    return head + transport


def _checksum(head: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(head) // 2}H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
