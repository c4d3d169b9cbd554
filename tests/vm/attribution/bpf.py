# SPDX-License-Identifier: MIT
"""Just enough of bpf(2) to load a program of a few instructions and to fill a map of sockets."""

from __future__ import annotations

import ctypes
import os
import socket
import struct

from .stage import LIBC, Unable

SYS_BPF = 321
MAP_CREATE, MAP_UPDATE, PROG_LOAD, PROG_ATTACH, LINK_CREATE = 0, 2, 5, 8, 28
MAP_TYPE_SOCKMAP = 15
# linux/bpf.h: program types, where they attach, and helper functions
SOCKET_FILTER, SK_MSG, SK_LOOKUP = 1, 16, 30
ATTACH_SK_MSG_VERDICT, ATTACH_SK_LOOKUP = 7, 36
MAP_LOOKUP_ELEM, MSG_REDIRECT_MAP, SK_RELEASE, SK_ASSIGN = 1, 60, 86, 124
# Instructions used here: a register with a constant, with a register, from and to memory
MOV, ADD, MOV_REG, LOAD, STORE, LOAD_MAP = 0xB7, 0x07, 0xBF, 0x61, 0x63, 0x18
EQUAL, UNEQUAL, CALL, EXIT = 0x15, 0x55, 0x85, 0x95


def bpf(command: int, layout: str, *values: int | bytes) -> int:
    """One call of bpf(2); Unable when the kernel refuses it."""
    attributes = struct.pack(layout, *values)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = LIBC.syscall(SYS_BPF, command, buffer, len(attributes))
    if result < 0:
        raise Unable(f"bpf(2), command {command}: {os.strerror(ctypes.get_errno())}")
    return result


def op(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One instruction (struct bpf_insn)."""
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


def load_map(to: int, map_fd: int) -> bytes:
    """The instruction, of double length, that puts a map into a register."""
    return op(LOAD_MAP, to, 1, 0, map_fd) + op(0)


def load_program(kind: int, code: bytes, attach: int = 0) -> int:
    """Load a program; returns its descriptor."""
    program = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    return bpf(
        PROG_LOAD, "=IIQQIIQII16sII", kind, len(code) // 8, ctypes.addressof(program),
        ctypes.addressof(licence), 0, 0, 0, 0, 0, b"", 0, attach,
    )  # fmt: skip


def sockmap(size: int) -> int:
    """A map of sockets; returns its descriptor."""
    return bpf(MAP_CREATE, "=IIII", MAP_TYPE_SOCKMAP, 4, 8, size)


def enter_socket(map_fd: int, index: int, sock: socket.socket) -> None:
    """Put a socket into a map."""
    key = ctypes.create_string_buffer(struct.pack("=I", index), 4)
    value = ctypes.create_string_buffer(struct.pack("=Q", sock.fileno()), 8)
    bpf(MAP_UPDATE, "=QQQQ", map_fd, ctypes.addressof(key), ctypes.addressof(value), 0)
