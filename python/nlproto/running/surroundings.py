# SPDX-License-Identifier: MIT
"""What is wrong around a program: no descriptors, /proc or directory, others who may write."""

from __future__ import annotations

import os
import stat

from nlproto.errors import Error
from nlproto.running import descriptors

__all__ = ["is_loose", "missing"]

_FIRST_USER = 1000  # UID_MIN of login.defs(5)


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


def is_loose(place: int | str | os.PathLike[str]) -> bool:
    """Return whether a user of this machine can put files into the directory. Raises OSError.

    Sticky or not: SQLite believes a journal that lies beside its database. Users below 1000 are the
    system's, and the user behind sudo is root.
    """
    found = os.stat(place)
    users = {0, os.geteuid(), int(os.environ.get("SUDO_UID") or 0)}
    groups = {0, os.getegid(), int(os.environ.get("SUDO_GID") or 0)}
    return bool(
        found.st_mode & stat.S_IWOTH
        or (found.st_uid not in users and found.st_uid >= _FIRST_USER)
        or (found.st_mode & stat.S_IWGRP and found.st_gid not in groups)
    )
