# SPDX-License-Identifier: MIT
"""An account in words, for the daemon's log, the hunter's last lines, and stats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nlproto.records.wire import HOW_NAMES, are_named, is_named

__all__ = ["delivery", "gap", "named", "naming", "reasons", "unnamed"]


def named(by_how: np.ndarray) -> int:
    """Return how many records have a process. `by_how` counts records, shape (256,)."""
    return int(by_how[are_named(np.arange(len(by_how)))].sum())


def unnamed(by_how: np.ndarray) -> dict[str, int]:
    """Return how many records have none, by reason. `by_how` has shape (256,)."""
    counts = enumerate(by_how.tolist())
    return {HOW_NAMES[how]: n for how, n in counts if n and not is_named(how)}


def reasons(counts: Mapping[str, int], number: str = "d") -> str:
    """Return text like "no socket 3, predates 1". `number` formats numbers."""
    return ", ".join(f"{name.replace('_', ' ')} {n:{number}}" for name, n in counts.items() if n)


def _detail(counts: Mapping[str, int]) -> str:
    found = reasons(counts)
    return f" ({found})" if found else ""


def delivery(records: int, delivered: int, lost: Mapping[str, int]) -> str:
    """Return what became of the records. `lost` is by place."""
    gone = sum(lost.values())
    return f"{records} records = {delivered} delivered + {gone} lost{_detail(lost)}"


def naming(records: int, what: str, by_reason: Mapping[str, int]) -> str:
    """Return how many of `records` are named, and why the others are not."""
    without = sum(by_reason.values())
    share = f" ({100 * (records - without) / records:.1f} %)" if records else ""
    return (
        f"{records} {what} = {records - without} named{share}"
        f" + {without} unnamed{_detail(by_reason)}"
    )


def gap(gap_ms: int) -> str:
    """Return how long there was no engine. No other figure covers that time."""
    return f"nothing was recorded for {gap_ms / 1000:.1f} s: lost, not counted"
