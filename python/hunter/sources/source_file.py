# SPDX-License-Identifier: MIT
"""Packets of saved captures, for the same filters and views."""

from __future__ import annotations

import heapq
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Self

import numpy as np

from hunter.formats.inputs import Input
from hunter.formats.rows import Row, has_bytes, read_rows
from hunter.show.columns import FLAGS, OF_PROCESS, TEXTS, Holder, tcp_flags_of
from hunter.show.text import sound
from nlproto import Error, UsageError
from nlproto.filters.filter import Filter
from nlproto.host.procfs import Parent
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.records.ends import FlowKey, ToldEnds, Translated
from nlproto.records.first_bytes import FirstBytes
from nlproto.tables.flows import pack_address
from nlproto.tables.processes import Process, Processes

__all__ = ["FileSource"]

_ROWS = 4096
_MAX_PROCESSES = 1 << 20
_MAX_SHARED = 1 << 16
_CLOCK = Clock(0, 0)  # a saved time is the time of day already
_DIRS = {name: value for value, name in wire.DIR_NAMES.items()}
_HOW = {name: value for value, name in enumerate(wire.HOW_NAMES)}
_NOT_UTF8 = re.compile(rb"\\x([89a-f][0-9a-f])")
_U8, _U16, _U32, _U64 = 255, 65535, (1 << 32) - 1, (1 << 64) - 1
# field of RECORD -> column, greatest value, text for nothing
_NUMBERS = {
    "sport": ("sport", _U16, None),
    "dport": ("dport", _U16, None),
    "len": ("len", _U32, None),
    "netns": ("netns", _U32, None),
    "gso_segs": ("segments", _U16, 1),
    "hdr_len": ("hdr_len", _U8, 0),
    "ifindex": ("ifindex", _U32, 0),
    "tid": ("tid", _U32, 0),
    "creator": ("creator", _U32, 0),
    "cookie": ("cookie", _U64, 0),
}
_TEXTS = tuple(name for name in OF_PROCESS if name in TEXTS)
_FIELDS = (
    *_NUMBERS,
    *("time_ns", "dir", "proto", "family", "saddr", "daddr", "how", "flags", "tcp_flags"),
)
_OWNER = ("tgid", "start_ns", "uid", "comm")


class _Bad(ValueError):
    """A value that is impossible."""

    def __init__(self, column: str, value: object) -> None:
        super().__init__(f"{column} {str(value)[:40]!r} cannot be")


@dataclass(slots=True)
class _Packet:
    """One row, understood."""

    time_ns: int
    fields: dict[str, Any]
    process: Process | None
    holders: list[Holder]
    interface: str | None
    data: bytes | None
    end: FlowKey | None
    """The flow's far end is called `domain`, and NAT changes its ends."""
    domain: str
    became: Translated | None


