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

_INIT, _LOOKUP, _GETATTR, _OPEN, _READ, _WRITE, _FLUSH = 26, 1, 3, 14, 15, 16, 25
_DIRECT_IO = 1
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


def serve(fuse: int, written: int) -> None:
    """include/uapi/linux/fuse.h; the first open is a direct one."""
    opened = 0
    while True:
        request = os.read(fuse, 1 << 20)
        _, op, unique, node = struct.unpack_from("=IIQQ", request)

        def reply(data: bytes = b"", error: int = 0, to: int = unique) -> None:
            os.write(fuse, struct.pack("=IiQ", 16 + len(data), error, to) + data)

        def attributes(number: int) -> bytes:
            mode = 0o40755 if number == 1 else 0o100666
            return struct.pack(
                "=6Q10I", number, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
            )

        if op == _INIT:
            reply(struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 256, 0, 0))
        elif op == _LOOKUP:
            reply(struct.pack("=4QII", 2, 0, 3600, 3600, 0, 0) + attributes(2))
        elif op == _GETATTR:
            reply(struct.pack("=QII", 3600, 0, 0) + attributes(node))
        elif op == _OPEN:
            opened += 1
            reply(struct.pack("=QII", opened, _DIRECT_IO if opened == 1 else 0, 0))
        elif op == _READ:
            reply(b"\0" * 4096)
        elif op == _WRITE:
            os.write(written, b"x")  # and no reply
        elif op == _FLUSH:
            reply()
        elif op not in (2, 42):  # FORGET, BATCH_FORGET want no reply
            reply(error=-38)


def main() -> None:
    uid, directory = int(sys.argv[1]), sys.argv[2]
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or its files in /proc are root's
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        sys.exit(print("refused", flush=True))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        sys.exit(print("refused", flush=True))
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"stuck", os.fsencode(directory), b"fuse", 0, options):
        sys.exit(print("refused", flush=True))
    reading, writing = os.pipe()
    if os.fork() == 0:
        serve(fuse, writing)
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
