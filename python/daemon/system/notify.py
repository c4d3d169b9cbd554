# SPDX-License-Identifier: MIT
"""systemd's notification socket (sd_notify(3), protocol of man page, section "Notes")."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

__all__ = ["Notifier"]


class Notifier:
    """Reports our state to the service manager. Does nothing if `environment` names no socket."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environment.get("WATCHDOG_USEC", "") if watched else ""
        self.watchdog: float | None = int(usec) / 1e6 if usec.isdecimal() else None
        """Seconds after which the manager gives us up; None: it does not watch."""

    def ready(self, status: str) -> None:
        self._send(READY="1", STATUS=status)

    def reloading(self) -> None:
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send(RELOADING="1", MONOTONIC_USEC=str(usec))

    def stopping(self) -> None:
        self._send(STOPPING="1")

    def alive(self) -> None:
        self._send(WATCHDOG="1")

    def _send(self, **fields: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        message = "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.sendto(message.encode(), address)
        except OSError:
            pass  # a manager that does not listen is no reason to stop
