# SPDX-License-Identifier: MIT
"""AF_PACKET: a ring with the IP packets of one network namespace. TCP and UDP become records.

Sources: man 7 packet, Documentation/networking/packet_mmap.rst, net/packet/af_packet.c.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import socket
import struct
import time
from dataclasses import dataclass

import numpy as np

from nlproto._host import ffi, lib
from nlproto.errors import Error, NoPrivilege
from nlproto.kernel.sockfilter import AD, assemble, attach
from nlproto.records.clock import Clock
from nlproto.records.wire import RECORD, dtype_of
from nlproto.running.closing import Closing

__all__ = ["PacketRing", "Frames"]

HOST_SNAP = dtype_of("host_snap", ffi)

SOL_PACKET = 263
PACKET_RX_RING, PACKET_STATISTICS, PACKET_VERSION, PACKET_VNET_HDR = 5, 6, 10, 15
TPACKET_V2 = 1
ETH_P_IP, ETH_P_IPV6 = 0x0800, 0x86DD
PACKET_OTHERHOST = 3

SNAP = 256  # link header, IPv6 with extension headers, TCP with options
_BLOCK = 1 << 18
_READ = 1024  # records of one call of C
_FILLS = 8  # with this part of its frames in use a ring fills
_CLOCKS_READ_NS = 1_000_000  # two clocks are not read at the same moment

_LD_W_ABS, _JEQ, _JSET = 0x20, 0x15, 0x45
_AD_PROTOCOL, _AD_PKTTYPE, _AD_VLAN_TAG = AD, AD + 4, AD + 44


def _filter() -> list[tuple[int, int, int, int]]:
    """Return the classic BPF program: IPv4 and IPv6, each packet once.

    It drops tagged frames, because they come again on their VLAN device. It drops packets to other
    hosts, which come only from a promiscuous interface. User space counts other protocols.
    """
    return assemble(
        [
            (_LD_W_ABS, 0, 0, _AD_PKTTYPE),
            (_JEQ, "drop", 0, PACKET_OTHERHOST),
            (_LD_W_ABS, 0, 0, _AD_VLAN_TAG),
            (_JSET, "drop", 0, 0x0FFF),
            (_LD_W_ABS, 0, 0, _AD_PROTOCOL),
            (_JEQ, "take", 0, ETH_P_IP),
            (_JEQ, "take", "drop", ETH_P_IPV6),
        ],
        SNAP,
    )


def _segments_are_told() -> bool:
    """Return whether PACKET_VNET_HDR is safe: before 6.2 it dropped UDP segmentation."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return version is not None and (int(version[1]), int(version[2])) >= (6, 2)


@dataclass(frozen=True, slots=True)
class Frames:
    """Records without names, which of them were multicast or broadcast, and their first bytes."""

    records: np.ndarray
    to_all: np.ndarray
    first_bytes: np.ndarray | None
    """HOST_SNAP, if wanted."""

    def with_more(self, later: Frames) -> Frames:
        """Return these and `later`, which were read after them."""
        return _together([self, later])


def _together(parts: list[Frames]) -> Frames:
    """Return all frames of `parts`. With first bytes only if all have them."""
    first_bytes = [part.first_bytes for part in parts if part.first_bytes is not None]
    return Frames(
        np.concatenate([part.records for part in parts]),
        np.concatenate([part.to_all for part in parts]),
        np.concatenate(first_bytes) if len(first_bytes) == len(parts) else None,
    )


