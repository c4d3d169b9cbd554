# SPDX-License-Identifier: MIT
"""A user without rights runs a program from a file that nobody can open any more.

hanging.py UID DIRECTORY      (root; the directory is the user's)

In a user namespace of its own it mounts a FUSE file system and an overlay over that. It starts a
program from there, and then serves no more. Prints the program's pid; "refused" if it may not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import threading
from pathlib import Path

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _BATCH_FORGET = 25, 26, 27, 29, 42
libc = ctypes.CDLL(None, use_errno=True)
PROGRAM = Path("/bin/sleep").read_bytes()


def serve(fuse: int, quiet: threading.Event) -> None:
    """include/uapi/linux/fuse.h"""
    while True:
        request = os.read(fuse, 1 << 20)
        _, op, unique, node = struct.unpack_from("=IIQQ", request)

        def reply(data: bytes = b"", error: int = 0, to: int = unique) -> None:
            os.write(fuse, struct.pack("=IiQ", 16 + len(data), error, to) + data)

        def attributes(number: int) -> bytes:
            mode = 0o40755 if number == 1 else 0o100755
            sizes = number, len(PROGRAM), len(PROGRAM) // 512 + 1
            return struct.pack("=6Q10I", *sizes, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

        if quiet.is_set() or op in (_FORGET, _BATCH_FORGET):
            continue
        if op == _INIT:
            reply(struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 256, 0, 0))
        elif op == _LOOKUP and request[40:].startswith(b"program\0"):
            reply(struct.pack("=4QII", 2, 0, 3600, 3600, 0, 0) + attributes(2))
        elif op == _LOOKUP:
            reply(error=-2)
        elif op == _GETATTR:
            reply(struct.pack("=QII", 3600, 0, 0) + attributes(node))
        elif op in (_OPEN, _OPENDIR):
            reply(struct.pack("=QII", 1, 0, 0))
        elif op == _READ:
            _, begin, size = struct.unpack_from("=QQI", request, 40)
            reply(PROGRAM[begin : begin + size])
        elif op == _STATFS:
            reply(struct.pack("=QQQQQIIII24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0))
        elif op in (_FLUSH, _RELEASE, _RELEASEDIR):
            reply()
        else:
            reply(error=-38)


def refuse() -> None:
    sys.exit(print("refused", flush=True))


def main() -> None:
    uid, directory = int(sys.argv[1]), sys.argv[2]
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or its files in /proc are root's
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        refuse()
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    low, upper, work, top = (f"{directory}/{name}" for name in ("low", "upper", "work", "top"))
    for folder in (low, upper, work, top):
        os.mkdir(folder)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        refuse()
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"hanging", low.encode(), b"fuse", 0, options):
        refuse()
    quiet = threading.Event()
    threading.Thread(target=serve, args=(fuse, quiet), daemon=True).start()
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
