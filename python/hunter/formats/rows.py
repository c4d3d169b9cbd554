# SPDX-License-Identifier: MIT
"""Rows of a saved capture, each with its place, in any format: the first bytes show which."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any

from hunter.formats import pcapng
from hunter.formats.captures import is_pcap
from hunter.formats.ecs import is_document, row_of
from hunter.formats.headers import transport
from hunter.formats.inputs import Input
from hunter.formats.ownercomment import is_owner_comment, read_comment
from hunter.show.columns import COLUMNS, FIRST_COLUMNS, PEOPLE, TEXTS, tcp_flags
from hunter.show.text import uncell
from nlproto import Error, UsageError
from nlproto.records import wire

__all__ = ["Row", "has_bytes", "read_rows"]

_MAX_LINE = 1 << 20
_SPARE = _MAX_LINE + 1
_ROWS = 4096
_AT_ONCE = 256
_MAX_CHUNK = 1 << 30  # bytes of one column in one group of rows
_MAX_PEOPLE = 1024  # holders and parents of a packet, on average
_LIMIT = 80  # the most characters of other people's text in a message

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: values by name of column, as text or plain values, and its place."""

    place: str
    values: Values
    time_ns: int | None = None
    """Since 1970, if the column `time` does not have it."""
    data: bytes | None = None
    """The packet's first bytes."""


def has_bytes(source: Input) -> bool:
    """Return whether the rows of `source` have their packets' first bytes."""
    return source.head.startswith(b"\n\r\r\n")


def read_rows(source: Input) -> Iterator[Row]:
    """Yield the rows of `source`. Raises Error with file and place, after all earlier rows."""
    head = source.head
    if has_bytes(source):
        rows = _pcapng_rows(source)
    elif is_pcap(head):
        raise Error(
            f"{source.name} is a capture without owners: packet-hunter annotate writes them into it"
        )
    elif head.startswith(b"PAR1"):
        rows = _parquet_rows(source)
    elif head[:1] == b"{" or not head and source.name.endswith((".jsonl", ".ndjson", ".json")):
        rows = _json_rows(source)
    elif head.startswith(b"time,"):
        rows = _csv_rows(source)
    elif not head:
        raise Error(f"{source.name} is empty: no capture of packet-hunter")
    else:
        raise Error(
            f"{source.name} is no capture of packet-hunter: neither CSV with its columns, JSON"
            " lines, Parquet nor pcapng"
        )
    return source.checked(rows)


