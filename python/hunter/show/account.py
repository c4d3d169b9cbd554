# SPDX-License-Identifier: MIT
"""The closing account: what was seen, what came through, what was named, what was lost where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlproto.pipeline.pipeline import NamedBatch
from nlproto.records import wire

__all__ = ["ShownAccount"]


class ShownAccount:
    """Counts what this program showed or saved."""

    def __init__(self) -> None:
        self.records = 0
        self._by_how = np.zeros(256, np.int64)
        self._others = np.zeros(256, np.int64)

    def add(self, batch: NamedBatch) -> None:
        """Count the records of `batch`."""
        self.records += len(batch.records)
        self._by_how += np.bincount(batch.records["how"], minlength=256)

    def pass_over(self, records: np.ndarray) -> None:
        """Count RECORDs that are not of the command, and so not shown."""
        self._others += np.bincount(records["how"], minlength=256)

    @property
    def named(self) -> int:
        return _named(self._by_how)

    @property
    def unnamed(self) -> dict[str, int]:
        """Records without an owner, by reason."""
        return _unnamed(self._by_how)

    def lines(
        self,
        account: Mapping[str, Any] | None,
        lost: int,
        done: str = "shown",
        missing: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Return the account for people. `account` is of the source, `lost` of its last step.

        `done`: what became of the packets; `missing`: how many of them are not in which file.
        """
        lines = []
        if account is not None:
            gone = {place: n for place, n in account["lost"].items() if n}
            lines.append(
                f"{account['packets']} packets seen, {account['skipped']} of them of no interest "
                "(later fragments, other protocols)"
                if account["skipped"]
                else f"{account['packets']} packets seen"
            )
            lines.append(
                f"{account['records']} records = {account['delivered']} delivered"
                f" + {sum(gone.values())} lost{_detail(gone)}"
            )
            if account.get("gap_ms"):
                away = account["gap_ms"] / 1000
                lines.append(f"nothing was recorded for {away:.1f} s: lost, not counted")
        share = f" ({100 * self.named / self.records:.1f} %)" if self.records else ""
        lines.append(
            f"{self.records} {done} = {self.named} named{share}"
            f" + {self.records - self.named} unnamed{_detail(self.unnamed)}"
        )
        for name, count in (missing or {}).items():
            if count:
                lines.append(f"{count} of {self.records} {done} are not in {name}")
        others = int(self._others.sum())
        if others:
            named = _named(self._others)
            lines.append(
                f"{others} not of the command = {named} of other processes + {others - named}"
                f" unnamed{_detail(_unnamed(self._others))}; --all shows them"
            )
        if lost:
            lines.append(f"{lost} lost on the way to this program, which read too slowly")
        return lines


def _named(by_how: np.ndarray) -> int:
    return int(by_how[1 : wire.lib.SNIFFER_HOW_REASONS].sum())


def _unnamed(by_how: np.ndarray) -> dict[str, int]:
    counts = enumerate(by_how.tolist())
    return {wire.HOW_NAMES[how]: n for how, n in counts if n and not wire.is_named(how)}


def _detail(counts: Mapping[str, int]) -> str:
    parts = [f"{name.replace('_', ' ')} {n}" for name, n in counts.items()]
    return f" ({', '.join(parts)})" if parts else ""
