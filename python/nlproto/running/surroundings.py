# SPDX-License-Identifier: MIT
"""What a program may find missing around it: descriptors, /proc, its current directory."""

from __future__ import annotations

import os

from nlproto.errors import Error
from nlproto.running import descriptors

__all__ = ["missing"]


def missing(error: OSError) -> Error | None:
    """Return what to say if `error` came from what both programs need, else None."""
    if descriptors.none_left(error):
        return descriptors.NoDescriptors.of(error)
    if not isinstance(error, FileNotFoundError):
        return None
    if not os.path.exists("/proc/self"):
        return Error("/proc is not there: mount -t proc proc /proc")
    try:
        os.getcwd()
    except FileNotFoundError:
        return Error("the current directory was removed: go to another (cd)")
    return None
