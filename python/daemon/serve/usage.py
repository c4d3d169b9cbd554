# SPDX-License-Identifier: MIT
"""Answers who used how much: sums by program, unit, container, user or far end's name."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from daemon.history.details import Group, add
from daemon.serve.questions import StopIfGone
from daemon.serve.requests import Usage
from nlproto.overheard.names import is_of_resolver

__all__ = ["Sums", "usage"]

Sums = Callable[[int, StopIfGone], tuple[dict[Group, list[int]], dict[int, str]]]
"""(ns since 1970, stop) -> sums of what was last seen since then, and names of far ends."""
_FIELDS = ("flows", "packets_in", "bytes_in", "packets_out", "bytes_out")


def usage(
    request: Usage, uid: int | None, ask: Sums, name_of: Callable[[int], str], stop: StopIfGone
) -> dict[str, Any]:
    """Return the answer; `uid` as in Answers."""
    since_ns = max(0, time.time_ns() - int(request.since * 1e9))
    found, names = ask(since_ns, stop)

    def domain(number: int) -> str:
        if not number or (uid is not None and is_of_resolver(number)):
            return ""
        return name_of(number) or names.get(number, "")

    groups: dict[tuple[str, ...], list[int]] = {}
    for group, values in found.items():
        comm, owner, unit, container, container_name, pod, number = group
        if uid is not None and owner != uid:
            continue
        match request.by:
            case "process":
                key: tuple[str, ...] = (comm,)
            case "unit":
                key = (unit,)
            case "container":
                key = (container, container_name, pod)
            case "user":
                key = ("" if owner is None else str(owner),)
            case "domain":
                key = (domain(number),)
        add(groups, key, values)
    ordered = sorted(groups.items(), key=lambda one: (-one[1][2] - one[1][4], one[0]))
    names_of_key = ("name", "container_name", "pod")
    return {
        "by": request.by,
        "usage": [
            dict(zip(names_of_key, key, strict=False)) | dict(zip(_FIELDS, values, strict=True))
            for key, values in ordered[: request.limit]
        ],
        "total": len(ordered),
    }
