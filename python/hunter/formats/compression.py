# SPDX-License-Identifier: MIT
"""Recognizes compressed data by the first bytes, and unpacks them piece by piece.

Only the piece asked for, and a window of at most 128 MiB, are in memory, however large the file.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["KINDS", "Decompressor", "Compression"]

_MEMORY = 128 << 20


class Decompressor(Protocol):
    """Like bz2.BZ2Decompressor: of one member, frame or stream; others may follow."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes | None: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Compression:
    """How data that begin with `magic` are compressed."""

    name: str
    magic: bytes
    tool: str
    """The command that unpacks it."""
    load: Callable[[], tuple[Callable[[], Any], type[Exception]]] | None = None
    """Returns the decompressor, and its errors for damaged data. Raises ImportError."""


class _Inflate:
    """zlib as a Decompressor for gzip."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail or data, max_length)


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        from backports import zstd
    return zstd.ZstdDecompressor, zstd.ZstdError


def _lz4() -> tuple[Callable[[], Any], type[Exception]]:
    from lz4.frame import LZ4FrameDecompressor

    return LZ4FrameDecompressor, RuntimeError


def _xz() -> tuple[Callable[[], Any], type[Exception]]:
    return (lambda: lzma.LZMADecompressor(memlimit=_MEMORY)), lzma.LZMAError


KINDS = (
    Compression("gzip", b"\x1f\x8b", "zcat", lambda: (_Inflate, zlib.error)),
    Compression("zstd", b"\x28\xb5\x2f\xfd", "zstdcat", _zstd),
    Compression("lz4", b"\x04\x22\x4d\x18", "lz4cat", _lz4),
    Compression("xz", b"\xfd7zXZ\0", "xzcat", _xz),
    Compression("bzip2", b"BZh", "bzcat", lambda: (bz2.BZ2Decompressor, OSError)),
    Compression("zip", b"PK\x03\x04", "unzip -p"),
)
