# SPDX-License-Identifier: MIT
"""/proc: socket tables, who a process is and what is known of it, bracketed by its start time.

Sources: man 5 proc, net/ipv4/tcp_ipv4.c (get_tcp4_sock), fs/proc/array.c (do_task_stat).
"""

import contextlib
import os
import pwd
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from ._host import ffi, lib
from .errors import UsageError
from .sockdiag import HOST_SOCKET
from .wire import dtype_of

__all__ = [
    "CMDLINE_MODES",
    "Identity",
    "Owner",
    "ProcessDetails",
    "container_of",
    "details",
    "held_sockets",
    "identity",
    "owner",
    "parent",
    "pids",
    "same_start",
    "socket_inodes",
    "tables",
    "unit_of",
]

PROC = Path("/proc")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
CMDLINE_MODES = ("full", "program", "off")
_HELD_AT_ONCE, _MAX_HELD = 4096, 1 << 21
HELD = dtype_of("host_held", ffi)
"""A process's descriptor of a socket: inode, pid, fd."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that no reuse of its pid can be taken for; `start_ticks` as in /proc/PID/stat."""

    tgid: int
    start_ticks: int

    @property
    def start_ns(self) -> int:
        """Start since boot in ns, as exact as ticks are (10 ms): compare with same_start()."""
        return self.start_ticks * TICK_NS


@dataclass(frozen=True, slots=True)
class Owner:
    """A process as a record names it; `uid` is the real one."""

    identity: Identity
    comm: bytes
    uid: int


@dataclass(frozen=True, slots=True)
class ProcessDetails:
    """What /proc tells of one living process; empty where it tells nothing (kernel threads)."""

    tgid: int
    start_ns: int
    comm: str
    exe: str
    cmdline: str
    ppid: int
    uid: int
    user: str
    cgroup: str
    unit: str
    container: str


def same_start(start_ns: int, ticks: int) -> bool:
    """Return whether a record's start_ns is the start time `ticks` of /proc/PID/stat."""
    return start_ns // TICK_NS == ticks


def pids(proc: Path = PROC) -> list[int]:
    """Return the thread-group ids of all visible processes, in the order of /proc.

    Nobody when no descriptor is left to look with.
    """
    try:
        return [int(name) for name in os.listdir(proc) if name.isdecimal()]
    except OSError:
        return []


def _read(path: str) -> bytes:
    """Return a small file of /proc in one read: it is asked for in great numbers."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(handle, 8192)
    finally:
        os.close(handle)


def _stat(pid: int, proc: Path) -> tuple[bytes, int] | None:
    """Return comm and start ticks; comm may hold blanks and parentheses of its own."""
    try:
        raw = _read(f"{proc}/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    head, _, tail = raw.rpartition(b")")
    fields = tail.split()
    if len(fields) < 20:
        return None
    return head.partition(b"(")[2], int(fields[19])


def identity(pid: int, proc: Path = PROC) -> Identity | None:
    """Return who `pid` is now, None when there is no such process."""
    found = _stat(pid, proc)
    return Identity(pid, found[1]) if found else None


def parent(pid: int, proc: Path = PROC) -> int:
    """Return the parent's pid; 0 when there is none, or no such process."""
    try:
        raw = _read(f"{proc}/{pid}/stat")
    except OSError:
        return 0
    fields = raw.rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def owner(pid: int, proc: Path = PROC) -> Owner | None:
    """Return `pid` as an owner: identity, comm and real uid; None when it is gone."""
    found = _stat(pid, proc)
    if found is None:
        return None
    try:
        status = _read(f"{proc}/{pid}/status")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    uid = re.search(rb"^Uid:\s+(\d+)", status, re.MULTILINE)
    return Owner(Identity(pid, found[1]), found[0], int(uid[1]) if uid else 0)


def held_sockets(some: Sequence[int], proc: Path = PROC) -> tuple[np.ndarray, bool]:
    """Return which sockets the processes `some` hold (HELD), and whether all could be asked.

    One call asks them all, without Python's lock: the answer is a matter of milliseconds.
    """
    try:
        directory = os.open(proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return np.zeros(0, HELD), False
    try:
        pids = np.array(some, np.uint32)
        refused = ffi.new("uint32_t *")
        room = _HELD_AT_ONCE
        while True:
            found = np.zeros(room, HELD)
            read = lib.host_held_sockets(
                directory,
                ffi.from_buffer("uint32_t[]", pids),
                len(pids),
                ffi.from_buffer("struct host_held[]", found),
                room,
                refused,
            )
            if read < room or room >= _MAX_HELD:
                return found[:read], not refused[0]
            room *= 8
    finally:
        os.close(directory)


def socket_inodes(pid: int, proc: Path = PROC) -> dict[int, int] | None:
    """Return {inode: descriptor} of the sockets that `pid` holds.

    None when it may not be asked (another user's); empty when it is gone.
    """
    held, asked = held_sockets([pid], proc)
    if not asked:
        return None
    return dict(zip(held["inode"].tolist(), held["fd"].tolist(), strict=True))


def tables(net: Path = PROC / "self" / "net") -> np.ndarray:
    """Return the sockets (HOST_SOCKET, cookie 0) in {tcp,udp}{,6} of a /proc/PID/net directory.

    A table that this kernel lacks (IPv6 switched off) is left out.
    """
    rows: list[tuple[object, ...]] = []
    for name, family, proto in (
        ("tcp", socket.AF_INET, socket.IPPROTO_TCP),
        ("tcp6", socket.AF_INET6, socket.IPPROTO_TCP),
        ("udp", socket.AF_INET, socket.IPPROTO_UDP),
        ("udp6", socket.AF_INET6, socket.IPPROTO_UDP),
    ):
        with contextlib.suppress(OSError), open(net / name, encoding="ascii") as lines:
            next(lines, None)
            for line in lines:
                fields = line.split()
                if len(fields) < 10:
                    continue
                saddr, sport = _endpoint(fields[1])
                daddr, dport = _endpoint(fields[2])
                state, uid, inode = int(fields[3], 16), int(fields[7]), int(fields[9])
                rows.append((0, inode, uid, 0, sport, dport, family, proto, state, 0, saddr, daddr))
    found = np.zeros(len(rows), HOST_SOCKET)
    for index, row in enumerate(rows):
        found[index] = row
    return found


def _endpoint(field: str) -> tuple[list[int], int]:
    """Return the address (16 octets) and port of "0100007F:0016": words in the host's order."""
    words, port = field.split(":")
    octets = b"".join(
        int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8)
    )
    return list(octets.ljust(16, b"\0")), int(port, 16)


