# SPDX-License-Identifier: MIT
"""A FUSE file system with one file, mounted by a user without rights in a user namespace."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from typing import NoReturn

__all__ = ["OPEN", "READ", "WRITE", "become", "libc", "mount", "refuse", "serve"]

_LOOKUP, _FORGET, _GETATTR, OPEN, READ, WRITE, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 16, 17, 18
_FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _BATCH_FORGET = 25, 26, 27, 29, 42
_INITIAL = struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 256, 0, 0)
_STATUS = struct.pack("=QQQQQIIII24x", 1, 1, 1, 1, 1, 4096, 255, 4096, 0)
_OPENED = struct.pack("=QII", 1, 0, 0)
libc = ctypes.CDLL(None, use_errno=True)


def refuse() -> NoReturn:
    """End, and say that users may not do this here."""
    sys.exit(print("refused", flush=True))


def become(uid: int) -> None:
    """Become this user, root of user and mount namespaces of its own."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or its files in /proc are root's
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        refuse()
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {uid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount(directory: str) -> int:
    """Return the descriptor whose requests serve() answers."""
    try:
        fuse = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        refuse()
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"fuse", os.fsencode(directory), b"fuse", 0, options):
        refuse()
    return fuse


def serve(
    fuse: int,
    name: bytes,
    size: int,
    own: Mapping[int, Callable[[bytes], bytes | None]],
    quiet: threading.Event,
) -> None:
    """Answer until `quiet`, see include/uapi/linux/fuse.h.

    `own` answers by operation, from what follows a request's head. None: it is not answered.
    """

    def attributes(node: int) -> bytes:
        mode = 0o40755 if node == 1 else 0o100777
        sizes = node, size, size // 512 + 1
        return struct.pack("=6Q10I", *sizes, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    answers: dict[int, bytes] = {_INIT: _INITIAL, _STATFS: _STATUS}
    answers |= dict.fromkeys((OPEN, _OPENDIR), _OPENED)
    answers |= dict.fromkeys((_FLUSH, _RELEASE, _RELEASEDIR), b"")
    while not quiet.is_set():
        request = os.read(fuse, 1 << 20)
        _, op, unique, node = struct.unpack_from("=IIQQ", request)
        if quiet.is_set() or op in (_FORGET, _BATCH_FORGET):
            continue
        error, data = 0, answers.get(op)
        if op in own:
            data = own[op](request[40:])
            if data is None:
                continue
        elif op == _LOOKUP and request[40:] == name + b"\0":
            data = struct.pack("=4QII", 2, 0, 3600, 3600, 0, 0) + attributes(2)
        elif op == _GETATTR:
            data = struct.pack("=QII", 3600, 0, 0) + attributes(node)
        elif data is None:
            error, data = -2 if op == _LOOKUP else -38, b""
        os.write(fuse, struct.pack("=IiQ", 16 + len(data), error, unique) + data)
