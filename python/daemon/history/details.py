# SPDX-License-Identifier: MIT
"""A process as the history's file has it."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from nlproto.tables.processes import Process

__all__ = ["encoded", "space"]

_DETAILS = 16384
"""Bytes of one process in the file; longer strings in it are cut."""


def encoded(process: Process) -> bytes:
    """A process as JSON of at most _DETAILS bytes."""
    raw = msgspec.json.encode(process)
    room = _DETAILS // 4
    while len(raw) > _DETAILS:
        room //= 2
        short = {name: getattr(process, name)[:room] for name in _STRINGS}
        raw = msgspec.json.encode(replace(process, **short))
    return raw


_STRINGS = (
    *("comm", "user", "exe", "cmdline", "cgroup", "unit", "container"),
    *("container_name", "image", "pod"),
)


def space(size: int) -> int:
    """Bytes that so many of details take in the file: what is long goes to pages of its own."""
    return size + 100 if size < 900 else 600 + (size // 4092 + 1) * 4096
