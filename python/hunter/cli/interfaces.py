# SPDX-License-Identifier: MIT
"""Network interfaces by name, for the filter, which takes indexes of this network namespace."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from nlproto import UsageError

__all__ = ["filter_text", "indexes"]


def indexes(names: Sequence[str]) -> dict[str, int]:
    """Return the indexes of those of `names` that exist."""
    there = {name: index for index, name in socket.if_nameindex()}
    return {name: there[name] for name in names if name in there}


def filter_text(names: Sequence[str] | None, all_there: bool = True) -> str:
    """Return the filter that -i NAME ... stands for now.

    Raises UsageError for a name that does not exist, unless that is allowed.
    """
    if not names or "any" in names:
        return ""
    found = indexes(names)
    missing = [name for name in names if name not in found]
    if missing and all_there:
        known = ", ".join(name for _, name in socket.if_nameindex())
        raise UsageError(f"no interface {missing[0]!r} here; there are: {known}")
    # an index has a meaning only in its own network namespace
    here = os.stat("/proc/self/ns/net").st_ino
    some = " or ".join(f"ifindex {index}" for index in found.values()) or "ifindex 4294967295"
    return f"netns {here} and ({some})"
