# SPDX-License-Identifier: MIT
"""What the kernel tells of a process that uses sockets, and everything that an engine yields."""

from __future__ import annotations

from dataclasses import dataclass

from nlproto.records.wire import (
    CUT,
    PROCESS,
    Batch,
    FirstBytesBatch,
    FlowBatch,
    bounded,
    decode_struct,
    ffi,
    lib,
    text,
)

__all__ = ["Event", "ProcessEvent", "command_line", "decode_process"]


@dataclass(frozen=True, slots=True)
class ProcessEvent:
    """One struct sniffer_process; `event` is of enum sniffer_event, times in ns."""

    time_ns: int
    start_ns: int
    cgroup_id: int
    tgid: int
    ppid: int
    uid: int
    pidns: int
    ns_tgid: int
    event: int
    comm: str
    exe: str
    cgroup: bytes = b""
    """Path from the root of cgroup v2; empty if it is the root, too long, or not reported."""
    parents: tuple[tuple[int, str], ...] = ()
    """(tgid, comm) of the nearest SNIFFER_PARENTS ones at its start, the nearest first."""
    args: bytes = b""
    """Its command line, arguments with a NUL after each; empty: not reported."""
    args_len: int = 0
    """Bytes of the whole command line; `args` may be the beginning only."""


Event = Batch | FlowBatch | ProcessEvent | FirstBytesBatch
"""Everything that an engine yields."""

_SIZES = [int(ffi.offsetof("struct sniffer_process", name)) for name in ("start", "cgroup")]
"""Of messages that end before these."""


def decode_process(buf: bytes | memoryview) -> ProcessEvent:
    """Return the process event in `buf` (attribute SNIFFER_A_PROCESS). Raises Error if too short.

    An older module's event ends before the cgroup. Most events end before the start.
    """
    if len(buf) < PROCESS.itemsize:
        for size in _SIZES:
            if len(buf) >= size:
                buf = bytes(buf[:size]).ljust(PROCESS.itemsize, b"\0")
    one = decode_struct(buf, PROCESS)
    start = one["start"]
    parents = zip(start["parents"]["tgid"].tolist(), start["parents"]["comm"].tolist(), strict=True)
    args_len = int(start["args_len"])
    return ProcessEvent(
        time_ns=int(one["time_ns"]),
        start_ns=int(one["start_ns"]),
        cgroup_id=int(one["cgroup_id"]),
        tgid=int(one["tgid"]),
        ppid=int(one["ppid"]),
        uid=int(one["uid"]),
        pidns=int(one["pidns"]),
        ns_tgid=int(one["ns_tgid"]),
        event=int(one["event"]),
        comm=text(one["comm"]),
        exe=text(one["exe"]).removesuffix(" (deleted)"),
        cgroup=bytes(one["cgroup"]).partition(b"\0")[0],
        parents=tuple((tgid, text(comm)) for tgid, comm in parents if tgid),
        args=bytes(start["args"]).ljust(min(args_len, lib.SNIFFER_ARGS_LEN), b"\0"),
        args_len=args_len,
    )


def command_line(raw: bytes, mode: str, size: int = 0) -> str:
    """Return a command line as text; `mode`: full, program or off.

    One that its process rewrote ("nginx: worker") has no NUL inside. `size`: bytes of all, of which
    `raw` may be the beginning; a text that is not whole ends with CUT.
    """
    words = raw.rstrip(b"\0").split(b"\0")
    if len(words) == 1:
        words = words[0].split(b" ")
    if mode == "off":
        return ""
    line = bounded(b" ".join(words) if mode == "full" else words[0])
    return line + CUT if size > len(raw) and (mode == "full" or len(words) == 1) else line
