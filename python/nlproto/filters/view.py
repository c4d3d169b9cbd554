# SPDX-License-Identifier: MIT
"""Records as a filter looks at them: each column and each process is looked up once."""

from __future__ import annotations

import functools
import os
from typing import Protocol

import numpy as np

from nlproto.records import wire
from nlproto.tables.column_table import mix, random_seed

__all__ = ["KnownProcesses", "ProcessLike", "View"]

_SEED = random_seed()


class ProcessLike(Protocol):
    """What a filter asks of a process."""

    @property
    def exe(self) -> str: ...
    @property
    def container(self) -> str: ...
    @property
    def unit(self) -> str: ...


class KnownProcesses(Protocol):
    """What is known of processes beyond their records (nlproto.tables.processes.Processes)."""

    def get(self, tgid: int, start_ns: int, /) -> ProcessLike | None: ...


class View:
    """The records that a filter looks at; what several tests need is made once."""

    def __init__(self, records: np.ndarray, details: KnownProcesses | None) -> None:
        self.records = records
        self._details = details
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str) -> np.ndarray:
        """One field; addresses as two numbers of 64 bits."""
        found = self._columns.get(name)
        if found is None:
            found = np.ascontiguousarray(self.records[name])
            if found.ndim == 2:
                found = found.view(np.uint64)
            self._columns[name] = found
        return found

    @functools.cached_property
    def named(self) -> np.ndarray:
        """Which records have a process."""
        return wire.are_named(self.column("how"))

    @functools.cached_property
    def processes(self) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str, str]]]:
        """Where the named records are, which process each has, and these processes.

        A process is (comm, name of its program, container, unit). Each is looked up once.
        """
        places = np.flatnonzero(self.named)
        records = self.records[places]
        comm = np.ascontiguousarray(records["comm"]).view(np.uint64).reshape(-1, 2)
        identity = mix(
            (records["tgid"].astype(np.uint64), records["start_ns"], comm[:, 0], comm[:, 1]),
            _SEED,
        )
        _, first, belongs = np.unique(identity, return_index=True, return_inverse=True)
        found = []
        for index in first.tolist():
            record = records[index]
            process = None
            if self._details is not None:
                process = self._details.get(int(record["tgid"]), int(record["start_ns"]))
            program = os.path.basename(process.exe) if process is not None else ""
            container = process.container if process is not None else ""
            unit = process.unit if process is not None else ""
            found.append((wire.text(bytes(record["comm"])), program, container, unit))
        return places, belongs, found
