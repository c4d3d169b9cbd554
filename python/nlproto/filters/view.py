# SPDX-License-Identifier: MIT
"""Records as a filter sees them. Each column and each process is looked up once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nlproto.records import wire
from nlproto.tables.column_table import mix, random_seed

__all__ = ["KnownProcesses", "ProcessLike", "FilterView"]

_SEED = random_seed()


class ParentLike(Protocol):
    """A parent of a process, direct or not."""

    @property
    def pid(self) -> int:
        """Pid in the initial pid namespace."""
        ...

    @property
    def comm(self) -> str:
        """Its name at that time."""
        ...


class ProcessLike(Protocol):
    """What a filter knows of a process; "" for the unknown."""

    @property
    def exe(self) -> str:
        """Path of its program."""
        ...

    @property
    def cmdline(self) -> str:
        """Command line as the daemon keeps it: whole, program alone, or nothing."""
        ...

    @property
    def container(self) -> str:
        """Such as "docker:4f1c0d2e9a3b"."""
        ...

    @property
    def container_name(self) -> str:
        """Such as "web"."""
        ...

    @property
    def pod(self) -> str:
        """Such as "default/web-0"."""
        ...

    @property
    def unit(self) -> str:
        """Its systemd unit."""
        ...

    @property
    def parents(self) -> Sequence[ParentLike]:
        """The nearest parent first."""
        ...


class KnownProcesses(Protocol):
    """What is known of processes beyond records (nlproto.tables.processes.Processes)."""

    def get(self, tgid: int, start_ns: int, /) -> ProcessLike | None:
        """Return the process; None: not known. `start_ns` is its start_boottime."""
        ...


class _Names(Protocol):
    """Names of far ends (nlproto.records.ends.Ends)."""

    def domains(self, records: np.ndarray) -> list[str]:
        """Return a name for each record."""
        ...

    def translations(self, records: np.ndarray) -> np.ndarray | None:
        """Return TRANSLATED for each record; None: nothing is known."""
        ...


class FilterView:
    """The records that a filter sees. What several tests need is computed once."""

    def __init__(self, records: np.ndarray, details: KnownProcesses | None) -> None:
        self.records = records
        self._details = details
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str) -> np.ndarray:
        """Return a field of all records, shape (n,); addresses as two 64-bit numbers, (n, 2)."""
        found = self._columns.get(name)
        if found is None:
            found = np.ascontiguousarray(self.records[name])
            if found.ndim == 2:
                found = found.view(np.uint64)
            self._columns[name] = found
        return found

    @functools.cached_property
    def named(self) -> np.ndarray:
        """Return a mask of the records that have a process."""
        return wire.are_named(self.column("how"))

    @functools.cached_property
    def domains(self) -> list[str]:
        """Return the name of each record's far end, "" for none; "|" separates several."""
        ends: _Names | None = getattr(self._details, "ends", None)
        return [""] * len(self) if ends is None else ends.domains(self.records)

    @functools.cached_property
    def nat(self) -> np.ndarray | None:
        """Return what NAT made of the ends (nlproto.records.ends.TRANSLATED); None: nothing."""
        ends: _Names | None = getattr(self._details, "ends", None)
        return None if ends is None else ends.translations(self.records)

    @functools.cached_property
    def processes(self) -> tuple[np.ndarray, np.ndarray, list[tuple[str, ProcessLike | None]]]:
        """Return which records are named, which process each has, and these processes.

        Both arrays (int64) have one place for each named record: its index in the records, and
        that of its process. A process is a pair: its comm, and what is known of it.
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
            found.append((wire.text(bytes(record["comm"])), process))
        return places, belongs, found
