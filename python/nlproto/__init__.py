# SPDX-License-Identifier: MIT
"""Which process owns this packet: the library under packet-hunter.

Modules are imported by name (`from nlproto.records import wire`); only what every program
needs is here.
"""

from importlib.metadata import PackageNotFoundError, version

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

try:
    __version__ = version("packet-hunter")
except PackageNotFoundError:  # run from a tree that was never installed
    __version__ = "0"
