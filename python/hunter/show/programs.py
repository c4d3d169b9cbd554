# SPDX-License-Identifier: MIT
"""Names of processes: one row for many processes of a program, and what they run in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

from hunter.show.text import plain

__all__ = ["label", "place", "programs"]

_FEW = 4
"""Up to so many processes of a program have rows of their own."""

K = TypeVar("K", bound=Hashable)


def place(container: str, name: str, pod: str, unit: str) -> str:
    """Return what a process runs in, in people's words. It may contain any character.

    "pod default/web-0/app", "docker:web", "docker:4f1c0d2e9a3b" without a name, else the unit.
    """
    if pod:
        return f"pod {pod}/{name}" if name else f"pod {pod}"
    if container and name:
        return f"{container.partition(':')[0]}:{name}"
    return container or unit


def programs(known: Mapping[K, tuple[str, str]]) -> dict[K, tuple[str, str, K | None]]:
    """Return the row of each process of `known` (comm, executable or "").

    A row is (comm, executable, process), or (comm, executable, None) for a program with many
    processes. If a process ended before its executable was read, it gets that of its namesakes,
    if they agree.
    """
    paths: defaultdict[str, set[str]] = defaultdict(set)
    for comm, exe in known.values():
        if exe:
            paths[comm].add(exe)
    full = {
        key: (comm, exe if exe or len(paths[comm]) != 1 else next(iter(paths[comm])))
        for key, (comm, exe) in known.items()
    }
    many = Counter(full.values())
    return {key: (*one, key if many[one] <= _FEW else None) for key, one in full.items()}


def label(comm: str, pids: Collection[int]) -> str:
    """Return "curl.123" of one process, "curl (64 processes)" of more."""
    if len(pids) == 1:
        return f"{plain(comm)}.{next(iter(pids))}"
    return f"{plain(comm)} ({len(pids):,} processes)"
