# SPDX-License-Identifier: MIT
"""Just enough of bpf(2) to load a program of a few instructions and to fill a map of sockets."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from .stage import LIBC, Unable, run

SYS_BPF, SYS_PERF_EVENT_OPEN = 321, 298
PERF_TYPE_TRACEPOINT, PERF_EVENT_IOC_ENABLE, PERF_EVENT_IOC_SET_BPF = 2, 0x2400, 0x40042408
MAP_CREATE, MAP_UPDATE, PROG_LOAD, PROG_ATTACH, RAW_TRACEPOINT_OPEN, LINK_CREATE = (
    0,
    2,
    5,
    8,
    17,
    28,
)
MAP_TYPE_SOCKMAP = 15
# linux/bpf.h: program types, where they attach, and helper functions
SOCKET_FILTER, KPROBE, SK_MSG, LSM, SK_LOOKUP = 1, 2, 16, 29, 30
ATTACH_SK_MSG_VERDICT, ATTACH_LSM_MAC, ATTACH_SK_LOOKUP = 7, 27, 36
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


def load_program(kind: int, code: bytes, attach: int = 0, function: int = 0) -> int:
    """Load a program, for a function of the kernel by its BTF id; returns its descriptor."""
    program = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    return bpf(
        PROG_LOAD, "=IIQQIIQII16sII36xI4x", kind, len(code) // 8, ctypes.addressof(program),
        ctypes.addressof(licence), 0, 0, 0, 0, 0, b"", 0, attach, function,
    )  # fmt: skip


def sockmap(size: int) -> int:
    """A map of sockets; returns its descriptor."""
    return bpf(MAP_CREATE, "=IIII", MAP_TYPE_SOCKMAP, 4, 8, size)


def enter_socket(map_fd: int, index: int, sock: socket.socket) -> None:
    """Put a socket into a map."""
    key = ctypes.create_string_buffer(struct.pack("=I", index), 4)
    value = ctypes.create_string_buffer(struct.pack("=Q", sock.fileno()), 8)
    bpf(MAP_UPDATE, "=QQQQ", map_fd, ctypes.addressof(key), ctypes.addressof(value), 0)


def watch_event(number: int) -> int:
    """Run a program at each event of tracefs with this id, a kprobe's; ends with the descriptor."""
    program = load_program(KPROBE, op(MOV) + op(EXIT))
    # linux/perf_event.h: type, size, config
    attributes = struct.pack("=IIQ48x", PERF_TYPE_TRACEPOINT, 64, number)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    event: int = LIBC.syscall(SYS_PERF_EVENT_OPEN, buffer, -1, 0, -1, 0)
    if event < 0:
        raise Unable(f"perf_event_open: {os.strerror(ctypes.get_errno())}")
    fcntl.ioctl(event, PERF_EVENT_IOC_SET_BPF, program)
    fcntl.ioctl(event, PERF_EVENT_IOC_ENABLE, 0)
    os.close(program)
    return event


# Bytes that follow a type of each kind in BTF: of the type, and of each of its members
BTF_EXTRA = {1: (4, 0), 3: (12, 0), 4: (0, 12), 5: (0, 12), 6: (0, 8), 13: (0, 8), 14: (4, 0),
             15: (0, 12), 17: (4, 0), 19: (0, 12)}  # fmt: skip
BTF_FUNCTION = 12


def function_id(name: str) -> int:
    """The BTF id of a function of the kernel; Unable when it has none."""
    try:
        data = Path("/sys/kernel/btf/vmlinux").read_bytes()
    except OSError as error:
        raise Unable(f"BTF: {error.strerror}") from error
    head, types, types_size, strings = struct.unpack_from("=IIII", data, 4)
    wanted = data.index(b"\0" + name.encode() + b"\0", head + strings) + 1 - head - strings
    number, place, end = 1, head + types, head + types + types_size
    while place < end:
        text, info = struct.unpack_from("=II", data, place)
        kind = info >> 24 & 31
        if kind == BTF_FUNCTION and text == wanted:
            return number
        own, each = BTF_EXTRA.get(kind, (0, 0))
        place += 12 + own + each * (info & 0xFFFF)
        number += 1
    raise Unable(f"this kernel has no {name}")


def refuse(hook: str, error: int) -> int:
    """Have an LSM hook refuse everybody with this errno; ends with the descriptor."""
    if not Path("/sys/kernel/security/lsm").exists():
        run("mount", "-t", "securityfs", "none", "/sys/kernel/security")
    if "bpf" not in Path("/sys/kernel/security/lsm").read_text().split(","):
        raise Unable("this kernel was booted without the security module bpf")
    code = op(MOV, value=-error) + op(EXIT)
    program = load_program(LSM, code, ATTACH_LSM_MAC, function_id(f"bpf_lsm_{hook}"))
    return bpf(RAW_TRACEPOINT_OPEN, "=QI4x", 0, program)
