# SPDX-License-Identifier: MIT
"""Values on the command line. Each function reads one value, or raises ArgumentTypeError."""

from __future__ import annotations

import argparse
import re
import socket
from contextlib import suppress
from datetime import datetime, time, timedelta

__all__ = [
    *("buffer", "count", "interval", "moment", "pid", "port", "seconds", "size", "used_port"),
]


def count(text: str) -> int:
    """A whole number above 0."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,17}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def pid(text: str) -> int:
    """Return the id of a process."""
    found = count(text)
    if found >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is no process id")
    return found


def seconds(text: str) -> float:
    """A time span in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?", text, re.ASCII)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 30, 60s, 5m, 2h or 1d")
    scale = {"ms": 0.001, None: 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
    return float(found[1]) * scale


def moment(text: str) -> float:
    """Return seconds before now, of a time span, a time of day (the last one) or a date."""
    with suppress(argparse.ArgumentTypeError):
        return seconds(text)
    now = datetime.now().astimezone()
    try:
        if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text):
            clock = time.fromisoformat(text if text[2] == ":" else f"0{text}")
            then = _last(datetime.combine(now, clock), now)
            if then > now:
                then = _last(datetime.combine(now - timedelta(days=1), clock), now)
        else:
            then = _last(datetime.fromisoformat(text), now)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: write 5m, 2h, 14:30 or 2026-05-28T14:30"
        ) from None
    if then > now:
        raise argparse.ArgumentTypeError(f"{text!r} is yet to come")
    return (now - then).total_seconds()


def _last(local: datetime, now: datetime) -> datetime:
    """Return the last moment with this time. Some come twice, when clocks are set back."""
    second = local.replace(fold=1).astimezone()
    return second if second <= now else local.astimezone()


def interval(text: str) -> float:
    """Seconds between two looks."""
    found = seconds(text)
    if found < 0.1:
        raise argparse.ArgumentTypeError(f"{text!r} is too short: 100ms or more")
    return found


def size(text: str) -> int:
    """Return bytes: millions as with tcpdump's -C, or with k, m, g powers of 1024."""
    found = re.fullmatch(r"(\d+)([kmg])?b?", text.lower())
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 100 (million bytes) or 1g")
    scale = {None: 10**6, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[found[2]]
    return int(found[1]) * scale


def buffer(text: str) -> int:
    """Return bytes; the kernel pins this memory."""
    if not (text.isascii() and text.isdigit()) or not 256 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of KiB from 256 to 1048576")
    return int(text) << 10


def used_port(text: str) -> int:
    """Return a port that packets can have."""
    try:
        if found := port(text):
            return found
    except argparse.ArgumentTypeError:
        if re.fullmatch(r"[A-Za-z][\w.-]*", text):
            raise argparse.ArgumentTypeError(
                f"{text!r} is no port; for the name of a program write '--pname {text}'"
            ) from None
    raise argparse.ArgumentTypeError(f"{text!r} is no port")


def port(text: str) -> int:
    """Return a port, given as a number or as a service's name."""
    if text.isascii() and text.isdigit() and int(text) < 65536:
        return int(text)
    for proto in ("tcp", "udp"):
        try:
            return socket.getservbyname(text, proto)
        except (OSError, ValueError):  # bytes of a shell may be no text
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is no port")
