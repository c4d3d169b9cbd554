# SPDX-License-Identifier: MIT
"""The sum of all bounds on memory, checked against the service's limit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from daemon.history.memory import ROW_BYTES as HISTORY_ROW
from daemon.serve.connection import MAX_BUFFERED, WRITE_HIGH
from daemon.serve.session import MAX_ANSWER
from daemon.system.config import Config
from nlproto.errors import UsageError

__all__ = ["ANSWER_BYTES", "STREAM_BYTES", "Bounds", "bounds_of", "memory_limit"]

ANSWER_BYTES = 64 << 20
"""Room for unread answers: the same for users who see everything and for all others."""
STREAM_BYTES = 32 << 20
"""Room for records that wait for filters, and as much for the event loop; on each side."""

_PROGRAM = 192 << 20
"""Python, NumPy, libraries and a batch while it is named: measured, and a third more."""
_ENCODED = 32 << 20  # details of processes, encoded
_SNAPS = 96 << 20  # first bytes of packets, while somebody asks for them
_DOMAINS = 96 << 20  # names, who asked for them, flows that have one, streams being joined
_NAT = 48 << 20  # translated connections, each under all its pairs of ends
_CLIENT = WRITE_HIGH + (320 << 10) + MAX_BUFFERED + (16 << 10) + (256 << 10)
"""One connection: a frame being sent, requests read and parsed, processes that it knows."""
_PROCESS = 2048  # with its place in two tables
_PORT = 350
_KEPT_FREE = 0.1
_LEAST_QUEUE = 64 << 10


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes, the sum of all parts."""

    limit: int | None
    """Limit of the control group; None: no limit."""
    parts: dict[str, int]
    """Bytes of each part, without the clients' queues."""
    client_queues: int
    """Bytes of all clients' queues together; half of it is for users who see everything."""

    def as_dict(self) -> dict[str, Any]:
        together = sum(self.parts.values()) + self.client_queues
        bounds = self.parts | {"client_queues": self.client_queues}
        return {"limit": self.limit, "bounds": bounds, "together": together}


def bounds_of(config: Config, limit: int | None = None) -> Bounds:
    """Return what is left of `limit` bytes for the clients' queues.

    Raises UsageError if that is not enough.
    """
    parts = {
        "program": _PROGRAM,
        "queue": config.queue_size,
        "streams": 4 * STREAM_BYTES + _ENCODED + _SNAPS,
        "answers": 2 * ANSWER_BYTES + 2 * sum(MAX_ANSWER.values()),
        "connections": config.max_clients * _CLIENT,
        "history": config.history_flows * HISTORY_ROW,
        "processes": config.max_processes * _PROCESS,
        "ports": config.max_ports * _PORT,
        "nat": _NAT,
        "domains": 0 if config.domains == "off" else _DOMAINS,
    }
    wanted = config.max_clients * config.client_queue_size
    if limit is None:
        return Bounds(None, parts, wanted)
    left = int(limit * (1 - _KEPT_FREE)) - sum(parts.values())
    least = config.max_clients * _LEAST_QUEUE
    if left < least:
        greatest = sorted(parts, key=lambda name: -parts[name])[:3]
        shown = ", ".join(f"{name} {parts[name] >> 20} MiB" for name in greatest)
        raise UsageError(
            f"the configuration's bounds need {(least - left) >> 20} MiB more than the memory limit"
            f" of {limit >> 20} MiB ({shown}, ...): lower them, or raise MemoryMax of the service"
        )
    return Bounds(limit, parts, min(wanted, left))


def memory_limit(root: str = "/") -> int | None:
    """Return the lowest limit in bytes of this process's control groups; None: no limit."""
    limits = []
    for folder, name in _groups(root):
        while True:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    raw = file.read(64).strip()
            except OSError:
                raw = b""
            if raw.isdigit() and int(raw) < 1 << 60:  # version 1 has a great number for "none"
                limits.append(int(raw))
            above = os.path.dirname(folder)
            if above == folder or not above.startswith(os.path.join(root, "sys/fs/cgroup")):
                break
            folder = above
    return min(limits, default=None)


def _groups(root: str) -> list[tuple[str, str]]:
    """Yield (directory, file with the limit) of the memory controller, version 2 and 1."""
    try:
        with open(os.path.join(root, "proc/self/cgroup"), "rb") as file:
            lines = file.read(1 << 20).split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(b":")
        controllers, _, path = rest.partition(b":")
        where = os.fsdecode(path).lstrip("/")
        if number == b"0" and not controllers:
            found.append((os.path.join(root, "sys/fs/cgroup", where), "memory.max"))
        elif b"memory" in controllers.split(b","):
            place = os.path.join(root, "sys/fs/cgroup/memory", where)
            found.append((place, "memory.limit_in_bytes"))
    return [(folder.rstrip("/"), name) for folder, name in found]