def _lines(source: Input) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line. Raises Error, also for a line without its end."""
    number = 0
    while line := source.file.readline(_SPARE):
        number += 1
        if len(line) == _SPARE:
            raise Error(f"{source.name}, line {number} is longer than {_MAX_LINE} bytes")
        if not line.endswith(b"\n"):
            raise Error(f"{source.name} ends in the middle of line {number}; all before it is read")
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise Error(f"{source.name}, line {number} is no UTF-8") from None


def _csv_rows(source: Input) -> Iterator[Row]:
    header: list[str] = []
    for number, line in _lines(source):
        try:
            fields = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise Error(f"{source.name}, line {number}: {error}") from None
        if not header:
            header = fields
            if tuple(header[: len(FIRST_COLUMNS)]) != FIRST_COLUMNS:
                raise Error(
                    f"{source.name} is no capture of packet-hunter: its first line does not name"
                    " the columns"
                )
            continue
        if tuple(fields[: len(FIRST_COLUMNS)]) == FIRST_COLUMNS:  # files were joined
            header = fields
            continue
        # a row of the first release after rows of a later one
        if len(fields) not in (len(header), len(FIRST_COLUMNS)):
            raise Error(f"{source.name}, line {number} has {len(fields)} fields, not {len(header)}")
        values: dict[str, Any] = dict(zip(header, fields, strict=False))
        for name in TEXTS & values.keys():
            values[name] = uncell(values[name])
        for name in PEOPLE:
            if values.get(name):
                values[name] = _parsed(source, number, values[name])
        yield Row(f"line {number}", values)


def _json_rows(source: Input) -> Iterator[Row]:
    for number, line in _lines(source):
        values = _parsed(source, number, line)
        if not isinstance(values, dict):
            raise Error(f"{source.name}, line {number} is no JSON object")
        if is_document(values):
            values = row_of(values)
        yield Row(f"line {number}", values)


def _parsed(source: Input, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        reason = "nested too deep"
    except ValueError as error:
        reason = str(error)
    raise Error(f"{source.name}, line {number} is no JSON: {reason[:_LIMIT]}")


def _parquet_rows(source: Input) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow: pip install 'packet-hunter[parquet]'") from None
    number = 0
    with source.seekable() or tempfile.TemporaryFile() as whole:
        try:
            with parquet.ParquetFile(_seekable(source, whole)) as file:
                texts = _checked_columns(file)
            with parquet.ParquetFile(whole, read_dictionary=texts) as file:
                names = [name for name in COLUMNS if name in file.schema_arrow.names]
                for batch in file.iter_batches(_ROWS, columns=names):
                    for column in batch.columns:
                        _check_texts(column)
                    # a few rows at a time: each of them has texts of its own
                    for at in range(0, len(batch), _AT_ONCE):
                        for values in batch.slice(at, _AT_ONCE).to_pylist():
                            number += 1
                            if isinstance(moment := values.get("time"), datetime):
                                values["time"] = moment.isoformat()
                            yield Row(f"row {number}", values)
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:_LIMIT]
            raise Error(f"{source.name} cannot be read after row {number}: {reason}") from None
        except (NotImplementedError, MemoryError, RecursionError, OverflowError) as error:
            kind = type(error).__name__
            raise Error(f"{source.name} cannot be read after row {number}: {kind}") from None


def _checked_columns(file: Any) -> list[str]:
    """Return the paths of text columns, to be read as dictionaries: a text is there only once.

    Raises ValueError if a column would fill the memory.
    """
    for at in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(at)
        for column in map(group.column, range(group.num_columns)):
            if (
                column.total_uncompressed_size > _MAX_CHUNK
                or column.num_values > _MAX_PEOPLE * group.num_rows
            ):
                raise ValueError(f"{column.path_in_schema[:_LIMIT]} is larger than can be")
    columns = map(file.schema.column, range(len(file.schema)))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _check_texts(array: Any) -> None:
    """Raises ValueError."""
    import pyarrow
    from pyarrow import compute

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        if (compute.max(compute.binary_length(array.dictionary)).as_py() or 0) > 2 * wire.MAX_TEXT:
            raise ValueError("a text is longer than can be")
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        _check_texts(array.values)
    elif pyarrow.types.is_struct(kind):
        for field in array.flatten():
            _check_texts(field)


def _seekable(source: Input, whole: IO[bytes]) -> IO[bytes]:
    """Parquet has its index at the end, so input from a pipe is copied first.

    Raises ValueError if it fills the disk: Parquet itself is compressed, and nothing more shrinks
    it to a hundredth.
    """
    if whole.readable() and not whole.writable():
        return whole
    size = 0
    while piece := source.file.read(_MAX_LINE):
        size += whole.write(piece)
        if size > _MAX_CHUNK and size > 100 * source.position:
            raise ValueError("it is compressed more than Parquet can be")
    whole.seek(0)
    return whole


_DESCRIPTION = re.compile(r"netns (\d{1,10}) ifindex (\d{1,10})")


def _pcapng_rows(source: Input) -> Iterator[Row]:
    interfaces: list[pcapng.Interface] = []
    for block in pcapng.blocks(source.file, source.name):
        if block.kind == pcapng.SECTION:
            interfaces = []
        elif block.kind == pcapng.INTERFACE:
            interfaces.append(pcapng.Interface.of(block))
        elif block.kind in (pcapng.ENHANCED, pcapng.OBSOLETE, pcapng.SIMPLE):
            place = f"the packet at byte {block.at}"
            packet = pcapng.packet_of(block, interfaces)
            if packet is None:
                raise Error(f"{source.name}, {place} is of no known interface")
            comment = next(filter(is_owner_comment, pcapng.comments(block)), None)
            if comment is None:
                raise Error(
                    f"{source.name}, {place} has no owner: packet-hunter annotate writes owners"
                    " into a capture, Wireshark shows them"
                )
            try:
                yield _pcapng_row(packet, interfaces, place, comment, pcapng.flags_of(block))
            except ValueError as error:
                raise Error(f"{source.name}, {place}: {error}") from None


def _pcapng_row(
    packet: pcapng.CapturedPacket,
    interfaces: list[pcapng.Interface],
    place: str,
    comment: str,
    flags: int,
) -> Row:
    """Raises ValueError."""
    values, made = read_comment(comment)
    interface = interfaces[packet.interface]
    found = _DESCRIPTION.fullmatch(interface.description)
    values["netns"], values["ifindex"] = found.groups() if found else ("0", "0")
    values["interface"] = interface.name
    values.setdefault("len", packet.length)
    values.setdefault("dir", {1: "in", 2: "out"}.get(flags & 3, ""))
    if "src" not in values:
        values |= _told(packet)
    for name in ("pid", "uid"):
        values.setdefault(name, None)
    real = not made and packet.linktype == pcapng.LINKTYPE_RAW
    return Row(place, values, packet.time_ns, packet.data if real else None)


def _told(packet: pcapng.CapturedPacket) -> dict[str, Any]:
    """Return what the packet's own headers say. Raises ValueError."""
    found = transport(packet.linktype, packet.data)
    if isinstance(found, str):
        raise ValueError(f"no TCP or UDP packet ({found})")
    family, proto, network, at = found
    data = packet.data
    first, size = (network + 12, 4) if family == 2 else (network + 8, 16)
    name = wire.PROTO_NAMES[proto]
    values: dict[str, Any] = {
        "proto": name,
        "src": wire.address_text(family, data[first : first + size]),
        "dst": wire.address_text(family, data[first + size : first + 2 * size]),
        "sport": int.from_bytes(data[at : at + 2], "big"),
        "dport": int.from_bytes(data[at + 2 : at + 4], "big"),
    }
    if name == "tcp" and len(data) > at + 13:
        values["tcp_flags"] = tcp_flags(data[at + 13])
    return values
