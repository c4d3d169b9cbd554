# SPDX-License-Identifier: MIT
"""A process of a user without rights whose command line cannot be read: readers wait for ever.

stuck.py UID DIRECTORY      (root; the directory is the user's)

In a user namespace of its own it mounts a FUSE file system that never writes back. It maps a file
there, so mmap() waits with the lock of the address space held. A read of /proc/PID/cmdline needs
that lock. Prints its pid when mmap() waits; "refused" where it may not mount.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import threading
import time

from fuse import OPEN, READ, WRITE, become, libc, mount, serve

_DIRECT_IO = 1
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def serve_but_writing(fuse: int, written: int) -> None:
    """The first open is a direct one."""
    flags = iter([_DIRECT_IO])

    def opened(_: bytes) -> bytes:
        return struct.pack("=QII", 1, next(flags, 0), 0)

    def write(_: bytes) -> None:
        os.write(written, b"x")

    own = {OPEN: opened, READ: lambda _: b"\0" * 4096, WRITE: write}
    serve(fuse, b"file", 4096, own, threading.Event())


def main() -> None:
    uid, directory = int(sys.argv[1]), sys.argv[2]
    become(uid)
    fuse = mount(directory)
    reading, writing = os.pipe()
    if os.fork() == 0:
        serve_but_writing(fuse, writing)
    os.close(fuse)  # when the server ends, so does the waiting
    direct = os.open(f"{directory}/file", os.O_RDWR)
    cached = os.open(f"{directory}/file", os.O_RDWR)
    ctypes.memmove(libc.mmap(None, 4096, 3, 1, cached, 0), b"dirty", 5)
    threading.Thread(target=libc.mmap, args=(None, 4096, 1, 2, direct, 0), daemon=True).start()
    os.read(reading, 1)
    time.sleep(0.1)  # it is about to wait
    print(os.getpid(), flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
