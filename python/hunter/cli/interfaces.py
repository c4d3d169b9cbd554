# SPDX-License-Identifier: MIT
"""Network interfaces by name, as the filter takes them: by index, in this network namespace."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from nlproto import UsageError

__all__ = ["filter_text", "indexes"]


def indexes(names: Sequence[str]) -> dict[str, int]:
    """Return the indexes of those of `names` that are there."""
    there = {name: index for index, name in socket.if_nameindex()}
    return {name: there[name] for name in names if name in there}


def filter_text(names: Sequence[str] | None, all_there: bool = True) -> str:
    """Return the filter that -i NAME ... amounts to now.

    Raises UsageError for a name that is not there, unless that is not asked for.
    """
    if not names or "any" in names:
        return ""
    found = indexes(names)
    missing = [name for name in names if name not in found]
    if missing and all_there:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise UsageError(f"no interface {missing[0]!r} here; there are: {known}")
    # an index means something in its own network namespace only
    here = os.stat("/proc/self/ns/net").st_ino
    some = " or ".join(f"ifindex {index}" for index in found.values()) or "ifindex 4294967295"
    return f"netns {here} and ({some})"
