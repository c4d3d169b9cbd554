# SPDX-License-Identifier: MIT
"""Captures as text, one line for each packet: CSV, JSON, or JSON with the names of ECS."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from hunter.formats.ecs import document
from hunter.save.capturefile import CaptureFile
from hunter.show.columns import COLUMNS, PEOPLE, TEXTS, Columns, cells
from hunter.show.text import cell

__all__ = ["LINES", "LineFormat", "LineSaver"]

_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


class LineFormat(NamedTuple):
    """Turns rows into text."""

    lines: Callable[[Columns], Iterator[str]]
    """Return a line for each row, without its end."""
    heading: str = ""


class LineSaver:
    """Writes each row as one line."""

    def __init__(self, file: CaptureFile, form: LineFormat) -> None:
        self._file = file
        self._form = form
        if form.heading:
            file.write(f"{form.heading}\n".encode())

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        self._file.write_rows(f"{line}\n".encode() for line in self._form.lines(table))

    @property
    def rows(self) -> int:
        """How many whole rows are in the file."""
        return self._file.rows

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _rows(values: Mapping[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*(values[name] for name in COLUMNS), strict=True)


def _csv(table: Columns) -> Iterator[str]:
    """RFC 4180, but lines end in one LF, as csvkit, awk and cut expect. Unknown: empty."""
    values = cells(table)
    for name in TEXTS:
        values[name] = [text and cell(text) for text in values[name]]
    for name in PEOPLE:
        values[name] = [some and _people(some) for some in values[name]]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_rows(values))
    # no name has a line break: cell() has removed it
    return iter(text.getvalue().split("\n")[:-1])


def _people(some: list[dict[str, Any]]) -> str:
    """Return text as in JSON lines: ASCII, no line break, nothing that a spreadsheet computes."""
    return json.dumps(some, separators=(",", ":")).replace(";", "\\u003b")


def _objects(table: Columns) -> Iterator[dict[str, Any]]:
    return (dict(zip(COLUMNS, row, strict=True)) for row in _rows(cells(table)))


def _jsonl(table: Columns) -> Iterator[str]:
    """ASCII only, so that no name acts on a terminal. Unknown: null."""
    return map(_encode, _objects(table))


def _ecs(table: Columns) -> Iterator[str]:
    """One event of the Elastic Common Schema. Unknown: left out."""
    return (_encode(document(row)) for row in _objects(table))


LINES = {
    "csv": LineFormat(_csv, ",".join(COLUMNS)),
    "jsonl": LineFormat(_jsonl),
    "ecs": LineFormat(_ecs),
}
"""By the value of --format."""
