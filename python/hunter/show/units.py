# SPDX-License-Identifier: MIT
"""Amounts of bytes, of time and of things as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = ["UNITS", "amount", "counted", "duration"]

UNITS = ("bin-bytes", "bin-bits", "si-bytes", "si-bits")


def amount(value: float, units: str) -> str:
    """Return bytes as text in one of UNITS, 3 or 4 digits: "1.2 KiB", "12 Mb"."""
    if units.endswith("bits"):
        value *= 8
    unit = "b" if units.endswith("bits") else "B"
    step, letters = (1024.0, "KMGT") if units.startswith("bin") else (1000.0, "kMGT")
    if value < step:
        return f"{value:.0f} {unit}"
    for letter in letters:
        value /= step
        if value < step or letter == "T":
            break
    infix = "i" if units.startswith("bin") else ""
    return f"{value:.{1 if value < 99.95 else 0}f} {letter}{infix}{unit}"


def duration(seconds: float) -> str:
    """Return a round trip time in ms: "12 ms", "0.25 ms"."""
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2f} ms"


def counted(found: Mapping[str, int]) -> str:
    """Return text like "12 refused, 3 reset", the most first."""
    return ", ".join(f"{count:,} {name}" for name, count in Counter(found).most_common())
