# SPDX-License-Identifier: MIT
"""Captures as JSON lines with the names of the Elastic Common Schema (ECS)."""

from __future__ import annotations

import json

from hunter.formats.ecs import document
from hunter.save.capturefile import CaptureFile
from hunter.show.columns import COLUMNS, Columns, cells

__all__ = ["EcsSaver"]

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


class EcsSaver:
    """One event a line; what is not known is left out."""

    def __init__(self, file: CaptureFile) -> None:
        self._file = file

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        values = cells(table)
        rows = zip(*(values[name] for name in COLUMNS), strict=True)
        self._file.write_rows(
            f"{_encode(document(dict(zip(COLUMNS, row, strict=True))))}\n".encode() for row in rows
        )

    @property
    def rows(self) -> int:
        return self._file.rows

    def close(self) -> None:
        self._file.close()
