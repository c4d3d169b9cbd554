# SPDX-License-Identifier: MIT
"""A small process that does a capture's writes, so that SIGKILL of the hunter cuts no row.

The kernel gives a write() up between two pages once the process is killed
(generic_perform_write in mm/filemap.c). What this process has got whole it writes whole, and it
is another one than the one that is killed; it ends when its channel does.

Channel (its standard input, a stream socket): to it, u32 length and so many bytes, native order;
back, after each, u32 errno, 0 when all of it is in the file (its standard output), else none is.
This file is also the program, run by itself: it imports nothing of the project.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from contextlib import suppress

__all__ = ["Writer", "start"]

_NUMBER = struct.Struct("=I")


def start(arguments: list[str], fd: int) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Run Python with `arguments`; its input is the returned channel, its output goes to `fd`."""
    channel, theirs = socket.socketpair()
    with theirs:
        # a session of its own: Ctrl-C and the terminal's end are for the hunter to heed
        command = [sys.executable, *arguments]
        return channel, subprocess.Popen(
            command, stdin=theirs.fileno(), stdout=fd, start_new_session=True
        )


class Writer:
    """Has pieces appended to the file open as `fd`, at its offset, by a process of its own."""

    def __init__(self, fd: int) -> None:
        self._channel, self._process = start(["-I", "-S", __file__], fd)

    def append(self, piece: bytes) -> None:
        """Append `piece`, or nothing of it. Raises OSError: what write(2) says."""
        try:
            self._channel.sendall(_NUMBER.pack(len(piece)) + piece)
            answer = self._channel.recv(_NUMBER.size, socket.MSG_WAITALL)
        except ConnectionError:
            answer = b""
        if len(answer) < _NUMBER.size:
            raise OSError(errno.ECHILD, f"the process that writes it, {self._process.pid}, is gone")
        (error,) = _NUMBER.unpack(answer)
        if error:
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        """Let the process end."""
        self._channel.close()
        self._process.wait()


def _serve() -> None:
    """Body of the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    size = os.lseek(1, 0, os.SEEK_CUR)
    with open(0, "rb") as channel:
        while len(head := channel.read(_NUMBER.size)) == _NUMBER.size:
            (length,) = _NUMBER.unpack(head)
            piece = channel.read(length)
            if len(piece) < length:
                break  # killed while it told us
            try:
                view = memoryview(piece)
                while view:
                    view = view[os.write(1, view) :]
                size += length
                error = 0
            except OSError as failed:
                error = failed.errno or 0
                os.ftruncate(1, size)
                os.lseek(1, size, os.SEEK_SET)
            os.write(0, _NUMBER.pack(error))


if __name__ == "__main__":
    with suppress(ConnectionError):  # the hunter was killed: nobody wants the answer
        _serve()
