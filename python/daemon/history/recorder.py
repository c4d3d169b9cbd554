# SPDX-License-Identifier: MIT
"""Keeps the history: in memory always, and in a file if the configuration names one."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from daemon.history.details import Group, Place, add_all, place, sums
from daemon.history.memory import FlowMemory, Question
from daemon.history.schema import ROW_SIZE
from daemon.history.sealing import LEAST, MOST
from daemon.history.sightings import After, Sighting, known_since, listeners, seen_first, shorten
from daemon.history.store import Damaged, Store
from daemon.system.config import Config
from nlproto.errors import Error, UsageError
from nlproto.records.batch import NamedBatch
from nlproto.running.supervise import Failures, keep_going
from nlproto.tables.port_owner import PortOwner
from nlproto.tables.processes import Process, Processes, ProcessKey
from nlproto.tables.shares import Payers

__all__ = ["Recorder"]

_FLUSH_ROWS = 50_000
"""The most flows in one transaction; the rest waits for the next."""
_FLUSH_PROCESSES = 10_000
_RETENTION = 30.0  # s between two looks at age and size
_LEAST_SIZE = 1 << 20
_LISTENERS = 5.0  # s between two times that listeners are stored
_REOPEN = 2.0  # s between two tries to open the file

log = logging.getLogger(__name__)


class Recorder:
    """A history in memory and, if `history` is configured, a thread that writes it to a Store.

    A context manager; on exit everything is written. SIGKILL loses what came since the last flush.
    What cannot be written waits in memory, within the bounds of `processes` and of the memory. It
    is written as soon as that is possible, even if the file could not be opened at the start.
    Raises UsageError if the directory of the file does not exist.
    """

    def __init__(self, config: Config, processes: Processes, payers: Payers | None = None) -> None:
        self._config = config
        self._processes = processes
        self._payers = payers
        self._changed: dict[ProcessKey, None] = {}
        self._changed_lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._started = time.time()
        self._file: bytes | None = None
        """The identity of the file to which the ids of the flows belong."""
        self._tried = time.monotonic()
        self._writing = 0, 0
        """How many flows and processes are being written now."""
        self._row = 0
        """How many failures there were since the last success."""
        self.failures = 0
        self.text_of: Callable[[int], str] = lambda number: ""
        """The name of a far end by its number in flows (nlproto.overheard.names)."""
        self.listeners: Callable[[], Iterable[PortOwner]] = lambda: ()
        """Returns the sockets that wait for a peer now (nlproto.tables.portmap)."""
        self._listened = 0.0
        self.on_death: Callable[[Error], None] = lambda error: None
        """Called when writing fails for good, for an unforeseen reason."""
        self._unforeseen = Failures("recorder")
        self.error = ""
        """Why nothing is written now."""
        self.unstored = 0
        """How many processes left memory before their last change was written."""
        self.history = FlowMemory(config.history_flows, payers=payers)
        if config.history is not None:
            processes.on_change = self._note
            self._open(config.history)

    def __enter__(self) -> Recorder:
        if self._config.history is not None:
            self._thread = threading.Thread(
                target=lambda: keep_going(self._write, self._unforeseen, self.on_death),
                name="recorder",
                daemon=True,
            )
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        if self._store is not None:
            self._store.close()
        flows, processes = self.history.waiting(), len(self._changed)
        if self._config.history is not None and flows + processes:
            log.error("history: %d flows and %d processes are not written", flows, processes)

    def reconfigure(self, config: Config) -> None:
        self._config = config

    def take(self, batch: NamedBatch) -> None:
        """Add a batch to the history. Called in the worker thread."""
        assert batch.flows is not None
        self.history.update(batch.flows, batch.clock)

    def past(
        self, question: Question, stop: Callable[[], None] = lambda: None
    ) -> tuple[int, list[tuple[int, np.void]]]:
        """Return flows that are only in the file; counted up to one over the limit.

        `stop` is called every few ms, and ends this by raising.
        """
        store = self._store
        if store is None:
            return 0, []
        since_ns = max(question.since_ns or 0, question.at_ns or 0)
        horizon_ns = self.history.horizon_ns
        if since_ns > horizon_ns:
            return 0, []
        seen_until_ns = question.seen_until_ns
        until_ns = horizon_ns if seen_until_ns is None else min(horizon_ns, seen_until_ns)
        older: dict[int, np.void] = {}
        try:
            while len(older) <= question.limit:
                rows = store.ask(question, until_ns, stop)
                here = self.history.has(np.array([number for number, _ in rows], np.uint64))
                older |= {
                    number: row
                    for (number, row), known in zip(rows, here.tolist(), strict=True)
                    if not known
                }
                # of a page no row may be missing; of the first one the memory counts them
                if seen_until_ns is None or len(rows) <= question.limit:
                    break
                until_ns = min(until_ns - 1, int(rows[-1][1]["last_ns"]))
        except Error as error:
            self._failed("not read", error)
            return 0, []
        return len(older), list(older.items())

    def usage(
        self, since_ns: int, stop: Callable[[], None] = lambda: None
    ) -> tuple[dict[Group, list[int]], dict[int, str]]:
        """Return sums of the flows last seen since then, each in memory or in the files.

        Also returns names of far ends that this daemon does not know. Raises Error.
        """
        here = self.history.seen_since(since_ns)
        found: dict[Group, list[int]] = {}
        names: dict[int, str] = {}
        if (store := self._store) is not None:
            found, names = store.usage(since_ns, here["id"], self._place, stop)
        add_all(found, sums(here, self._place))
        return found, names

    def news(
        self,
        kind: str,
        since_ns: int,
        unseen_ns: int,
        uid: int | None,
        limit: int,
        after: After | None = None,
    ) -> tuple[list[dict[str, Any]], list[After]]:
        """Return what was first seen since then (daemon.history.sightings). Raises Error."""
        return seen_first(self._sighted(), kind, since_ns, unseen_ns, uid, limit, after)

    def known_since(self) -> float:
        """Unix time since which news() knows what was seen. Raises Error."""
        return known_since(self._sighted())

    def _sighted(self) -> Store:
        if self._store is None:
            raise UsageError(
                f"only a history on disk knows what is new: {self.error}"
                if self.error
                else "only a history on disk knows what is new: set 'history' in daemon.yaml"
            )
        return self._store

    def _heard(self) -> list[Sighting]:
        if time.monotonic() - self._listened < _LISTENERS:
            return []
        self._listened = time.monotonic()
        return list(listeners(self.listeners(), time.time_ns()))

    def _place(self, key: ProcessKey) -> Place:
        return place(self._processes.get(*key) or self.past_process(*key))

    def remembers_since(self, uid: int | None = None) -> float:
        """Return a Unix time: everything seen later is still known, in memory or in the file.

        `uid`: of what this user may see. It does not show when others' flows came and went.
        """
        store = self._store
        if uid is not None:
            horizon = 0 if store is not None else self.history.horizon_of(uid)
            return max(self._started, horizon / 1e9)
        if store is not None:
            try:
                return min(self._started, store.first_seen_ns() / 1e9)
            except Error as error:
                self._failed("not read", error)
        return max(self._started, self.history.horizon_ns / 1e9)

    def past_process(self, tgid: int, start_ns: int) -> Process | None:
        store = self._store
        return None if store is None else store.process(tgid, start_ns)

    def name_of(self, number: int) -> str:
        """Return the name of a flow's far end, from memory or file; "" if it is lost."""
        name, store = self.text_of(number), self._store
        if name or store is None:
            return name
        try:
            return store.name(number)
        except Error as error:
            self._failed("not read", error)
            return ""

    def store_figures(self) -> dict[str, Any] | None:
        if self._config.history is None:
            return None
        store, (flows, processes) = self._store, self._writing
        return {
            "path": self._config.history,
            "open": store is not None,
            "error": self.error,
            "failures": self.failures,
            "waiting_flows": self.history.waiting() + flows,
            "waiting_processes": len(self._changed) + processes,
            "unstored_processes": self.unstored,
            "bytes": 0 if store is None else store.size(),
            "sealed_files": 0 if store is None else len(store.hours.pieces),
            "damaged_files": 0 if store is None else store.hours.broken,
            "since": self.remembers_since(),
        }

    def _note(self, process: Process) -> None:
        with self._changed_lock:
            self._changed[process.key] = None
            self._bound()

    def _bound(self) -> None:
        """Holds `_changed_lock`. Drop changes of processes that memory has forgotten."""
        if len(self._changed) > 2 * self._processes.limit:
            known = {key: None for key in self._changed if self._processes.get(*key)}
            self.unstored += len(self._changed) - len(known)
            self._changed = known

    def _open(self, path: str) -> None:
        """Try to open the file. Flows in memory are written to a file that lacks them."""
        self._tried = time.monotonic()
        try:
            store = Store(path, self._payers)
            last_id, last_ns, file = store.last_id(), store.last_seen_ns(), store.identity()
        except UsageError:
            if self._file is None and self._thread is None:
                raise
            self._failed("not opened", Error(f"history {path}: its directory has gone"))
            return
        except Error as error:
            self._failed("not opened", error)
            return
        if file != self._file:
            self.history.renumber(last_id)
            if self._file is not None:
                self.history.mark_all_changed()
                for process in self._processes.find():
                    self._note(process)
        self.history.horizon_ns = max(self.history.horizon_ns, last_ns)
        self._file, self._store = file, store
        self._worked()

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.close()
        self._tried = 0.0

    def _failed(self, what: str, error: Error) -> None:
        self.failures += 1
        self._row += 1
        self.error = str(error)
        if self._row in (1, 10, 100) or self._row % 1000 == 0:
            log.error("history %s: %s; it waits in memory", what, error)

    def _worked(self) -> None:
        if self._row:
            log.info("history written again after %d failures", self._row)
        self._row, self.error = 0, ""

    def _write(self) -> bool:
        looked = time.monotonic()
        while True:
            ending = self._stopping.wait(self._config.flush_interval)
            if ending:  # nobody looks later
                self._leave_removed_file()
            more = self._flush()
            while ending and more:
                more = self._flush()
            if time.monotonic() - looked > _RETENTION:
                looked = time.monotonic()
                self._trim()
            if ending:
                return False

    def _kept(self, what: str, step: Callable[[], object]) -> bool:
        """Call `step`, which may fail. Returns whether the file is still of use."""
        try:
            step()
        except Error as error:
            self._failed(what, error)
            if isinstance(error, Damaged):
                self._close()
                return False
        return True

    def _size(self, store: Store) -> int:
        """Return how many bytes the file may have."""
        size = self._config.history_size
        if self._config.history_free:
            size = min(size, store.size() + store.room() - self._config.history_free)
        return max(_LEAST_SIZE, size)

    def _flush(self) -> bool:
        """Write what has changed. Returns whether more waits."""
        store = self._store
        if store is None:
            due = self._stopping.is_set() or time.monotonic() - self._tried > _REOPEN
            if due and self._config.history is not None:
                self._open(self._config.history)
            if (store := self._store) is None:
                return False
        with self._changed_lock:
            keys = list(itertools.islice(self._changed, _FLUSH_PROCESSES))
            for key in keys:
                del self._changed[key]
            self._writing = 0, len(keys)
        ids, flows = self.history.changed(_FLUSH_ROWS)
        self._writing = len(ids), len(keys)
        found = [self._processes.get(*key) for key in keys]
        processes = [process for process in found if process is not None]
        try:
            known, heard = self._processes.get, self._heard()
            store.write(ids, flows, processes, known, self.text_of, heard)
            self._unforeseen.clear()
        except Exception as error:
            self.history.mark_changed(ids)
            with self._changed_lock:
                self._changed = dict.fromkeys(keys) | self._changed
                self._bound()
            if not isinstance(error, Error):
                self.failures += 1
                raise
            self._failed("not written", error)
            if isinstance(error, Damaged):
                self._close()
            return False
        finally:
            self._writing = 0, 0
        self.unstored += len(keys) - len(processes)
        if len(ids) or keys:
            self._worked()
        return len(ids) == _FLUSH_ROWS or len(keys) == _FLUSH_PROCESSES

    def _leave_removed_file(self) -> None:
        if self._store is not None and not self._store.in_place():
            log.error("history %s was taken away; a new one begins", self._store.path)
            self._close()

    def _trim(self) -> None:
        """Seal what is an hour old. Remove what is too old or too much."""
        if self._payers is not None:
            self._payers.refresh()
        self._leave_removed_file()
        store = self._store
        if store is None:
            return
        # pieces of a third at most, or the database alone would take all the room
        most = max(LEAST, min(MOST, self._config.history_size // ROW_SIZE // 3))
        flushed = 0.0

        def flush() -> None:
            nonlocal flushed
            now = time.monotonic()
            if self._store is store and now - flushed >= self._config.flush_interval:
                flushed = now
                self._flush()

        if not self._kept("not sealed", lambda: store.seal(self.history.has, most, flush)):
            return
        gone = 0

        def trim() -> None:
            nonlocal gone
            shorten(store)
            gone = store.trim(self._config.history_age, self._size(store))

        self._kept("not trimmed", trim)
        if gone:
            log.info("history: %d flows were too old or too many", gone)
