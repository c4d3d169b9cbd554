# SPDX-License-Identifier: MIT
"""Batches as they travel on `flows.HOST`, `procs.HOST` and `account.HOST`.

    offset 0   magic "PHF2"
           4   kind: 1 flows, 2 procs, 3 account
           5   zero
           6   u16 bytes of one row, 0 where rows are JSON
           8   u32 rows
          12   u32 bytes of the body when unpacked
          16   u64 sequence of the batch on its host
          24   boot id, 16 bytes
          40   the body, a zstd frame

Numbers are little-endian. A body of flows is rows (ROW) by columns of two bytes: the first two of
all rows, the next two, and so on. Then come the names of far ends as JSON, by the numbers in
`domain`. Other bodies are JSON. No batch names its host: the subject does, and the
server checks who may publish there.
"""

from __future__ import annotations

import functools
import socket
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from nlproto.errors import Error

__all__ = [
    "ACCOUNT",
    "FLOWS",
    "HEAD_SIZE",
    "KINDS",
    "MAX_BODY",
    "MAX_ROWS",
    "PROCS",
    "ROW",
    "HostBatch",
    "MalformedBatch",
    "ToldAccount",
    "ToldProcess",
    "decode",
    "encode",
    "encode_flows",
    "sequence_of",
]

FLOWS, PROCS, ACCOUNT = 1, 2, 3
KINDS = {FLOWS: "flows", PROCS: "procs", ACCOUNT: "account"}
MAX_ROWS = 4096
MAX_BODY = 8 << 20
"""The most bytes of an unpacked body."""
_WINDOW_LOG = 23  # 8 MiB: what a frame may make us keep
_LEVEL = 1
_HEAD = struct.Struct("<4sBBHIIQ16s")
HEAD_SIZE = _HEAD.size
_MAGIC = b"PHF2"
_INET, _INET6 = int(socket.AF_INET), int(socket.AF_INET6)

ROW = np.dtype(
    [
        ("first_ns", "<i8"),
        ("last_ns", "<i8"),
        ("cookie", "<u8"),
        ("start_ns", "<u8"),
        ("packets_out", "<u8"),
        ("bytes_out", "<u8"),
        ("packets_in", "<u8"),
        ("bytes_in", "<u8"),
        ("domain", "<u8"),
        ("laddr", "<u8", 2),
        ("raddr", "<u8", 2),
        ("nat_laddr", "<u8", 2),
        ("nat_raddr", "<u8", 2),
        ("netns", "<u4"),
        ("tgid", "<u4"),
        ("uid", "<u4"),
        ("flags", "<u4"),
        ("lport", "<u2"),
        ("rport", "<u2"),
        ("nat_lport", "<u2"),
        ("nat_rport", "<u2"),
        ("family", "u1"),
        ("protocol", "u1"),
        ("how", "u1"),
        ("initiated", "u1"),
        ("forwarded", "u1"),
        ("nat", "u1"),
        ("reserved", "<u2"),
        ("comm", "S16"),
    ]
)
"""One row of flows. Addresses are 16 bytes in network order. Times are ns since 1970. `initiated`:
0 unknown, 1 this end, 2 the far one. `nat`: 0 none, else the family of nat_laddr and nat_raddr."""


_COLUMN = np.dtype("<u2")
"""Columns of one byte take twice the time to make. Those of a field take a fifth more bytes."""


class MalformedBatch(Error):
    """The received data is no batch of ours."""


U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
# msgspec's bounds end at 2^63 - 1, and so do times since boot and sums of a host's life
U63 = Annotated[int, Meta(ge=0, le=0x7FFFFFFFFFFFFFFF)]
Text = Annotated[str, Meta(max_length=4200)]


class ToldProcess(msgspec.Struct, frozen=True):
    """One process; "" and None for the unknown."""

    tgid: U32
    start_ns: U63
    at_ns: U63
    comm: Text = ""
    exe: Text = ""
    cmdline: Text = ""
    ppid: U32 | None = None
    parents: Annotated[tuple[Text, ...], Meta(max_length=64)] = ()
    uid: U32 | None = None
    user: Text = ""
    unit: Text = ""
    container: Text = ""
    container_name: Text = ""
    image: Text = ""
    pod: Text = ""
    sha256: Text = ""


