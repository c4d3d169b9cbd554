# SPDX-License-Identifier: MIT
"""Which lines of the kernel log mean that something is wrong with the kernel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

__all__ = ["COMPLAINT", "KernelLog", "problems"]

# How the failure of a test begins when only the kernel found fault.
COMPLAINT = "the kernel complains:"

PROBLEM = re.compile(
    r"WARNING:|\bBUG\b|\bOops\b|general protection fault|Kernel panic"
    r"|rcu.*(stall|self-detected)|suspicious RCU usage"
    r"|blocked for more than|soft lockup|hard LOCKUP"
    r"|possible (circular locking|recursive locking|irq lock inversion)|inconsistent lock state"
    r"|refcount_t:|scheduling while atomic|sleeping function called from invalid context"
    r"|Invalid wait context|ODEBUG|KASAN|kmemleak: [1-9]|UBSAN|KCSAN"
    r"|unregister_netdevice: waiting|memory leak"
)

# Emulation on a busy host, not a fault of the kernel or the module.
EXCUSED = re.compile(r"clocksource: .*WARNING|hrtimer: interrupt took")
# The same head as of a fault of the module; where it was is said two lines later. nft does this on
# a 6.1 with PROVE_RCU_LIST, with or without the module: it holds a mutex that is not checked for.
SUSPICIOUS = "suspicious RCU usage"
NFT = re.compile(
    r"net/netfilter/(nf_tables_api|nft_set_[a-z]+)\.c:\d+ RCU-list traversed in non-reader section"
)

# The kernel has data races of its own. A report names both functions, with their modules.
RACE = re.compile(r"KCSAN: data-race in ")
OURS = re.compile(r"\[(sniffer|planted)\]")


def problems(lines: Iterable[str]) -> list[str]:
    """The lines that report a bug, a warning with a backtrace, a stall or a lock fault."""
    lines = list(lines)
    found = []
    for number, line in enumerate(lines):
        nfts = SUSPICIOUS in line and any(NFT.search(near) for near in lines[number : number + 5])
        kernels = RACE.search(line) and not OURS.search(line)
        if PROBLEM.search(line) and not (EXCUSED.search(line) or nfts or kernels):
            found.append(line)
    return found


class KernelLog:
    """The kernel's own log from the moment this was made on (context manager, needs root)."""

    def __enter__(self) -> KernelLog:
        self._file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._file, 0, os.SEEK_END)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self) -> list[str]:
        """Lines since the last call; those that user space wrote are left out."""
        lines: list[str] = []
        while True:
            try:
                entry = os.read(self._file, 8192).decode(errors="replace")
            except BlockingIOError:
                return lines
            except BrokenPipeError:  # the buffer wrapped: reading goes on at its oldest entry
                continue
            head, _, text = entry.partition(";")
            if int(head.split(",")[0]) >> 3 == 0:  # facility 0 is the kernel
                lines.append(text.split("\n")[0])
