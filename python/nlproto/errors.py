# SPDX-License-Identifier: MIT
"""Exceptions. Each message is one line and says what to do next."""

from __future__ import annotations

__all__ = [
    "DaemonBusy",
    "Error",
    "NoDaemon",
    "NoModule",
    "NoPrivilege",
    "UsageError",
    "VersionMismatch",
]


class Error(Exception):
    """Base of all exceptions that nlproto raises on purpose."""

    exit_code = 1
    """Exit status of a program that ends with it."""


class UsageError(Error):
    """The caller asked for something impossible."""

    exit_code = 2


class NoModule(Error):
    """sniffer.ko is not loaded."""


class NoDaemon(Error):
    """No daemon serves the socket."""


class DaemonBusy(NoDaemon):
    """A daemon is there, but took no more clients."""


class NoPrivilege(Error):
    """The kernel or the daemon refused this user."""


class VersionMismatch(Error):
    """The other side speaks another version of the protocol."""
