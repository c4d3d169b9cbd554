# SPDX-License-Identifier: MIT
"""A user without rights runs a program from a file that nobody can open any more.

hanging.py UID DIRECTORY      (root; the directory is the user's)

In a user namespace of its own it mounts a FUSE file system and an overlay over that. It starts a
program from there, and then serves no more. Prints the program's pid; "refused" if it may not.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from pathlib import Path

from fuse import READ, become, libc, mount, refuse, serve

PROGRAM = Path("/bin/sleep").read_bytes()


def read(asked: bytes) -> bytes:
    _, begin, size = struct.unpack_from("=QQI", asked)
    return PROGRAM[begin : begin + size]


def main() -> None:
    uid, directory = int(sys.argv[1]), sys.argv[2]
    become(uid)
    low, upper, work, top = (f"{directory}/{name}" for name in ("low", "upper", "work", "top"))
    for folder in (low, upper, work, top):
        os.mkdir(folder)
    fuse = mount(low)
    quiet = threading.Event()
    serving = fuse, b"program", len(PROGRAM), {READ: read}, quiet
    threading.Thread(target=serve, args=serving, daemon=True).start()
    options = f"lowerdir={low},upperdir={upper},workdir={work},userxattr".encode()
    if libc.mount(b"overlay", top.encode(), b"overlay", 0, options):
        refuse()
    reading, writing = os.pipe()  # its end is closed by exec
    child = os.fork()
    if child == 0:
        os.execv(f"{top}/program", ["program", "1000"])
    os.close(writing)
    os.read(reading, 1)
    while os.readlink(f"/proc/{child}/exe") != f"{top}/program":
        pass
    quiet.set()
    print(child, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
