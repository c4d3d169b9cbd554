# SPDX-License-Identifier: MIT
"""Waits that end by condition. What they bear with follows the machine's speed, measured.

Seconds in tests are those of an idle machine of this project. A slow, emulated or crowded machine
takes a multiple. It is measured by what each test needs most: a new process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

__all__ = ["noting", "patient", "slowness", "stand_in", "there", "until"]

T = TypeVar("T")
_PROCESS = 0.02  # s that a Python without site takes to start and end on an idle machine
_POLL = 0.02  # s
_slowest = 0.0


def patient(seconds: float) -> float:
    """`seconds` of an idle machine in seconds of this one, as it is now or was at its slowest."""
    return seconds * (_slowest or slowness())


def until(condition: Callable[[], T | None], seconds: float = 30, what: str = "") -> T:
    """The first true value of `condition()`; the test fails when none comes in `seconds`.

    A machine that became slower meanwhile gets the time that it needs.
    """
    begun = time.monotonic()
    while not (met := condition()):
        if time.monotonic() - begun > patient(seconds):
            before = _slowest
            if slowness() <= 1.1 * before:
                waited = time.monotonic() - begun
                pytest.fail(f"{what or 'it'} did not happen in {waited:.0f} s", pytrace=True)
        time.sleep(_POLL)
    return met


def there(value: T | None) -> T:
    """`value`, which this test knows to be there."""
    assert value is not None
    return value


def noting(
    calls: list[Any], function: Callable[..., Any], what: Callable[[Any], Any] = lambda first: first
) -> Callable[..., Any]:
    """`function`, of whose calls `calls` gets `what` of the first argument."""

    def noted(first: Any, *others: Any, **named: Any) -> Any:
        calls.append(what(first))
        return function(first, *others, **named)

    return noted


def stand_in(part: object) -> Any:
    """`part` in the place of a whole that this test does not need."""
    return part


def slowness() -> float:
    """How many times longer than on an idle machine a process takes, measured now; the longest."""
    global _slowest
    begun = time.monotonic()
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    _slowest = max(_slowest, 1.0, (time.monotonic() - begun) / _PROCESS)
    return _slowest
