# SPDX-License-Identifier: MIT
"""The sealed files beside the history's database, and their list in the database.

A row moves in this order, so that no crash loses or doubles it. The file is written under another
name, synced and renamed. Then one transaction enters it in the list. The same transaction deletes
its rows, or the file that it replaces, from the database.

When the database is opened, files that are not in the list are checked. If the database, or the
file to be replaced, still has a file's rows, the file was never entered. It is removed. Any
other file is entered. So the history survives the loss of its database.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import re
import sqlite3
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec
import numpy as np

from daemon.history.details import Sum, places_in, sums
from daemon.history.memory import Question
from daemon.history.sealed import Broken, Contents, Rows, Sealed, seal
from daemon.system.directory import HeldDirectory
from nlproto.tables.processes import ProcessKey
from nlproto.tables.shares import level

__all__ = ["Hours", "HourFile"]

_NAME = re.compile(r"-(\d{8,18})\.hour\Z")
_TRIES = 20
"""How often a question is tried again whose files change meanwhile."""
_KNOWN = 1 << 16
"""The most owners whose file is remembered."""
_NAMES_OF = 8
_NAME_KEY = -1
"""In place of a pid: the number of a name follows."""
_PROGRAMS = 100
"""The most programs of a payer that a file tells apart; the rest counts as one."""

_What = TypeVar("_What")

log = logging.getLogger(__name__)


class HourFile(msgspec.Struct, frozen=True):
    """One file, as in the list. Times are ns since 1970, `seen` as in the database."""

    number: int
    rows: int
    bytes: int
    last_id: int
    begin_ns: int
    """First packet of all rows."""
    oldest_ns: int
    newest_ns: int
    """First and last of the rows' last packets."""
    seen: int
    shares: list[tuple[int, str, int]]
    """(payer, program or "", rows)."""
    replaces: int = 0
    """The number of the file that it replaces."""

    @property
    def name(self) -> str:
        """Suffix behind the database's name."""
        return f"-{self.number:08}.hour"

    def bytes_of(self, rows: int) -> int:
        return -(-self.bytes * rows // max(1, self.rows))


class Hours:
    """The sealed files of the database `place`. ask, process and usage are for any thread."""

    def __init__(self, place: HeldDirectory, path: str) -> None:
        self._place = place
        self._path = path
        self.pieces: tuple[HourFile, ...] = ()
        """In order of last packets, the latest first."""
        self._where: OrderedDict[ProcessKey, int] = OrderedDict()
        self._names: dict[int, dict[int, str]] = {}
        """The files that were read last, open."""
        self._broken: set[int] = set()
        self._next = 1

    @property
    def size(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    @property
    def broken(self) -> int:
        """How many files cannot be read."""
        return len(self._broken)

    # The list

    def begin(self, writer: sqlite3.Connection) -> None:
        """Read the list, and make it agree with the directory. Raises sqlite3.Error, OSError."""
        listed: dict[int, HourFile] = {}
        there = dict(self._files())
        for number, about in writer.execute("SELECT number, about FROM hours").fetchall():
            if number not in there:
                log.error("history %s: its file -%08d.hour is gone", self._path, number)
                self._forget(writer, number)
                continue
            try:
                listed[number] = msgspec.json.decode(about, type=HourFile)
            except (msgspec.DecodeError, msgspec.ValidationError):
                self._forget(writer, number)  # its file says the same
        self._next = max([0, *there]) + 1
        strays = {}
        for number in there.keys() - listed.keys():
            if (stray := self._open(number)) is not None:
                with stray:
                    strays[number] = stray.replaces, stray.first_id
        replaced = {replaces for replaces, _ in strays.values()}
        replaced |= {piece.replaces for piece in listed.values()}
        for number, (replaces, first_id) in sorted(strays.items()):
            kept = "SELECT 1 FROM flows WHERE id = ?"
            if (
                replaces in listed
                or number in replaced
                or writer.execute(kept, (first_id,)).fetchone() is not None
            ):
                self._unlink(number)
            elif (piece := self._about(number, there[number])) is not None:
                self._enter(writer, piece)
                listed[number] = piece
                log.info("history %s: its file %s is read again", self._path, piece.name)
        self._list(listed.values())

    def _files(self) -> Iterator[tuple[int, int]]:
        """Yield number and size of each file. Removes one that was being written at our end."""
        for name in os.listdir(self._place.fd):
            rest = name.removeprefix(self._place.name)
            if rest == name:
                continue
            if rest.endswith(".hour-new"):
                self._place.remove(rest)
            elif found := _NAME.match(rest):
                status = self._place.stat(rest)
                if status is not None:
                    yield int(found[1]), status.st_size

    def _about(self, number: int, size: int) -> HourFile | None:
        stray = self._open(number)
        if stray is None:
            return None
        with stray:
            try:
                return _piece(number, _joined(stray.rows()), size, stray.replaces)
            except Broken as error:
                self._tell(number, error)
                return None

    def _list(self, pieces: Iterable[HourFile]) -> None:
        self.pieces = tuple(sorted(pieces, key=lambda piece: -piece.newest_ns))

    @staticmethod
    def _enter(writer: sqlite3.Connection, piece: HourFile) -> None:
        about = msgspec.json.encode(piece)
        writer.execute("INSERT INTO hours (number, about) VALUES (?, ?)", (piece.number, about))

    @staticmethod
    def _forget(writer: sqlite3.Connection, number: int) -> None:
        writer.execute("DELETE FROM hours WHERE number = ?", (number,))

    def write(self, contents: Contents) -> HourFile:
        """Make a file. add() enters it in the list. Raises OSError."""
        data = seal(contents)
        number, self._next = self._next, self._next + 1
        piece = _piece(number, contents.rows, len(data), contents.replaces)
        new = f"{piece.name}-new"
        fd = self._place.open_file(0o640, new)
        try:
            os.truncate(fd, 0)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        except BaseException:
            self._place.remove(new)
            raise
        finally:
            os.close(fd)
        self._place.move(new, piece.name)
        os.fsync(self._place.fd)
        return piece

    def change(
        self, writer: sqlite3.Connection, new: Iterable[HourFile], old: Iterable[int]
    ) -> Callable[[], None]:
        """Change the list, inside a transaction. Call what it returns after the transaction."""
        added, gone = tuple(new), frozenset(old)
        for piece in added:
            self._enter(writer, piece)
        for number in gone:
            self._forget(writer, number)

        def done() -> None:
            self._list([*(one for one in self.pieces if one.number not in gone), *added])
            for number in gone:
                self._broken.discard(number)
                self._unlink(number)

        return done

    def discard(self, writer: sqlite3.Connection, piece: HourFile) -> None:
        """Remove a file that could not be entered. Raises sqlite3.Error; then the file stays."""
        asked = "SELECT 1 FROM hours WHERE number = ?"
        if writer.execute(asked, (piece.number,)).fetchone() is None:
            self._unlink(piece.number)

    def _unlink(self, number: int) -> None:
        self._place.remove(f"-{number:08}.hour")

    # Reading

    def _open(self, number: int) -> Sealed | None:
        """Return an open file; None if it cannot be read, which is logged once."""
        name = f"-{number:08}.hour"
        try:
            return Sealed(self._place.open_old(name))
        except FileNotFoundError:
            if any(piece.number == number for piece in self.pieces):
                self._tell(number, OSError(errno.ENOENT, "it is gone"))
        except (Broken, OSError) as error:
            self._tell(number, error)
        return None

    def _tell(self, number: int, error: Exception) -> None:
        if number not in self._broken:
            self._broken.add(number)
            why = error.strerror if isinstance(error, OSError) else error
            log.error("history %s: its file -%08d.hour is passed over: %s", self._path, number, why)

    def ask(
        self,
        question: Question,
        until_ns: int,
        found: list[tuple[int, np.void]],
        pieces: tuple[HourFile, ...],
        stop: Callable[[], None],
    ) -> list[tuple[int, np.void]]:
        """Return `found` and the files' rows, newest first: `limit` rows and one more."""
        for _ in range(_TRIES):
            rows = self._ask(pieces, question, until_ns, found, stop)
            if self.pieces is pieces:
                break
            pieces = self.pieces  # a file may be removed before it was read
        return rows

    def _ask(
        self,
        pieces: tuple[HourFile, ...],
        question: Question,
        until_ns: int,
        found: list[tuple[int, np.void]],
        stop: Callable[[], None],
    ) -> list[tuple[int, np.void]]:
        count = question.limit + 1
        known = {number for number, _ in found}
        # files of these rows: newest last packet first, oldest of them first
        newest = [int(flow["last_ns"]) for _, flow in found[:count]]
        heapq.heapify(newest)
        more: list[tuple[int, np.void]] = []
        since_ns = max(question.since_ns or 0, question.at_ns or 0)
        ends = (question.until_ns, question.at_ns)
        begins_ns = min((one for one in ends if one is not None), default=until_ns)
        for piece in pieces:
            if piece.newest_ns < since_ns:
                break
            if len(newest) == count and newest[0] >= piece.newest_ns:
                break
            if piece.begin_ns > begins_ns or piece.oldest_ns > until_ns:
                continue
            stop()
            for number, flow in self._rows(piece, question, until_ns, count, stop):
                if number in known:
                    continue
                known.add(number)
                last_ns = int(flow["last_ns"])
                if len(newest) < count:
                    heapq.heappush(newest, last_ns)
                elif last_ns <= newest[0]:
                    break
                else:
                    heapq.heapreplace(newest, last_ns)
                more.append((number, flow))
        rows = found + more
        rows.sort(key=lambda row: -int(row[1]["last_ns"]))
        return rows[:count]

    def _rows(
        self,
        piece: HourFile,
        question: Question,
        until_ns: int,
        limit: int,
        stop: Callable[[], None],
    ) -> Iterator[tuple[int, np.void]]:
        sealed = self._open(piece.number)
        if sealed is None:
            return
        with sealed:
            try:
                for ids, flows in sealed.search(question, until_ns, limit, stop):
                    for key in set(flows[["tgid", "start_ns"]].tolist()):
                        self._remember(key, piece.number)
                    for name in set(flows["domain"].tolist()):
                        self._remember((_NAME_KEY, name), piece.number)
                    yield from zip(ids.tolist(), flows, strict=True)
            except Broken as error:
                self._tell(piece.number, error)

    def _remember(self, key: ProcessKey, number: int) -> None:
        self._where[key] = number
        while len(self._where) > _KNOWN:
            try:
                self._where.popitem(last=False)
            except KeyError:  # another thread was faster
                return

    def process(self, key: ProcessKey) -> bytes | None:
        """Return the details of an owner that ask() has returned."""
        return self._told(key, lambda sealed: sealed.process(key))

    def name(self, number: int) -> str:
        """Return the name of a far end in an answer of ask(); "" if there is none."""
        key = (_NAME_KEY, number)
        place = self._where.get(key, 0)
        names = self._names.get(place)
        if names is None:
            names = self._told(key, lambda sealed: sealed.names()) or {}
            self._names = {place: names, **dict(list(self._names.items())[:_NAMES_OF])}
        return names.get(number, "")

    def _told(self, key: ProcessKey, read: Callable[[Sealed], _What | None]) -> _What | None:
        number = self._where.get(key)
        sealed = None if number is None else self._open(number)
        if number is None or sealed is None:
            return None
        with sealed:
            try:
                return read(sealed)
            except Broken as error:
                self._tell(number, error)
                return None

    def usage(
        self, pieces: tuple[HourFile, ...], since_ns: int, stop: Callable[[], None]
    ) -> Iterator[tuple[list[Sum], dict[int, str]]]:
        """Yield sums() and names of far ends of each file, for rows last seen since then."""
        for piece in pieces:
            if piece.newest_ns < since_ns:
                return
            stop()
            sealed = self._open(piece.number)
            if sealed is None:
                continue
            with sealed:
                try:
                    if piece.oldest_ns >= since_ns:
                        yield sealed.usage(), sealed.names()
                        continue
                    rows = _joined(sealed.rows(since_ns))
                    new = rows["last_ns"] >= since_ns
                    rows = {name: column[new] for name, column in rows.items()}
                    yield sums(rows, places_in(sealed.processes())), sealed.names()
                except Broken as error:
                    self._tell(piece.number, error)

    # # Removal

    def too_old(self, before: int) -> list[int]:
        """Return the numbers of files whose rows were all last seen before that second."""
        return [piece.number for piece in self.pieces if piece.seen < before]

    def surplus(self, keep: int) -> dict[int, set[tuple[int, str]]]:
        """Return what to remove to keep `keep` bytes: (payer, program) for each file.

        The payer with most bytes loses first, of its programs the one with most, of that the oldest
        files.
        """
        of: dict[int, Counter[str]] = {}
        for piece in self.pieces:
            for payer, program, rows in piece.shares:
                of.setdefault(payer, Counter())[program] += piece.bytes_of(rows)
        allowed = level({payer: sum(one.values()) for payer, one in of.items()}, keep)
        left: Counter[tuple[int, str]] = Counter()
        for payer, programs in of.items():
            if sum(programs.values()) > allowed:
                most = level(programs, allowed)
                for program, size in programs.items():
                    if size > most:
                        left[payer, program] = size - most
        goes: dict[int, set[tuple[int, str]]] = {}
        for piece in sorted(self.pieces, key=lambda piece: (piece.seen, piece.number)):
            for payer, program, rows in piece.shares:
                if left[payer, program] > 0:
                    left[payer, program] -= piece.bytes_of(rows)
                    goes.setdefault(piece.number, set()).add((payer, program))
        return goes

    def without(self, piece: HourFile, which: set[tuple[int, str]]) -> Contents | None:
        """Return what stays of a file; None: nothing. Raises Broken."""
        told = {(payer, program) for payer, program, _ in piece.shares}
        if told <= which:
            return None
        sealed = self._open(piece.number)
        if sealed is None:
            return None
        with sealed:
            rows = _joined(sealed.rows())
            details, names = sealed.processes(), sealed.names()
        programs = _programs(rows["comm"], rows["payer"], {one for one in told if one[1]})
        stays = np.array(
            [pair not in which for pair in zip(rows["payer"].tolist(), programs, strict=True)], bool
        )
        if not stays.any():
            return None
        rows = {name: column[stays] for name, column in rows.items()}
        owners = set(zip(rows["tgid"].tolist(), rows["start_ns"].tolist(), strict=True))
        details = {key: raw for key, raw in details.items() if key in owners}
        numbers = set(rows["domain"].tolist())
        names = {number: name for number, name in names.items() if number in numbers}
        return Contents(rows, details, sums(rows, places_in(details)), names, piece.number)


def _joined(parts: Iterable[Rows]) -> Rows:
    found = list(parts)
    if not found:
        raise Broken("it has no rows")
    return {name: np.concatenate([one[name] for one in found]) for name in found[0]}


def _piece(number: int, rows: Rows, size: int, replaces: int) -> HourFile:
    pairs = Counter(zip(rows["payer"].tolist(), rows["comm"].tolist(), strict=True))
    shares: Counter[tuple[int, str]] = Counter()
    told: Counter[int] = Counter()
    for (payer, comm), count in pairs.most_common():
        told[payer] += 1
        shares[payer, _program(comm) if told[payer] <= _PROGRAMS else ""] += count
    return HourFile(
        number,
        len(rows["id"]),
        size,
        int(rows["id"].max()),
        int(rows["first_ns"].min()),
        int(rows["last_ns"].min()),
        int(rows["last_ns"].max()),
        int(rows["seen"].max()),
        [(payer, program, count) for (payer, program), count in shares.items()],
        replaces,
    )


def _program(comm: bytes) -> str:
    """Return a program's name, never empty: "" stands for the rest."""
    return comm.hex() or "-"


def _programs(comms: np.ndarray, payers: np.ndarray, told: set[tuple[int, str]]) -> list[str]:
    names = {comm: _program(comm) for comm in set(comms.tolist())}
    return [
        name if (payer, name := names[comm]) in told else ""
        for comm, payer in zip(comms.tolist(), payers.tolist(), strict=True)
    ]
