# SPDX-License-Identifier: MIT
"""Classic BPF programs for sockets: unwanted packets are not copied.

Sources: Documentation/networking/filter.rst, include/uapi/linux/filter.h.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Mapping, Sequence

__all__ = ["AD", "Step", "attach", "assemble"]

SO_ATTACH_FILTER = 26
AD = 0xFFFFF000
"""SKF_AD_OFF: offset for loads of data that is not in the packet."""
_RET = 0x06

Step = tuple[int, int | str, int | str, int] | str
"""(code, target if true, target if false, k), or a label. A target is a label or a distance."""


def assemble(steps: Sequence[Step], take: int) -> list[tuple[int, int, int, int]]:
    """Return the program. Labels "drop" and "take" (with `take` bytes) are its two ends."""
    program = [step for step in steps if not isinstance(step, str)]
    labels: dict[str, int] = {"drop": len(program), "take": len(program) + 1}
    at = 0
    for step in steps:
        if isinstance(step, str):
            labels[step] = at
        else:
            at += 1
    program += [(_RET, 0, 0, 0), (_RET, 0, 0, take)]
    return [
        (code, _distance(labels, at, yes), _distance(labels, at, no), value)
        for at, (code, yes, no, value) in enumerate(program)
    ]


def _distance(labels: Mapping[str, int], at: int, target: int | str) -> int:
    return labels[target] - at - 1 if isinstance(target, str) else target


def attach(sock: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Let `sock` receive only what `program` takes. Raises OSError."""
    code = b"".join(struct.pack("=HBBI", *step) for step in program)
    held = ctypes.create_string_buffer(code)
    pointer = struct.pack("@HP", len(program), ctypes.addressof(held))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, pointer)
