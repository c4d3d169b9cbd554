# SPDX-License-Identifier: MIT
"""A piece of the history, about an hour, as a file of columns that never changes.

    magic | blobs | index | length and CRC-32 of the index | magic

Each blob is compressed by zlib. Rows are in order of their last packet, in groups of 8,192. Each
group is one blob, so a question unpacks only groups that can have its rows. Needles say which: for
each port, address, program, pid and user, a bit for each group. A number takes as many bytes as the
range of its group needs. Bytes of equal weight lie side by side. Repeated values are numbers of a
dictionary's entries. The index is JSON.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np

from daemon.history.details import Sum
from daemon.history.memory import Question, matching
from daemon.history.schema import FLOW_COLUMNS
from nlproto.errors import Error
from nlproto.tables.flows import FLOW
from nlproto.tables.processes import ProcessKey

__all__ = ["Broken", "Contents", "Sealed", "seal"]

_MAGIC = b"pkhour1\n"
_TAIL = struct.Struct("<II8s")
_GROUP = 8192
_DETAILS = 256  # processes in a blob
_MAX_INDEX = 16 << 20
_MAX_BLOB = 1 << 28
"""The most bytes that one blob may unpack to."""
_ADDRESSES = ("laddr", "raddr", "nat_laddr", "nat_raddr")
_WIDE = (*_ADDRESSES, "comm")
"""Columns of 16 bytes. They always use a dictionary."""
_BYTES = np.dtype("S16")
_RARE = ("rtt_us", "retransmits", "tcp_in", "tcp_out")
"""Columns that are left out of a file if they are all zero."""
SEALED_COLUMNS = ("id", *FLOW_COLUMNS, "payer", "seen")

_Kind = TypeVar("_Kind")

Rows = dict[str, np.ndarray]
"""Columns by name, of one length: id, those of FLOW, payer, seen."""


class Broken(Error):
    """The file is damaged."""


class _Column(msgspec.Struct, frozen=True):
    name: str
    dictionary: tuple[int, int] | None
    """Place and length of the dictionary's blob; None: plain numbers."""


class _Group(msgspec.Struct, frozen=True):
    place: tuple[int, int]
    rows: int
    oldest_ns: int
    newest_ns: int
    """First and last of the rows' last packets."""
    packing: list[tuple[int, int]]
    """(least value, bytes of each) for each column."""


class _Needles(msgspec.Struct, frozen=True):
    values: tuple[int, int]
    masks: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    columns: list[_Column]
    groups: list[_Group]
    needles: dict[str, _Needles]
    processes: list[tuple[int, int, tuple[int, int]]]
    """tgid and start_ns of the first in each blob, and the blob's place; in that order."""
    replaces: int
    first_id: int
    usage: tuple[int, int]
    names: tuple[int, int]


class Contents(msgspec.Struct, frozen=True):
    """Input of seal().

    `rows`, details of their owners as JSON, sums for usage, and names of far ends by number.
    """

    rows: Rows
    processes: Mapping[ProcessKey, bytes]
    usage: list[Sum]
    names: Mapping[int, str]
    replaces: int = 0
    """The number of the file that this one replaces."""