class PacketRing(Closing):
    """A ring in the network namespace in which it is created (inode `netns`). A context manager.

    `ring_bytes` of kernel memory are pinned. Raises NoPrivilege without CAP_NET_RAW.
    """

    def __init__(self, netns: int, ring_bytes: int) -> None:
        self.netns = netns
        self.dropped = 0
        self._opened_ns = time.monotonic_ns() - _CLOCKS_READ_NS
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        except PermissionError:
            raise NoPrivilege("engine packet needs root (CAP_NET_RAW): run it with sudo") from None
        try:
            self._socket.setblocking(False)
            attach(self._socket, _filter())
            self._ring = self._make_ring(ring_bytes)
            # Protocol 0 until here, so that no packet comes in before filter and ring are ready.
            code = -lib.host_capture_all(self._socket.fileno())
            if code:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            self._socket.close()
            raise Error(f"engine packet cannot set up its ring: {error.strerror}") from error
        self._records = np.zeros(_READ, RECORD)
        self._to_all = np.zeros(_READ, np.uint8)
        self._first_bytes = np.zeros(0, HOST_SNAP)

    def _make_ring(self, ring_bytes: int) -> ffi.CData:
        vnet = _segments_are_told()
        self._socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
        if vnet:
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        frame = lib.host_frame_size(SNAP)
        blocks = max(1, ring_bytes // _BLOCK)
        self.ring_bytes = blocks * _BLOCK
        count = blocks * _BLOCK // frame
        self._socket.setsockopt(
            SOL_PACKET, PACKET_RX_RING, struct.pack("=IIII", _BLOCK, blocks, frame, count)
        )
        self._map = mmap.mmap(self._socket.fileno(), blocks * _BLOCK)
        self._frames = ffi.from_buffer("uint8_t[]", self._map)
        ring = ffi.new("struct host_ring *")
        ring.frames, ring.count, ring.size = self._frames, count, frame
        ring.netns, ring.vnet = self.netns, vnet
        return ring

    def close(self) -> None:
        """Unmap the ring and close its socket."""
        self._ring.frames = ffi.NULL
        ffi.release(self._frames)
        self._map.close()
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor of its socket, for poll(2)."""
        return self._socket.fileno()

    @property
    def skipped(self) -> int:
        """Packets read that became no record: later fragments, truncated ones, other protocols."""
        return int(self._ring.fragments + self._ring.truncated + self._ring.other)

    @property
    def frames_read(self) -> int:
        """Frames taken out of the ring, including those that became no record."""
        return int(self._ring.packets)

    def waiting(self) -> int:
        """Frames in the ring now."""
        return int(lib.host_ring_waiting(self._ring))

    @property
    def fills(self) -> bool:
        """Whether so many packets wait that it may soon have no room. Cheap."""
        return bool(lib.host_ring_holds(self._ring, max(1, self._ring.count // _FILLS)))

    def read(self, wanted: bool = False, most: int = _READ) -> Frames:
        """Return waiting packets, `most` or some more. The arrays belong to the caller."""
        frames = self._read(wanted)
        parts, count = [frames], len(frames.records)
        while len(frames.records) == _READ and count < most:
            frames = self._read(wanted)
            parts.append(frames)
            count += len(frames.records)
        return parts[0] if len(parts) == 1 else _together(parts)

    def _read(self, wanted: bool) -> Frames:
        """Return up to _READ waiting packets.

        The kernel gives a packet's time of day. A packet from before the clock was set would
        seem to be older than this ring, or from the future. It gets the present time.
        """
        if wanted and not len(self._first_bytes):
            self._first_bytes = np.zeros(_READ, HOST_SNAP)
        room = ffi.from_buffer("struct host_snap[]", self._first_bytes) if wanted else ffi.NULL
        self._ring.snaps = room
        self._ring.mono_offset = -Clock.now().real_offset_ns
        read = lib.host_ring_read(
            self._ring,
            ffi.from_buffer("struct sniffer_record[]", self._records),
            ffi.from_buffer("struct host_frame[]", self._to_all),
            _READ,
        )
        first_bytes = self._first_bytes[:read].copy() if wanted else None
        records = self._records[:read].copy()
        times, now = records["time_ns"].astype(np.int64), time.monotonic_ns()
        records["time_ns"][(times < self._opened_ns) | (times > now)] = now
        return Frames(records, self._to_all[:read] != 0, first_bytes)

    def drops(self) -> int:
        """Return how many packets the ring had no room for since the last call."""
        raw = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        dropped = int(struct.unpack("=II", raw)[1])
        self.dropped += dropped
        return dropped
