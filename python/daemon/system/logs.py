# SPDX-License-Identifier: MIT
"""Where the daemon's log goes: the journal with fields, syslog, or stderr."""

from __future__ import annotations

import logging
import logging.handlers
import os
import socket
import struct
import sys
from collections.abc import Mapping

from nlproto.running.standard import OneLine

__all__ = ["JOURNAL", "JournalHandler", "set_up"]

JOURNAL = "/run/systemd/journal/socket"
_SYSLOG = "/dev/log"
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}
_NAME = "packet-hunterd"


class JournalHandler(logging.Handler):
    """Writes to the journal's native socket (systemd.io/JOURNAL_NATIVE_PROTOCOL).

    `extra={"fields": {"RECORDS": 5}}` of a log call become fields of the entry.
    """

    def __init__(self, path: str = JOURNAL) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.connect(path)

    def emit(self, record: logging.LogRecord) -> None:
        fields = {
            "MESSAGE": self.format(record),
            "PRIORITY": str(_PRIORITY.get(record.levelno, 2)),
            "SYSLOG_IDENTIFIER": _NAME,
            "LOGGER": record.name,
            "THREAD_NAME": record.threadName or "",
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName,
        }
        for name, value in getattr(record, "fields", {}).items():
            fields[f"PACKET_HUNTER_{name}"] = str(value)
        try:
            self._socket.send(b"".join(_field(name, value) for name, value in fields.items()))
        except OSError:
            self.handleError(record)

    def close(self) -> None:
        self._socket.close()
        super().close()


def _field(name: str, value: str) -> bytes:
    raw = value.encode("utf-8", "backslashreplace")
    if b"\n" not in raw:
        return name.encode() + b"=" + raw + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(raw)) + raw + b"\n"


def set_up(where: str, level: str, environment: Mapping[str, str], foreground: bool) -> None:
    """Send the root logger's records to `where`: auto, journal, syslog or stderr.

    auto: the journal if systemd connected our stderr to it (JOURNAL_STREAM has that stream's device
    and inode), else stderr. A destination that does not exist falls back to stderr.
    """
    if foreground:
        where = "stderr"
    if where == "auto":
        where = "journal" if _stderr_is_journal(environment) else "stderr"
    handler: logging.Handler
    try:
        if where == "journal":
            handler = JournalHandler()
        elif where == "syslog":
            os.stat(_SYSLOG)  # the handler would complain at every record
            handler = logging.handlers.SysLogHandler(
                _SYSLOG, logging.handlers.SysLogHandler.LOG_DAEMON
            )
            handler.ident = f"{_NAME}[{os.getpid()}]: "
        else:
            handler = logging.StreamHandler(sys.stderr)
    except OSError as error:
        print(f"{_NAME}: no {where} here ({error}); logging to stderr", file=sys.stderr)
        handler = logging.StreamHandler(sys.stderr)
    stream = isinstance(handler, logging.StreamHandler)
    # the journal and syslog add a time
    form = "packet-hunterd: %(message)s" if stream else "%(message)s"
    if stream and not _stderr_is_journal(environment):
        form = f"%(asctime)s {form}"
    handler.setFormatter(OneLine(form, "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())


def _stderr_is_journal(environment: Mapping[str, str]) -> bool:
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    if not device.isdecimal() or not inode.isdecimal():
        return False
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (status.st_dev, status.st_ino) == (int(device), int(inode))
