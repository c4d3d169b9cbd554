# SPDX-License-Identifier: MIT
"""What engine ebpf has told until now, and what is attached to the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import struct
from pathlib import Path

import numpy as np

from nlproto.engines.engine import Engine
from nlproto.pipeline.account import Account
from nlproto.records.wire import RECORD, Batch

__all__ = ["attached", "is_there", "links", "records_of"]


def links() -> int:
    """How many programs are attached, by whomever."""
    return len(attached("[0-9]*"))


def is_there(link: int) -> bool:
    """Whether the kernel still has this link."""
    attributes = struct.pack("=4I", link, 0, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    number = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
    fd: int = libc.syscall(number, 30, attributes, len(attributes))  # BPF_LINK_GET_FD_BY_ID
    if fd < 0:
        assert ctypes.get_errno() == errno.ENOENT, os.strerror(ctypes.get_errno())
        return False
    os.close(fd)
    return True


def attached(pid: int | str) -> list[int]:
    """The links by which a process has programs attached."""
    found: list[str] = []
    for info in Path("/proc").glob(f"{pid}/fdinfo/*"):
        try:
            found += re.findall(r"^link_id:\s*(\d+)", info.read_text(), re.MULTILINE)
        except OSError:
            continue
    return [int(one) for one in found]


def records_of(engine: Engine, account: Account) -> np.ndarray:
    """Everything until now, counted."""
    parts = [np.zeros(0, RECORD)]
    for event in (*engine.read(0.1), *engine.finish()):
        if isinstance(event, Batch):
            account.add(event.head, event.records)
            account.deliver(event.records["how"])
            parts.append(event.records)
    account.close(engine.closing)
    return np.concatenate(parts)
