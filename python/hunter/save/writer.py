# SPDX-License-Identifier: MIT
"""A small process that writes a capture, so that SIGKILL of the hunter cuts no row.

If a process is killed, the kernel stops its write() between two pages (generic_perform_write in
mm/filemap.c). This process is not the one that is killed. It writes completely what it received
completely, and ends when its channel ends.

The channel is its standard input, a stream socket. It receives a u32 length and so many bytes, in
native order. For each it sends back a u32 errno: 0 if all is in the file (its standard output),
else nothing is. This file is also the program, and runs alone: it imports nothing of the project.
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
        # a session of its own: the hunter handles Ctrl-C and the end of the terminal
        command = [sys.executable, *arguments]
        return channel, subprocess.Popen(
            command, stdin=theirs.fileno(), stdout=fd, start_new_session=True
        )


class Writer:
    """Appends pieces to the file open as `fd`, at its offset, by a process of its own."""

    def __init__(self, fd: int) -> None:
        self._channel, self._process = start(["-I", "-S", __file__], fd)

    def append(self, piece: bytes) -> None:
        """Append all of `piece`, or nothing. Raises OSError as write(2) does."""
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
                break  # killed while it sent the answer
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
