# SPDX-License-Identifier: MIT
"""Processes of one program as one row: short-lived ones would fill a table with their pids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

from hunter.text import plain

__all__ = ["label", "programs"]

K = TypeVar("K", bound=Hashable)


def programs(known: Mapping[K, tuple[str, str]]) -> dict[K, tuple[str, str]]:
    """Return (comm, executable) of each process, of `known` (comm, executable or "").

    A process that ended before its executable was read is of the one that all others of its
    name have, if they agree.
    """
    paths: defaultdict[str, set[str]] = defaultdict(set)
    for comm, exe in known.values():
        if exe:
            paths[comm].add(exe)
    return {
        key: (comm, exe if exe or len(paths[comm]) != 1 else next(iter(paths[comm])))
        for key, (comm, exe) in known.items()
    }


def label(comm: str, pids: Collection[int]) -> str:
    """Return "curl.123" of one process, "curl (64 processes)" of more."""
    if len(pids) == 1:
        return f"{plain(comm)}.{next(iter(pids))}"
    return f"{plain(comm)} ({len(pids):,} processes)"
