# SPDX-License-Identifier: MIT
"""Every fork below this process from now on, reported by the kernel (man 2 perf_event_open).

There is one event for each CPU, and children inherit it, as with perf. So no process is too
short-lived.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import struct
import time

__all__ = ["Forks"]

_SYSCALL = {"x86_64": 298, "i686": 336, "armv7l": 364, "ppc64le": 319, "s390x": 331}
_GENERIC_SYSCALL = 241  # aarch64, riscv64, loongarch64: include/uapi/asm-generic/unistd.h
_ATTR_BYTES = 112  # PERF_ATTR_SIZE_VER5
_SOFTWARE, _DUMMY = 1, 9
_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HV, _TASK, _USE_CLOCKID = 1, 5, 6, 13, 25  # bits of flags
_CLOEXEC = 8
_HEAD, _TAIL = 1024, 1032  # data_head and data_tail in struct perf_event_mmap_page
_LOST, _FORK = 2, 7
_RING = max(1 << 17, mmap.PAGESIZE)  # bytes for each CPU: 4,000 forks and exits between two reads
_MAX = 1 << 20  # forks remembered
_SAME_NS = 1_000_000_000  # from a process's start to its fork's event, on a busy machine

Fork = tuple[int, int]
"""(CLOCK_BOOTTIME ns, parent's pid)."""


class Forks:
    """Knows which process forked which. A context manager, for the thread that starts the command.

    The kernel does not report processes that a setuid program starts. Raises OSError if it refuses
    (kernel.perf_event_paranoid, a container's rules).
    """

    def __init__(self) -> None:
        self.complete = True
        """Whether nothing was lost so far."""
        self._forks: dict[int, list[Fork]] = {}
        self._rings: list[tuple[int, mmap.mmap]] = []
        try:
            for cpu in _online():
                handle = _open(cpu)
                try:
                    ring = mmap.mmap(handle, mmap.PAGESIZE + _RING)
                except BaseException:
                    os.close(handle)
                    raise
                self._rings.append((handle, ring))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for handle, ring in self._rings:
            ring.close()
            os.close(handle)
        self._rings.clear()

    def read(self) -> None:
        """Read all forks up to now."""
        while any([self._drain(ring) for _, ring in self._rings]):
            pass

    def _drain(self, ring: mmap.mmap) -> bool:
        (head,), (tail,) = (
            struct.unpack_from("=Q", ring, _HEAD),
            struct.unpack_from("=Q", ring, _TAIL),
        )
        if head == tail:
            return False
        start, end = tail % _RING, head % _RING
        data = ring[mmap.PAGESIZE + start : mmap.PAGESIZE + (end if start < end else _RING)]
        if start >= end:
            data += ring[mmap.PAGESIZE : mmap.PAGESIZE + end]
        struct.pack_into("=Q", ring, _TAIL, head)
        at = 0
        while at < len(data):
            kind, _, size = struct.unpack_from("=IHH", data, at)
            if kind == _FORK:
                pid, ppid, tid, _, moment = struct.unpack_from("=IIIIQ", data, at + 8)
                if pid == tid:  # else a thread
                    self._add(pid, (moment, ppid))
            elif kind == _LOST:
                self.complete = False
            at += size
        return True

    def _add(self, pid: int, fork: Fork) -> None:
        if len(self._forks) >= _MAX:
            del self._forks[next(iter(self._forks))]
            self.complete = False
        self._forks.setdefault(pid, []).append(fork)

    def of(self, pid: int, start_ns: int) -> Fork | None:
        """Return the fork that made the process (pid, start since boot in ns)."""
        for fork in sorted(self._forks.get(pid, ())):
            if start_ns <= fork[0] < start_ns + _SAME_NS:
                return fork
        return None

    def before(self, pid: int, moment: int) -> Fork | None:
        """Return the fork that made the process with `pid` at `moment`."""
        earlier = [fork for fork in self._forks.get(pid, ()) if fork[0] <= moment]
        return max(earlier, default=None)


def _online() -> list[int]:
    with open("/sys/devices/system/cpu/online", encoding="ascii") as file:
        spans = re.findall(r"(\d+)(?:-(\d+))?", file.read())
    return [cpu for low, high in spans for cpu in range(int(low), int(high or low) + 1)]


def _open(cpu: int) -> int:
    """Return an event for this thread and what it starts, on `cpu`."""
    attr = bytearray(_ATTR_BYTES)
    bits = (_INHERIT, _EXCLUDE_KERNEL, _EXCLUDE_HV, _TASK, _USE_CLOCKID)
    struct.pack_into("=IIQ", attr, 0, _SOFTWARE, _ATTR_BYTES, _DUMMY)
    struct.pack_into("=Q", attr, 40, sum(1 << bit for bit in bits))
    struct.pack_into("=i", attr, 92, time.CLOCK_BOOTTIME)
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSCALL.get(platform.machine(), _GENERIC_SYSCALL)
    raw = (ctypes.c_char * _ATTR_BYTES).from_buffer(attr)
    handle = libc.syscall(ctypes.c_long(number), raw, 0, cpu, -1, ctypes.c_ulong(_CLOEXEC))
    if handle < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(handle)