def seal(contents: Contents) -> bytes:
    """Return the file's bytes. Rows may come in any order."""
    order = np.argsort(contents.rows["last_ns"], kind="stable")
    count = len(order)
    absent = np.zeros(count, np.uint64)  # files of older versions lack these
    rows = {name: contents.rows.get(name, absent)[order] for name in SEALED_COLUMNS}
    parts = [_MAGIC]
    at = len(_MAGIC)

    def put(data: bytes) -> tuple[int, int]:
        nonlocal at
        blob = zlib.compress(data, 6)
        parts.append(blob)
        place = at, len(blob)
        at += len(blob)
        return place

    columns, numbers = [], []
    stored = [name for name in SEALED_COLUMNS if name not in _RARE or rows[name].any()]
    for name in stored:
        found = _dictionary(name, rows[name])
        columns.append(_Column(name, None if found is None else put(found[0].tobytes())))
        numbers.append(rows[name].astype(np.uint64) if found is None else found[1])
    # durations are smaller than moments
    first, last = stored.index("first_ns"), stored.index("last_ns")
    if columns[first].dictionary is None and columns[last].dictionary is None:
        numbers[first] = numbers[last] - numbers[first]
    else:
        raise AssertionError
    edges = range(0, count, _GROUP)
    groups = []
    for begin in edges:
        part = slice(begin, begin + _GROUP)
        packed = [_packed(column[part]) for column in numbers]
        moments = rows["last_ns"][part]
        groups.append(
            _Group(
                put(b"".join(data for _, _, data in packed)),
                len(moments),
                int(moments[0]),
                int(moments[-1]),
                [(base, width) for base, width, _ in packed],
            )
        )
    needles = {}
    for kind, (values, found_in) in _needles(rows, count).items():
        names, places = np.unique(values, return_inverse=True)
        bits = np.zeros((len(names), len(edges)), bool)
        bits[places, found_in // _GROUP] = True
        masks = np.packbits(bits, axis=1)
        needles[kind] = _Needles(put(names.tobytes()), put(masks.tobytes()))
    details = sorted(contents.processes.items())
    processes = [
        (*part[0][0], put(b"\n".join(b"%d %d %s" % (*key, raw) for key, raw in part)))
        for part in (details[at : at + _DETAILS] for at in range(0, len(details), _DETAILS))
    ]
    index = msgspec.json.encode(
        _Index(
            columns,
            groups,
            needles,
            processes,
            contents.replaces,
            int(rows["id"].min(initial=0)),
            put(msgspec.json.encode(contents.usage)),
            put(msgspec.json.encode(dict(contents.names))),
        )
    )
    return b"".join([*parts, index, _TAIL.pack(len(index), zlib.crc32(index), _MAGIC)])


def _dictionary(name: str, column: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (distinct values, which of them each row has), if that is shorter."""
    if name in ("first_ns", "last_ns"):
        return None
    if name in _WIDE:
        column = np.ascontiguousarray(column).view(_BYTES).reshape(-1)
    values, places = np.unique(column, return_inverse=True)
    if name not in _WIDE and len(values) * 8 > len(column):
        return None
    if name not in _WIDE:
        values = values.astype(np.uint64)
    return values, places.astype(np.uint64)


def _packed(column: np.ndarray) -> tuple[int, int, bytes]:
    """Return (least value, bytes of each, the bytes of one place side by side)."""
    base = int(column.min())
    rest = column - np.uint64(base)
    width = (int(rest.max()).bit_length() + 7) // 8
    planes = np.ascontiguousarray(rest).view(np.uint8).reshape(-1, 8)[:, :width]
    return base, width, planes.T.tobytes()


def _unpacked(data: bytes, at: int, rows: int, base: int, width: int) -> np.ndarray:
    planes = np.zeros((rows, 8), np.uint8)
    got = np.frombuffer(data, np.uint8, rows * width, at).reshape(width, rows)
    planes[:, :width] = got.T
    return planes.view(np.uint64).reshape(-1) + np.uint64(base)


def _needles(rows: Rows, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind: values, and the row of each."""
    every = np.arange(count)
    passing = np.flatnonzero(rows["forwarded"])
    translated = np.flatnonzero(rows["nat_lport"])
    both = np.intersect1d(passing, translated)

    def addresses(name: str, which: np.ndarray = every) -> np.ndarray:
        found: np.ndarray = np.ascontiguousarray(rows[name]).view(_BYTES).reshape(-1)[which]
        return found

    named = np.flatnonzero(rows["tgid"])
    return {
        "port": (
            np.concatenate(
                [
                    *(rows["lport"], rows["rport"]),
                    *(rows[name][translated] for name in ("nat_lport", "nat_rport")),
                ]
            ).astype(np.uint16),
            np.concatenate([every, every, translated, translated]),
        ),
        "host": (
            np.concatenate(
                [
                    addresses("raddr"),
                    addresses("laddr", passing),
                    addresses("nat_raddr", translated),
                    addresses("nat_laddr", both),
                ]
            ),
            np.concatenate([every, passing, translated, both]),
        ),
        "comm": (rows["comm"].astype(_BYTES), every),
        "tgid": (rows["tgid"].astype(np.uint32), every),
        "uid": (rows["uid"][named].astype(np.uint32), named),
    }


_KINDS: dict[str, Any] = {
    "port": np.uint16,
    "host": _BYTES,
    "comm": _BYTES,
    "tgid": np.uint32,
    "uid": np.uint32,
}


class Sealed:
    """A file that seal() made, open at `fd`, which it closes; a context manager. Raises Broken."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            size = os.fstat(fd).st_size
            tail = os.pread(fd, _TAIL.size, max(0, size - _TAIL.size))
            if len(tail) < _TAIL.size:
                raise Broken("it is cut short")
            length, checksum, magic = _TAIL.unpack(tail)
            begin = size - _TAIL.size - length
            if magic != _MAGIC or length > _MAX_INDEX or begin < len(_MAGIC):
                raise Broken("it is cut short")
            raw = os.pread(fd, length, begin)
            if zlib.crc32(raw) != checksum:
                raise Broken("its index is damaged")
            self._index = msgspec.json.decode(raw, type=_Index)
        except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
            os.close(fd)
            raise Broken(str(error)) from None
        except BaseException:
            os.close(fd)
            raise
        self._dictionaries: dict[str, np.ndarray] = {}

    def __enter__(self) -> Sealed:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def replaces(self) -> int:
        return self._index.replaces

    @property
    def first_id(self) -> int:
        return self._index.first_id

    def _blob(self, place: tuple[int, int]) -> bytes:
        at, size = place
        try:
            unpack = zlib.decompressobj()
            data = unpack.decompress(os.pread(self._fd, size, at), _MAX_BLOB)
        except (OSError, ValueError, OverflowError, zlib.error, MemoryError) as error:
            raise Broken(f"at byte {at}: {error}") from None
        if not unpack.eof:
            raise Broken(f"at byte {at}: it is cut short")
        return data

    def _array(self, place: tuple[int, int], dtype: Any) -> np.ndarray:
        try:
            return np.frombuffer(self._blob(place), dtype)
        except ValueError as error:
            raise Broken(f"at byte {place[0]}: {error}") from None

    def _group(self, group: _Group) -> Rows:
        data = self._blob(group.place)
        rows: Rows = {}
        at = 0
        try:
            for column, (base, width) in zip(self._index.columns, group.packing, strict=True):
                values = _unpacked(data, at, group.rows, base, width)
                at += group.rows * width
                if column.dictionary is not None:
                    values = self._dictionary(column)[values.view(np.int64)]
                rows[column.name] = values
            return _plain(rows)
        except (ValueError, IndexError, OverflowError, KeyError, MemoryError) as error:
            raise Broken(f"at byte {group.place[0]}: {error}") from None

    def _dictionary(self, column: _Column) -> np.ndarray:
        found = self._dictionaries.get(column.name)
        if found is None:
            assert column.dictionary is not None
            kind = _BYTES if column.name in _WIDE else np.uint64
            found = self._dictionaries[column.name] = self._array(column.dictionary, kind)
        return found

    def rows(self, since_ns: int = 0) -> Iterator[Rows]:
        """Yield the groups that have a last packet at `since_ns` or later, newest first."""
        for group in reversed(self._index.groups):
            if group.newest_ns < since_ns:
                return
            yield self._group(group)

    def search(
        self, question: Question, until_ns: int, limit: int, stop: Callable[[], None]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids, FLOWs) last seen at `until_ns` or before, newest first, some `limit`."""
        since_ns = max(question.since_ns or 0, question.at_ns or 0)
        found = 0
        wanted = self._wanted(question)
        for number in reversed(range(len(self._index.groups))):
            group = self._index.groups[number]
            if found > limit or group.newest_ns < since_ns:
                return
            if group.oldest_ns > until_ns or not wanted[number]:
                continue
            stop()
            rows = self._group(group)
            fits = matching(rows, group.rows, question)
            fits = fits[rows["last_ns"][fits] <= until_ns][::-1]
            if len(fits):
                found += len(fits)
                yield rows["id"][fits], flows_of(rows, fits)

    def _wanted(self, question: Question) -> np.ndarray:
        """Return which groups can have the rows that are asked for."""
        wanted = np.ones(len(self._index.groups), bool)
        for kind, low, high in _asked(question):
            needles = self._index.needles.get(kind)
            if needles is None:
                raise Broken(f"it has no needles {kind}")
            values = self._array(needles.values, _KINDS[kind])
            first = int(np.searchsorted(values, np.array(low, _KINDS[kind])))
            end = int(np.searchsorted(values, np.array(high, _KINDS[kind]), side="right"))
            if first >= end:
                return np.zeros(len(wanted), bool)
            try:
                masks = self._array(needles.masks, np.uint8).reshape(len(values), -1)
                bits = np.bitwise_or.reduce(masks[first:end], axis=0)
                wanted &= np.unpackbits(bits, count=len(wanted)).astype(bool)
            except ValueError as error:
                raise Broken(f"its needles {kind}: {error}") from None
        return wanted

    def process(self, key: ProcessKey) -> bytes | None:
        """Return details of one owner, as JSON."""
        firsts = [(tgid, start_ns) for tgid, start_ns, _ in self._index.processes]
        at = bisect_right(firsts, key) - 1
        return self._details(self._index.processes[at][2]).get(key) if at >= 0 else None

    def processes(self) -> dict[ProcessKey, bytes]:
        """Return details of all owners."""
        found: dict[ProcessKey, bytes] = {}
        for _, _, place in self._index.processes:
            found |= self._details(place)
        return found

    def _details(self, place: tuple[int, int]) -> dict[ProcessKey, bytes]:
        found: dict[ProcessKey, bytes] = {}
        for line in self._blob(place).split(b"\n"):
            words = line.split(b" ", 2)
            if len(words) == 3:
                try:
                    found[int(words[0]), int(words[1])] = words[2]
                except ValueError:
                    raise Broken("its processes are damaged") from None
        return found

    def usage(self) -> list[Sum]:
        """Return the sums of all rows."""
        return self._json(self._index.usage, list[Sum])

    def names(self) -> dict[int, str]:
        """Return names of far ends by their number in rows."""
        return self._json(self._index.names, dict[int, str])

    def _json(self, place: tuple[int, int], kind: type[_Kind]) -> _Kind:
        try:
            return msgspec.json.decode(self._blob(place), type=kind)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Broken(str(error)) from None


def _asked(question: Question) -> Iterator[tuple[str, Any, Any]]:
    """Return (kind, least, greatest) of what a row must have to fit."""
    if question.port is not None:
        yield "port", question.port, question.port
    if question.pid is not None:
        yield "tgid", question.pid, question.pid
    if question.uid is not None:
        yield "uid", question.uid, question.uid
    if question.comm is not None:
        yield "comm", question.comm, question.comm
    if question.host is not None:
        low = question.host.network_address.packed
        yield "host", low, question.host.broadcast_address.packed
    for _, _, port in question.ends or ():
        yield "port", port, port


def _plain(rows: Rows) -> Rows:
    """Return columns with the types of FLOW, and moments instead of durations."""
    rows["first_ns"] = rows["last_ns"] - rows["first_ns"]
    count = len(rows["last_ns"])
    for name in _ADDRESSES:
        if name in rows:
            rows[name] = np.ascontiguousarray(rows[name]).view(np.uint64).reshape(-1, 2)
    for name in FLOW.names or ():  # files of older versions lack these
        if name not in rows and name != "hash":
            rows[name] = np.zeros((count, *FLOW[name].shape), FLOW[name].base)
    rows["words"] = np.ascontiguousarray(rows["comm"]).view(np.uint64).reshape(-1, 2)
    return rows


def flows_of(rows: Rows, which: np.ndarray) -> np.ndarray:
    """Return FLOWs of the rows `which`. A column that the file lacks is zero."""
    flows = np.zeros(len(which), FLOW)
    for name in (FLOW.names or ())[1:]:
        if name in rows:
            flows[name] = rows[name][which]
    return flows
