# SPDX-License-Identifier: MIT
"""The closing account: what was seen, delivered, named and lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nlproto.pipeline import figures
from nlproto.records.batch import NamedBatch

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
        """Count RECORDs that are not the command's, and so are not shown."""
        self._others += np.bincount(records["how"], minlength=256)

    @property
    def named(self) -> int:
        return figures.named(self._by_how)

    @property
    def unnamed(self) -> dict[str, int]:
        """Records without an owner, by reason."""
        return figures.unnamed(self._by_how)

    def lines(
        self,
        account: Mapping[str, Any] | None,
        lost: int,
        done: str = "shown",
        missing: Mapping[str, int] | None = None,
    ) -> list[str]:
        """Return the account for people. `account` is the source's, `lost` that of the last step.

        `done`: what became of the packets; `missing`: how many of them are not in which file.
        """
        lines = []
        if account is not None:
            lines.append(
                f"{account['packets']} packets seen, {account['skipped']} of them of no interest "
                "(later fragments, other protocols)"
                if account["skipped"]
                else f"{account['packets']} packets seen"
            )
            lines.append(
                figures.delivery(account["records"], account["delivered"], account["lost"])
            )
            if account.get("gap_ms"):
                lines.append(figures.gap(account["gap_ms"]))
        lines.append(figures.naming(self.records, done, self.unnamed))
        for name, count in (missing or {}).items():
            if count:
                lines.append(f"{count} of {self.records} {done} are not in {name}")
        others = int(self._others.sum())
        if others:
            told = figures.naming(others, "not of the command", figures.unnamed(self._others))
            lines.append(f"{told}; --all shows them")
        if lost:
            lines.append(f"{lost} lost on the way to this program, which read too slowly")
        return lines
