# SPDX-License-Identifier: MIT
"""Saves batches in the format that a file's name asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from hunter.capturefile import CaptureFile
from hunter.columns import Columns
from nlproto import UsageError

__all__ = ["Saver", "format_of", "open_saver"]

SUFFIXES = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pcapng": "pcapng",
}


class Saver(Protocol):
    """Writes whole batches; what add() has taken is in the file when it returns."""

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def format_of(path: str, asked: str | None) -> str:
    """Return the format for `path`. Raises UsageError when nothing tells it."""
    if asked:
        return asked
    if path == "-":
        return "csv"
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if suffix in (".pcap", ".cap"):
        raise UsageError(f"{path}: pcap has no place for owners; name it {path}ng")
    known = ", ".join(SUFFIXES)
    raise UsageError(f"{path}: its format is not clear; end it with {known}, or give --format")


def _make(kind: str) -> Callable[[CaptureFile], Saver]:
    if kind == "csv":
        from hunter.save_csv import CsvSaver

        return CsvSaver
    if kind == "jsonl":
        from hunter.save_jsonl import JsonSaver

        return JsonSaver
    raise UsageError(f"format {kind} cannot be written yet; save CSV")


def open_saver(path: str, kind: str) -> Saver:
    """Return a saver of format `kind` to `path` ("-": standard output). Raises Error."""
    make = _make(kind)
    return make(CaptureFile(path))
