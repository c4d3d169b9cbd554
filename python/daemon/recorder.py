# SPDX-License-Identifier: MIT
"""Keeps the history: in memory always, in a file when the configuration names one."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import numpy as np

from daemon.config import Config
from daemon.history import History, Question
from daemon.store import Store
from nlproto.errors import Error
from nlproto.pipeline import NamedBatch
from nlproto.processes import Key, Process, Processes

__all__ = ["Recorder"]

_FLUSH_ROWS = 50_000
"""Flows written in one transaction; what is left waits for the next."""
_RETENTION = 30.0  # s between two looks at age and size

log = logging.getLogger(__name__)


class Recorder:
    """A History and, with `history` configured, a thread that writes it to a Store.

    A context manager; on exit everything is written. What SIGKILL can take is what came since
    the last flush interval.
    """

    def __init__(self, config: Config, processes: Processes) -> None:
        self._config = config
        self._processes = processes
        self._changed: dict[Key, Process] = {}
        self._changed_lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._started = time.time()
        self.failures = 0
        next_id = 1
        if config.history is not None:
            self._store = Store(config.history)
            next_id = self._store.last_id() + 1
            processes.on_change = self._note
        self.history = History(config.history_flows, next_id)
        if self._store is not None:
            self.history.horizon_ns = self._store.last_seen_ns()

    def __enter__(self) -> Recorder:
        if self._store is not None:
            self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        if self._store is not None:
            self._store.close()

    def reconfigure(self, config: Config) -> None:
        self._config = config

    def take(self, batch: NamedBatch) -> None:
        """Worker thread: add a batch to the history."""
        assert batch.flows is not None
        self.history.update(batch.flows, batch.clock)

    def past(self, question: Question) -> tuple[int, list[tuple[int, np.void]]]:
        """Flows that are in the file and no more in memory; counted up to one over the limit."""
        if self._store is None:
            return 0, []
        since_ns = max(question.since_ns or 0, question.at_ns or 0)
        horizon_ns = self.history.horizon_ns
        if since_ns > horizon_ns:
            return 0, []
        rows = self._store.ask(question, horizon_ns)
        here = self.history.has(np.array([number for number, _ in rows], np.uint64))
        older = [row for row, known in zip(rows, here.tolist(), strict=True) if not known]
        return len(older), older

    def remembers_since(self) -> float:
        """Unix time: what was seen later is still known, in memory or in the file."""
        if self._store is not None:
            return min(self._started, self._store.first_seen_ns() / 1e9)
        return max(self._started, self.history.horizon_ns / 1e9)

    def past_process(self, tgid: int, start_ns: int) -> Process | None:
        return None if self._store is None else self._store.process(tgid, start_ns)

    def store_figures(self) -> dict[str, Any] | None:
        if self._store is None:
            return None
        return {"path": self._store.path, "failures": self.failures} | self._store.figures()

    def _note(self, process: Process) -> None:
        with self._changed_lock:
            if len(self._changed) < self._processes.limit:
                self._changed[process.key] = process

    def _write(self) -> None:
        looked = time.monotonic()
        while True:
            ending = self._stopping.wait(self._config.flush_interval)
            more = self._flush()
            while ending and more:
                more = self._flush()
            if time.monotonic() - looked > _RETENTION:
                looked = time.monotonic()
                self._trim()
            if ending:
                return

    def _flush(self) -> bool:
        """Write what changed; whether more is waiting."""
        assert self._store is not None
        with self._changed_lock:
            processes, self._changed = list(self._changed.values()), {}
        ids, flows = self.history.changed(_FLUSH_ROWS)
        try:
            self._store.write(ids, flows, processes)
        except Error as error:
            self.failures += 1
            self.history.mark_changed(ids)
            if self.failures in (1, 10, 100) or self.failures % 1000 == 0:
                log.error("history not written: %s", error)
            return False
        return len(ids) == _FLUSH_ROWS

    def _trim(self) -> None:
        assert self._store is not None
        try:
            gone = self._store.trim(self._config.history_age, self._config.history_size)
        except Error as error:
            log.error("history not trimmed: %s", error)
            return
        if gone:
            log.info("history: %d flows were too old or too many", gone)
