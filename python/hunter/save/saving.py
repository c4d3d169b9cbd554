# SPDX-License-Identifier: MIT
"""Saves batches in the format that the name of a file stands for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Protocol

from hunter.save.capturefile import CaptureFile
from hunter.save.save_lines import LINES, LineSaver
from hunter.show.columns import Columns
from nlproto import UsageError
from nlproto.records.first_bytes import FirstBytes

__all__ = ["Rotation", "Saver", "format_of", "open_saver", "refuse_input", "refuse_pcap"]

SUFFIXES = {
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pcapng": "pcapng",
}
_ECS = (".ecs.jsonl", ".ecs.ndjson", ".ecs.json")


class Saver(Protocol):
    """Writes whole batches. They are in the file when add() returns."""

    @property
    def rows(self) -> int:
        """How many records are in the file, even after a failure."""
        ...

    def add(self, table: Columns) -> None:
        """Append the rows of `table`. Raises Error, BrokenPipeError."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def format_of(path: str, asked: str | None) -> str:
    """Return the format for `path`. Raises UsageError if the name does not show it."""
    if asked:
        return asked
    if path == "-":
        return "csv"
    if path.lower().endswith(_ECS):
        return "ecs"
    suffix = os.path.splitext(path)[1].lower()
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    refuse_pcap(path)
    known = ", ".join((*SUFFIXES, _ECS[0]))
    raise UsageError(f"{path}: its format is not clear; end it with {known}, or give --format")


def refuse_pcap(path: str) -> None:
    """Raise UsageError for the name of a pcap file."""
    stem, suffix = os.path.splitext(path)
    if suffix.lower() in (".pcap", ".cap"):
        raise UsageError(f"{path}: pcap has no place for owners; name it {stem}.pcapng")


def refuse_input(path: str, inputs: Iterable[str]) -> None:
    """Raise UsageError if writing to `path` would destroy one of `inputs`."""
    for one in inputs:
        try:
            same = path != "-" and os.path.isfile(path) and os.path.samefile(path, one)
        except (OSError, ValueError):
            continue
        if same:
            raise UsageError(f"{path} is the capture itself: choose another name")


def _make(
    kind: str, first_bytes: FirstBytes | None, process_blocks: bool
) -> Callable[[CaptureFile], Saver]:
    if kind in LINES:
        return lambda file: LineSaver(file, LINES[kind])
    # Imported here: Parquet needs an optional package.
    if kind == "pcapng":
        from hunter.save.save_pcapng import PcapngSaver

        return lambda file: PcapngSaver(file, first_bytes, process_blocks)
    from hunter.save.save_parquet import ParquetSaver

    return ParquetSaver


def open_saver(
    path: str,
    kind: str,
    first_bytes: FirstBytes | None,
    rotate: int | None = None,
    keep: int | None = None,
    process_blocks: bool = False,
) -> Rotation:
    """Return a saver of format `kind` to `path` ("-": standard output).

    pcapng takes `first_bytes`, and `process_blocks`.

    `rotate`: bytes after which the next file begins, as tcpdump's -C: path, path1, path2 ...;
    `keep`: after so many files the first is written again (-W). Raises Error, UsageError.
    """
    return Rotation(path, _make(kind, first_bytes, process_blocks), rotate, keep)


class Rotation:
    """Writes one file after another: when it is full, or when others have moved it away."""

    def __init__(
        self,
        path: str,
        make: Callable[[CaptureFile], Saver],
        size: int | None = None,
        keep: int | None = None,
    ) -> None:
        self._path = path
        self._make = make
        self._size = size
        self._keep = keep
        self._number = 0
        self._done = 0
        self._open()

    def _open(self) -> None:
        self._file = CaptureFile(self._name())
        self._saver: Saver | None = self._make(self._file)

    def _name(self) -> str:
        """Return the name of a further file: numbered as by tcpdump, but before the suffix."""
        if self._keep is not None:
            width = len(str(self._keep - 1))
            number = f"{self._number % self._keep:0{width}}"
        else:
            number = str(self._number) if self._number else ""
        stem, suffix = os.path.splitext(self._path)
        return f"{stem}{number}{suffix}"

    def add(self, table: Columns) -> None:
        if self._saver is not None and self._size is not None and self._file.size >= self._size:
            self._finish(self._saver)
            self._number += 1
        if self._saver is None:
            self._open()
        assert self._saver is not None
        self._saver.add(table)

    def reopen(self) -> None:
        """Go on in a new file if the present one was moved away. Raises Error."""
        if self._saver is not None and self._file.is_moved():
            self._finish(self._saver)
            self._open()

    def _finish(self, saver: Saver) -> None:
        self._saver = None
        saver.close()
        self._done += saver.rows

    @property
    def rows(self) -> int:
        return self._done + (0 if self._saver is None else self._saver.rows)

    @property
    def note(self) -> str:
        return getattr(self._saver, "note", "")

    def close(self) -> None:
        if self._saver is not None:
            self._saver.close()
