# SPDX-License-Identifier: MIT
"""Which process owns this packet: the library under packet-hunter.

Modules are imported by name (`from nlproto.records import wire`); only what every program
needs is here.
"""

from __future__ import annotations

import os

from nlproto.errors import Error, NoDaemon, NoModule, NoPrivilege, UsageError, VersionMismatch

__all__ = [
    "Error",
    "NoDaemon",
    "NoModule",
    "NoPrivilege",
    "UsageError",
    "VersionMismatch",
    "__version__",
]


if "OPENBLAS_NUM_THREADS" not in os.environ:
    # NumPy's library starts a thread for each processor; nothing here multiplies matrices.
    # os.environ does not get it, so commands that are given os.environ do not either.
    os.putenv("OPENBLAS_NUM_THREADS", "1")


def __getattr__(name: str) -> str:
    """Look `__version__` up only when it is used: that takes 50 ms and 4 MB."""
    if name != "__version__":
        raise AttributeError(f"module 'nlproto' has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("packet-hunter")
    except PackageNotFoundError:  # run from a tree that was never installed
        found = "0"
    globals()[name] = found
    return found