def details(
    pid: int, start_ns: int, cmdline: str = "program", proc: Path = PROC
) -> ProcessDetails | None:
    """Return what /proc tells of the process (pid, start_ns); None when it is gone or reused.

    `cmdline`: "full" with all arguments (they may hold secrets), "program" the first word only,
    "off" nothing. Raises UsageError for another word.
    """
    if cmdline not in CMDLINE_MODES:
        raise UsageError(f"cmdline '{cmdline}': it is one of {', '.join(CMDLINE_MODES)}")
    before = identity(pid, proc)
    if before is None or not same_start(start_ns, before.start_ticks):
        return None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            comm, ppid, uid = process.name(), process.ppid(), process.uids().real
        exe = arguments = ""
        with contextlib.suppress(psutil.AccessDenied):
            exe = process.exe()
        if cmdline != "off":
            with contextlib.suppress(psutil.AccessDenied):
                words = process.cmdline()
                arguments = " ".join(words if cmdline == "full" else words[:1])
    except (psutil.Error, OSError):
        return None
    cgroup = ""
    with contextlib.suppress(OSError):
        cgroup = _cgroup((proc / str(pid) / "cgroup").read_text("utf-8", "backslashreplace"))
    if identity(pid, proc) != before:
        return None
    return ProcessDetails(
        tgid=pid,
        start_ns=start_ns,
        comm=_printable(comm),
        exe=_printable(exe),
        cmdline=_printable(arguments),
        ppid=ppid,
        uid=uid,
        user=_user(uid),
        cgroup=cgroup,
        unit=unit_of(cgroup),
        container=container_of(cgroup),
    )


def _printable(name: str) -> str:
    """psutil keeps bytes that are no UTF-8 as surrogates, which JSON and SQLite refuse."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _cgroup(text: str) -> str:
    """Return the v2 path of /proc/PID/cgroup, on v1 that of systemd's hierarchy or the longest."""
    paths = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        paths[controllers] = path
    unified = paths.get("", "")
    if len(unified) > 1:
        return unified
    named = paths.get("name=systemd", "")
    return named if len(named) > 1 else max(paths.values(), key=len, default="")


_UNIT = re.compile(r"[^/]+\.(?:service|scope|socket|mount|swap)")


def unit_of(cgroup: str) -> str:
    """Return the innermost systemd unit on a cgroup path, "" when there is none."""
    for part in reversed(cgroup.split("/")):
        if _UNIT.fullmatch(part):
            return part
    return ""


_ID = r"(?P<id>[0-9a-f]{64})"
_CONTAINERS = (
    ("docker", re.compile(rf"/docker[-/]{_ID}(?:\.scope)?(?:/|$)")),
    ("podman", re.compile(rf"/libpod(?:_parent/libpod)?-{_ID}(?:\.scope)?(?:/|$)")),
    ("containerd", re.compile(rf"cri-containerd[-:]{_ID}(?:\.scope)?(?:/|$)")),
    ("crio", re.compile(rf"/crio-{_ID}(?:\.scope)?(?:/|$)")),
    ("lxc", re.compile(r"/lxc(?:\.payload)?[./](?P<id>[^/]+)")),
    ("nspawn", re.compile(r"/systemd-nspawn@(?P<id>[^/]+)\.service(?:/|$)")),
    ("machine", re.compile(r"/machine-(?P<id>[^/]+)\.scope(?:/|$)")),
    ("kubernetes", re.compile(rf"/kubepods.*/{_ID}(?:/|$)")),
    ("container", re.compile(rf"[-/]{_ID}(?:\.scope)?(?:/|$)")),
)


def container_of(cgroup: str) -> str:
    """Return "runtime:id" of the container on a cgroup path ("docker:4f1c0d2e9a3b"), "" if none.

    Hexadecimal ids are cut to the 12 digits that people type; lxc and nspawn have names.
    """
    for runtime, pattern in _CONTAINERS:
        found = pattern.search(cgroup)
        if found:
            name = found["id"]
            return f"{runtime}:{name[:12] if re.fullmatch('[0-9a-f]{64}', name) else name}"
    return ""