class FileSource:
    """Reads saved captures of any format, as one in order of time.

    It reads each piece by piece, up to damage; then it raises Error, which says where. `bytes`: the
    packets' first bytes are wanted too. Raises Error, UsageError.
    """

    def __init__(self, paths: Sequence[str], filter: Filter, bytes: bool = False) -> None:
        self.description = f"from {', '.join(paths)}"
        self.tcp_flags = True
        """Whether rows tell TCP's flags."""
        self.first_bytes: FirstBytes | None = None
        self._filter = filter
        self._processes = Processes(limit=_MAX_PROCESSES)
        self.ends = self._processes.ends = ToldEnds()
        self._starts: dict[tuple[Any, ...], int] = {}
        self._holders: OrderedDict[int, list[Holder]] = OrderedDict()
        self._any_told = False
        """Whether any row had a name of its far end, or a translation."""
        self._interfaces: dict[tuple[int, int], str] = {}
        self._damage: list[Error] = []
        self._next: _Packet | None = None
        self._seq = 0
        with ExitStack() as stack:
            packets = [self._open(stack.enter_context(Input(path)), bytes) for path in paths]
            self._closing = stack.pop_all()
        if bytes:
            self.first_bytes = FirstBytes()
        self._packets: Iterator[_Packet] = (
            packets[0] if len(packets) == 1 else heapq.merge(*packets, key=lambda one: one.time_ns)
        )

    def _open(self, source: Input, bytes: bool) -> Iterator[_Packet]:
        """Files that cannot be read at all are reported at once."""
        if bytes and not has_bytes(source):
            raise UsageError(
                f"{source.name} has no bytes of packets, which pcapng is made of: save .csv,"
                " .jsonl or .parquet"
            )
        rows = read_rows(source)
        first = next(rows, None)
        if first is None:
            return iter(())
        self.tcp_flags = self.tcp_flags and "tcp_flags" in first.values
        return self._until_damage(source.name, chain((first,), rows))

    def _until_damage(self, name: str, rows: Iterator[Row]) -> Iterator[_Packet]:
        try:
            for row in rows:
                try:
                    yield self._understood(row)
                except ValueError as error:
                    raise Error(f"{name}, {row.place}: {error}") from None
        except Error as error:
            self._damage.append(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.close()

    def read(self, timeout: float) -> list[NamedBatch] | None:
        packets = self._piece()
        if not packets:
            if self._damage:
                raise Error("; ".join(map(str, self._damage)))
            return None
        records = np.zeros(len(packets), wire.RECORD)
        for name in _FIELDS:
            records[name] = [one.fields[name] for one in packets]
        for record, one in zip(records, packets, strict=True):
            if one.process is not None:
                for name in _OWNER:
                    record[name] = one.fields[name]
        records["seq"] = np.arange(self._seq, self._seq + len(packets)) & _U32
        self._seq += len(packets)
        if self.first_bytes is not None:
            self._keep(records, packets, self.first_bytes)
        head = np.zeros(1, wire.BATCH)[0]
        return [NamedBatch(head, records[self._filter.mask(records, self._processes)], _CLOCK)]

    def _piece(self) -> list[_Packet]:
        """Return the next packets. Within them no process, socket or interface changes."""
        packets: list[_Packet] = []
        told: set[tuple[str, Any]] = set()
        while len(packets) < _ROWS:
            one, self._next = self._next or next(self._packets, None), None
            if one is None:
                break
            if packets and not self._agrees(one, told):
                self._next = one
                break
            self._learn(one, told)
            packets.append(one)
        return packets

    def _facts(self, one: _Packet) -> Iterator[tuple[tuple[str, Any], Any, Any]]:
        """Yield (key, what is known of it, what `one` says of it)."""
        if one.process is not None:
            key = one.process.key
            known = self._processes.get(*key)
            # the record has the comm of its own time
            known = known and replace(known, comm=one.process.comm)
            yield ("process", key), known, one.process
        if one.holders:
            cookie = one.fields["cookie"]
            yield ("holders", cookie), self._holders.get(cookie), one.holders
        if one.end is not None:
            yield ("end", one.end), self.ends.told(one.end), (one.domain, one.became)
        if one.interface is not None:
            place = one.fields["netns"], one.fields["ifindex"]
            yield ("interface", place), self._interfaces.get(place), one.interface

    def _agrees(self, one: _Packet, told: set[tuple[str, Any]]) -> bool:
        return all(what not in told or known == said for what, known, said in self._facts(one))

    def _learn(self, one: _Packet, told: set[tuple[str, Any]]) -> None:
        for what, known, said in self._facts(one):
            told.add(what)
            if known == said:
                continue
            kind, key = what
            if kind == "process":
                self._processes.restore([said])
            elif kind == "end":
                self.ends.tell(key, *said)
            elif kind == "interface":
                self._interfaces[key] = said
            else:
                self._holders[key] = said
                if len(self._holders) > _MAX_SHARED + _ROWS:
                    self._holders.popitem(last=False)

    def _keep(
        self, records: np.ndarray, packets: Sequence[_Packet], first_bytes: FirstBytes
    ) -> None:
        found = []
        for record, one in zip(records, packets, strict=True):
            if one.data is None:
                continue
            head = np.zeros(1, wire.SNAP)[0]
            head["time_ns"], head["seq"], head["caplen"] = one.time_ns, record["seq"], len(one.data)
            found.append(wire.PacketBytes(head, one.data))
        first_bytes.keep(wire.FirstBytesBatch(np.zeros(1, wire.BATCH)[0], tuple(found)))

    def _understood(self, row: Row) -> _Packet:
        """Raises ValueError."""
        values = row.values
        fields: dict[str, Any] = {
            name: _number(values, column, highest, default)
            for name, (column, highest, default) in _NUMBERS.items()
        }
        time_ns = _time(values) if row.time_ns is None else row.time_ns
        if not 0 <= time_ns < 1 << 63:
            raise _Bad("time", time_ns)
        fields["time_ns"] = time_ns
        fields["dir"] = _word(values, "dir", _DIRS)
        fields["proto"] = _word(values, "proto", wire.PROTO_NUMBERS)
        fields["how"] = _word(values, "how", _HOW)
        fields["flags"] = sum(_word({"flags": one}, "flags", FLAGS) for one in _flags(values))
        family, source = _address(values, "src")
        other, target = _address(values, "dst")
        if family != other:
            raise _Bad("dst", values["dst"])
        fields["family"], fields["saddr"], fields["daddr"] = family, list(source), list(target)
        fields["tcp_flags"] = _tcp_flags(values)
        holders = _people(values, "holders")
        if holders:
            fields["flags"] |= wire.lib.SNIFFER_F_SHARED
            fields["cookie"] = fields["cookie"] or self._start(("holders", *map(str, holders)))
        interface = _text(values, "interface") if "interface" in values else None
        process = self._owner(values, fields)
        domain = _text(values, "domain") if process is not None else ""
        became = _translated(values, fields)
        self._any_told |= bool(domain) or became is not None
        end = _end(fields, source, target) if self._any_told else None
        return _Packet(time_ns, fields, process, holders, interface, row.data, end, domain, became)

    def _owner(self, values: Mapping[str, Any], fields: dict[str, Any]) -> Process | None:
        """Rows of the first release lack the start of a process: pid, user and exe identify it."""
        named = values.get("pid") not in ("", None)
        if named != wire.is_named(fields["how"]):
            raise _Bad("pid", values.get("pid"))
        if not named:
            return None
        pid = _number(values, "pid", _U32, None)
        uid = _number(values, "uid", _U32, None)
        if not pid:
            raise _Bad("pid", pid)
        known: dict[str, Any] = {name: _text(values, name) for name in _TEXTS}
        known["parents"] = tuple(
            Parent(int(one["pid"]), str(one["comm"])) for one in _people(values, "parents")
        )
        comm = _text(values, "comm")
        if values.get("start_ns") in ("", None):
            start = self._start((pid, uid, known["exe"]))
        else:
            start = _number(values, "start_ns", _U64, None)
        ppid = _number(values, "ppid", _U32, 0)
        fields["tgid"], fields["start_ns"], fields["uid"] = pid, start, uid
        fields["comm"] = _comm(comm)
        return Process(pid, start, comm=comm, uid=uid, ppid=ppid or None, **known)

    def _start(self, key: tuple[Any, ...]) -> int:
        return self._starts.setdefault(key, len(self._starts) + 1)

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        self._filter = filter
        return []

    def finish(self) -> list[NamedBatch]:
        return []

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        return self._processes.get(tgid, start_ns)

    def interface(self, netns: int, ifindex: int) -> str:
        return self._interfaces.get((netns, ifindex), "")

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        return {cookie: self._holders[cookie] for cookie in cookies if cookie in self._holders}

    def account(self) -> None:
        return None

    def lost(self) -> int:
        return 0


def _end(fields: Mapping[str, Any], source: bytes, target: bytes) -> FlowKey:
    near, far = (source, fields["sport"]), (target, fields["dport"])
    if fields["dir"] == wire.lib.SNIFFER_DIR_IN:
        near, far = far, near
    way = (fields["netns"], fields["proto"], fields["family"], *near, *far)
    return fields.get("tgid", 0), fields.get("start_ns", 0), way


def _translated(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Translated | None:
    """Return what NAT made of the packet's ends. Raises ValueError."""
    if values.get("nat_src") in ("", None):
        return None
    (one, source), (other, target) = _address(values, "nat_src"), _address(values, "nat_dst")
    if {one, other} != {fields["family"]}:
        raise _Bad("nat_src", values["nat_src"])
    sport, dport = (_number(values, f"nat_{end}port", 65535, None) for end in "sd")
    if fields["dir"] == wire.lib.SNIFFER_DIR_IN:
        return target, dport, source, sport
    return source, sport, target, dport


def _number(values: Mapping[str, Any], column: str, highest: int, default: int | None) -> int:
    """Raises ValueError."""
    value = values.get(column)
    if value in ("", None):
        if default is None:
            raise ValueError(f"it has no {column}")
        return default
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if type(value) is not int or not 0 <= value <= highest:
        raise _Bad(column, value)
    return value


def _text(values: Mapping[str, Any], column: str) -> str:
    value = values.get(column)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > wire.MAX_TEXT:
        raise _Bad(column, value)
    return sound(value)


def _word(values: Mapping[str, Any], column: str, known: Mapping[str, int]) -> int:
    value = values.get(column)
    if not isinstance(value, str) or value not in known:
        raise _Bad(column, value)
    return known[value]


def _flags(values: Mapping[str, Any]) -> set[str]:
    return set(_text(values, "flags").split(" ")) - {""}


def _tcp_flags(values: Mapping[str, Any]) -> int:
    text = _text(values, "tcp_flags")
    try:
        return tcp_flags_of(text)
    except ValueError:
        raise _Bad("tcp_flags", text) from None


def _address(values: Mapping[str, Any], column: str) -> tuple[int, bytes]:
    value = values.get(column)
    if not isinstance(value, str):
        raise _Bad(column, value)
    try:
        return pack_address(value)
    except ValueError:
        raise _Bad(column, value) from None


def _time(values: Mapping[str, Any]) -> int:
    """ns since 1970 of RFC 3339; a time without its offset is in UTC."""
    value = values.get("time")
    if not isinstance(value, str):
        raise _Bad("time", value)
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = int(moment.replace(microsecond=0).timestamp())
    except (ValueError, OverflowError):
        raise _Bad("time", value) from None
    return seconds * 10**9 + moment.microsecond * 1000


def _people(values: Mapping[str, Any], column: str) -> list[Holder]:
    value = values.get(column)
    if value in ("", None):
        return []
    if not isinstance(value, list):
        raise _Bad(column, value)
    for one in value:
        if (
            not isinstance(one, dict)
            or type(one.get("pid")) is not int
            or not 0 <= one["pid"] <= _U32
            or not isinstance(one.get("comm"), str)
            or len(one["comm"]) > wire.MAX_TEXT
        ):
            raise _Bad(column, value)
    return [{"pid": one["pid"], "comm": sound(one["comm"])} for one in value]


def _comm(text: str) -> bytes:
    """Return the kernel's bytes, from which wire.text() made `text`."""
    raw = text.encode("utf-8", "backslashreplace")
    back = _NOT_UTF8.sub(lambda found: bytes.fromhex(found[1].decode()), raw)
    return back if wire.text(back) == text else raw
