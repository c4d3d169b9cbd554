# SPDX-License-Identifier: MIT
"""Input files: regular files, pipes, standard input. They are unpacked, and never sought in."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from hunter.formats.compression import KINDS, Compression, Decompressor
from nlproto import Error
from nlproto.running.closing import Closing

__all__ = ["Input"]

_HEAD = 8
_PIECE = 1 << 16

One = TypeVar("One")


class _Stream(io.RawIOBase):
    """The data of a descriptor. A failure ends it, and is kept for Input.check()."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._back = b""
        self.position = 0
        self.failure = ""

    def readable(self) -> bool:
        return True

    def take(self, size: int) -> bytes:
        """Return up to `size` bytes, empty at the end."""
        if self._back:
            data, self._back = self._back[:size], self._back[size:]
            return data
        try:
            data = os.read(self._fd, size)
        except OSError as error:
            self.failure = error.strerror or str(error)
            return b""
        self.position += len(data)
        return data

    def head(self, size: int) -> bytes:
        """Return the next `size` bytes, or what there is, without taking them."""
        data = b""
        while len(data) < size and (more := self.take(size - len(data))):
            data += more
        self._back = data + self._back
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.take(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Unpacked(_Stream):
    """Unpacked data. Several members in a row are read as one."""

    def __init__(
        self, packed: _Stream, make: Callable[[], Decompressor], damage: type[Exception]
    ) -> None:
        super().__init__(-1)
        self._packed = packed
        self._make = make
        self._damage = damage
        self._unpack = make()

    def take(self, size: int) -> bytes:
        if self._back:
            return super().take(size)
        while not self.failure:
            data = b""
            if self._unpack.eof:
                data = (self._unpack.unused_data or b"").lstrip(b"\0")
                while not data:  # padding, which gzip(1) and xz(1) skip too
                    more = self._packed.take(_PIECE)
                    if not more:
                        self.failure = self._packed.failure
                        return b""
                    data = more.lstrip(b"\0")
                self._unpack = self._make()
            elif self._unpack.needs_input:
                data = self._packed.take(_PIECE)
                if not data:
                    self.failure = self._packed.failure or "the compressed data end in the middle"
                    return b""
            try:
                found = self._unpack.decompress(data, size)
            except (self._damage, EOFError, MemoryError):
                self.failure = "the compressed data are damaged"
                return b""
            if found:
                return found
        return b""


class Input(Closing):
    """A file to read from beginning to end; a context manager. Raises Error.

    `path` "-" is standard input. `file` reads it unpacked; `head` has its first bytes. A failed
    read ends `file` like the end of the data; check() tells the two apart.
    """

    def __init__(self, path: str) -> None:
        self.name = "standard input" if path == "-" else path
        try:
            self._fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.stat = os.fstat(self._fd)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Error(f"cannot read {self.name}: {reason}") from None
        self.size = self.stat.st_size if stat.S_ISREG(self.stat.st_mode) else None
        self._packed = self._stream = _Stream(self._fd)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self.head = self._stream.head(_HEAD)
        for kind in KINDS:
            if self.head.startswith(kind.magic):
                self._unpack(kind)
                break
        if not self.head:
            self.check()
        self.file = io.BufferedReader(self._stream, _PIECE)

    def _unpack(self, kind: Compression) -> None:
        advice = f"run {kind.tool} on it and read from standard input (-)"
        try:
            if kind.load is None:
                raise Error(f"{self.name} is compressed with {kind.name}: {advice}")
            make, damage = kind.load()
        except ImportError:
            raise Error(
                f"{self.name} is compressed with {kind.name}: {advice}, or"
                " pip install 'packet-hunter[compressed]'"
            ) from None
        self._stream = _Unpacked(self._packed, make, damage)
        self.head = self._stream.head(_HEAD)

    @property
    def position(self) -> int:
        """How many bytes of the file itself were read."""
        return self._packed.position

    def seekable(self) -> IO[bytes] | None:
        """Return the file again, from its beginning; None for a pipe, or if it is compressed."""
        if self.size is None or self._stream is not self._packed:
            return None
        file = open(os.dup(self._fd), "rb")
        file.seek(0)
        return file

    def check(self) -> None:
        """Raise Error if the data ended because reading failed."""
        if self._stream.failure:
            raise Error(f"cannot read {self.name} to its end: {self._stream.failure}")

    def checked(self, parts: Iterator[One]) -> Iterator[One]:
        """Yield `parts`, read from `file`; raise what check() raises before the next one."""
        try:
            yield from parts
        except Error:
            self.check()
            raise
        self.check()

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