class ToldAccount(msgspec.Struct, frozen=True):
    """The account of one host (fleet.schema.ACCOUNT)."""

    at_ns: U63
    exported: U63
    acknowledged: U63
    spooled: U63
    lost: U63
    received: U63 = 0
    dropped: U63 = 0
    delivered: U63 | None = None
    daemon_lost: U63 | None = None
    gap_ms: U63 = 0
    version: Text = ""
    engine: Text = ""


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One batch, decoded."""

    kind: int
    boot: str
    sequence: int
    rows: np.ndarray
    """ROW; none unless these are flows."""
    names: Mapping[int, str]
    told: Sequence[ToldProcess | ToldAccount]
    """Rows of the other kinds."""
    size: int = 0
    """Bytes of the unpacked body."""

    def __len__(self) -> int:
        return len(self.rows) + len(self.told)


@functools.cache
def _zstd() -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        from backports import zstd
    return zstd


@functools.cache
def _compressor() -> Any:
    """Kept for the life of the process: to make one costs more than a batch."""
    return _zstd().ZstdCompressor(level=_LEVEL)


def encode(kind: int, boot: bytes, sequence: int, told: Sequence[msgspec.Struct]) -> bytes:
    """Return a batch of `told`, at most MAX_ROWS; `boot`: 16 bytes."""
    return _packed(kind, boot, sequence, 0, len(told), msgspec.json.encode(told))


def encode_flows(boot: bytes, sequence: int, rows: np.ndarray, names: Mapping[int, str]) -> bytes:
    """Return a batch of `rows` (ROW), at most MAX_ROWS; `names`: those that `domain` refers to."""
    columns = rows.view(_COLUMN).reshape(len(rows), -1).T
    body = columns.tobytes() + (msgspec.json.encode(names) if names else b"")
    return _packed(FLOWS, boot, sequence, ROW.itemsize, len(rows), body)


def _packed(kind: int, boot: bytes, sequence: int, size: int, count: int, body: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, kind, 0, size, count, len(body), sequence, boot)
    compressor = _compressor()
    return head + bytes(compressor.compress(body, compressor.FLUSH_FRAME))


def sequence_of(payload: bytes) -> tuple[str, int]:
    """Return (boot, sequence) of a batch without unpacking it. Raises Malformed."""
    _, _, _, _, sequence, boot = _head(payload)
    return str(uuid.UUID(bytes=boot)), sequence


def _head(payload: bytes) -> tuple[int, int, int, int, int, bytes]:
    if len(payload) < HEAD_SIZE:
        raise MalformedBatch(f"{len(payload)} bytes are less than a head")
    magic, kind, zero, size, count, length, sequence, boot = _HEAD.unpack_from(payload)
    if magic != _MAGIC or zero or kind not in KINDS:
        raise MalformedBatch("no head of a batch")
    if not 0 < count <= MAX_ROWS or length > MAX_BODY:
        raise MalformedBatch(f"{count} rows in {length} bytes are none, or too many")
    if kind == FLOWS:
        fits = size >= ROW.itemsize and size % _COLUMN.itemsize == 0 and size * count <= length
    else:
        fits = size == 0
    if not fits:
        raise MalformedBatch(f"{count} rows of {size} bytes do not fit into {length}")
    return kind, size, count, length, sequence, boot


def decode(payload: bytes) -> HostBatch:
    """Return the batch in `payload`, which may be anything. Raises Malformed.

    Longer rows of a later release are read up to what this one knows.
    """
    kind, size, count, length, sequence, boot = _head(payload)
    body = _unpacked(payload[HEAD_SIZE:], length)
    rows, names = np.empty(0, ROW), {}
    told: Sequence[ToldProcess | ToldAccount] = ()
    try:
        if kind == FLOWS:
            columns = np.frombuffer(body, _COLUMN, size * count // _COLUMN.itemsize)
            known = columns.reshape(-1, count)[: ROW.itemsize // _COLUMN.itemsize]
            rows = np.ascontiguousarray(known.T).view(ROW)[:, 0]
            rest = body[size * count :]
            names = _names.decode(rest) if rest else {}
        else:
            told = (_processes if kind == PROCS else _accounts).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedBatch(f"not JSON as it should be: {error}") from None
    if kind == FLOWS and not _are_sound(rows):
        raise MalformedBatch("rows of no family")
    if kind != FLOWS and len(told) != count:
        raise MalformedBatch(f"{len(told)} rows, where the head says {count}")
    return HostBatch(kind, str(uuid.UUID(bytes=boot)), sequence, rows, names, told, length)


def _are_sound(rows: np.ndarray) -> bool:
    """Return whether all rows have valid addresses."""
    family, nat = rows["family"], rows["nat"]
    return bool(
        ((family == _INET) | (family == _INET6)).all()
        and ((nat == 0) | (nat == _INET) | (nat == _INET6)).all()
        and (rows["initiated"] <= 2).all()
    )


def _unpacked(data: bytes, length: int) -> bytes:
    """Unpack exactly one frame of `length` bytes, without more memory than that."""
    zstd = _zstd()
    decompressor = zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}
    )
    try:
        body = bytes(decompressor.decompress(data, length + 1))
    except zstd.ZstdError as error:
        raise MalformedBatch(f"no zstd frame: {error}") from None
    if len(body) != length or not decompressor.eof or decompressor.unused_data:
        raise MalformedBatch(f"the body is not one frame of {length} bytes")
    return body


_names = msgspec.json.Decoder(dict[Annotated[int, Meta(ge=0)], Text])
_processes = msgspec.json.Decoder(list[ToldProcess])
_accounts = msgspec.json.Decoder(list[ToldAccount])
