# SPDX-License-Identifier: MIT
"""Records as a filter looks at them: each column and each process is looked up once."""

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
    """One of those above a process."""

    @property
    def pid(self) -> int:
        """In the initial pid namespace."""
        ...

    @property
    def comm(self) -> str:
        """What it was called then."""
        ...


class ProcessLike(Protocol):
    """What a filter asks of a process; "" for what is not known, or not there."""

    @property
    def exe(self) -> str:
        """Path of its program."""
        ...

    @property
    def cmdline(self) -> str:
        """As the daemon keeps it: whole, the program alone, or nothing."""
        ...

    @property
    def container(self) -> str:
        """As "docker:4f1c0d2e9a3b"."""
        ...

    @property
    def container_name(self) -> str:
        """As "web"."""
        ...

    @property
    def pod(self) -> str:
        """As "default/web-0"."""
        ...

    @property
    def unit(self) -> str:
        """Its systemd unit."""
        ...

    @property
    def parents(self) -> Sequence[ParentLike]:
        """The nearest first."""
        ...


class KnownProcesses(Protocol):
    """What is known of processes beyond their records (nlproto.tables.processes.Processes)."""

    def get(self, tgid: int, start_ns: int, /) -> ProcessLike | None:
        """Return the process, None where it is not known; `start_ns` is its start_boottime."""
        ...


class _Names(Protocol):
    """What knows the names of far ends (nlproto.records.ends.Ends)."""

    def domains(self, records: np.ndarray) -> list[str]:
        """Return one for each record."""
        ...

    def translations(self, records: np.ndarray) -> np.ndarray | None:
        """Return TRANSLATED of each record, None where nothing is known."""
        ...


class FilterView:
    """The records that a filter looks at; what several tests need is made once."""

    def __init__(self, records: np.ndarray, details: KnownProcesses | None) -> None:
        self.records = records
        self._details = details
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str) -> np.ndarray:
        """One field of all records, shape (n,); addresses as two numbers of 64 bits, (n, 2)."""
        found = self._columns.get(name)
        if found is None:
            found = np.ascontiguousarray(self.records[name])
            if found.ndim == 2:
                found = found.view(np.uint64)
            self._columns[name] = found
        return found

    @functools.cached_property
    def named(self) -> np.ndarray:
        """Mask of the records that have a process."""
        return wire.are_named(self.column("how"))

    @functools.cached_property
    def domains(self) -> list[str]:
        """The name of each record's far end, "" for none; several have "|" between them."""
        ends: _Names | None = getattr(self._details, "ends", None)
        return [""] * len(self) if ends is None else ends.domains(self.records)

    @functools.cached_property
    def nat(self) -> np.ndarray | None:
        """What NAT made of the records' ends (nlproto.records.ends.TRANSLATED); None: of none."""
        ends: _Names | None = getattr(self._details, "ends", None)
        return None if ends is None else ends.translations(self.records)

    @functools.cached_property
    def processes(self) -> tuple[np.ndarray, np.ndarray, list[tuple[str, ProcessLike | None]]]:
        """Where the named records are, which process each has, and these processes.

        A process is (comm of the record, what is known of it). Each is looked up once.
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
