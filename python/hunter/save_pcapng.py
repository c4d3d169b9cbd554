# SPDX-License-Identifier: MIT
"""Captures as pcapng: each packet with its process as a comment."""

from __future__ import annotations

import os
import socket
import struct

import numpy as np

from hunter import names
from hunter.capturefile import CaptureFile
from hunter.columns import Columns
from hunter.pcapng import enhanced_packet, interface_description, section_header
from hunter.text import plain
from nlproto import __version__
from nlproto.snaps import Snaps

__all__ = ["PcapngSaver", "comment", "rebuilt"]

_FLAGS = {"in": 1, "out": 2}


class PcapngSaver:
    """Real first bytes where `snaps` has them; else IP, TCP and UDP headers made from the record.

    Made headers have the real addresses, ports, lengths and TCP flags; what a record lacks
    (sequence numbers, time to live, checksums of the payload) is zero, and the comment says so.
    """

    def __init__(self, file: CaptureFile, snaps: Snaps | None) -> None:
        self._file = file
        self._snaps = snaps
        self._interfaces: dict[tuple[int, int], int] = {}
        self._netns = os.stat("/proc/self/ns/net").st_ino
        file.write(section_header(f"packet-hunter {__version__}"))

    def add(self, table: Columns) -> None:
        """Append the packets of `table`. Raises Error, BrokenPipeError."""
        batch, records = table.batch, table.batch.records
        real = batch.clock.real_times(records["time_ns"]).view(np.int64).tolist()
        ifindex = records["ifindex"].tolist()
        parts: list[bytes] = []
        for i, time_ns in enumerate(real):
            interface = self._interface(table.netns[i], ifindex[i], parts)
            snap = None if self._snaps is None else self._snaps.find(records[i])
            text = comment(table, i)
            if snap is not None:
                data = snap.data
            else:
                data = rebuilt(records[i])
                text += " (headers made from the record)"
            flags = _FLAGS.get(table.dir[i], 0)
            length = max(table.len[i], len(data))
            parts.append(enhanced_packet(interface, time_ns, data, length, text, flags))
        self._file.write_rows(parts)

    def _interface(self, netns: int, ifindex: int, parts: list[bytes]) -> int:
        key = (netns, ifindex)
        number = self._interfaces.get(key)
        if number is None:
            number = self._interfaces[key] = len(self._interfaces)
            here = netns == self._netns
            name = names.interface(ifindex) if here else f"if{ifindex}@netns{netns}"
            parts.append(interface_description(name))
        return number

    def close(self) -> None:
        self._file.close()


def comment(table: Columns, i: int) -> str:
    """Return the owner of row `i` as the text of a comment."""
    pid = table.pid[i]
    if pid is None:
        return f"packet-hunter: nobody, {table.how[i]}"
    words = [f"packet-hunter: {plain(table.comm[i])}.{pid} uid={table.uid[i]}"]
    if table.exe[i]:
        words.append(f"exe={plain(table.exe[i])}")
    process = table.process[i]
    if process is not None and process.container:
        words.append(f"container={plain(process.container)}")
    elif process is not None and process.unit:
        words.append(f"unit={plain(process.unit)}")
    words.append(f"how={table.how[i]}")
    for one in table.holders.get(i, ()):
        words.append(f"holder={plain(str(one['comm']))}.{one['pid']}")
    return " ".join(words)


def rebuilt(record: np.void) -> bytes:
    """Return IP and TCP or UDP headers with what a RECORD knows."""
    tcp = record["proto"] == socket.IPPROTO_TCP
    length = int(record["len"])
    ports = struct.pack("!HH", record["sport"], record["dport"])
    saddr, daddr = record["saddr"].tobytes(), record["daddr"].tobytes()
    ip = 20 if record["family"] == socket.AF_INET else 40
    if tcp:
        # options are part of the header's length, or what follows would pass for payload
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
