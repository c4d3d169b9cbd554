# SPDX-License-Identifier: MIT
"""Why a kernel refuses BPF programs, in one line for people."""

from __future__ import annotations

import errno
from pathlib import Path

__all__ = ["why_refused", "why_refused_here"]

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}
_CAP_SYS_ADMIN = 21


def why_refused_here(error: OSError) -> str:
    """Return the line for this process on this kernel."""
    status = Path("/proc/self/status").read_text()
    try:
        lockdown = Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        lockdown = ""
    effective = int(status.partition("CapEff:")[2].split()[0], 16)
    return why_refused(error, effective, lockdown)


def why_refused(error: OSError, capabilities: int, lockdown: str) -> str:
    """Return one line for people: why the kernel refuses the programs.

    `capabilities`: the effective ones, a bit each; `lockdown` as in securityfs.
    """
    missing = [name for name, bit in _CAPABILITIES.items() if not capabilities >> bit & 1]
    if missing and not capabilities >> _CAP_SYS_ADMIN & 1:
        return f"it needs {', '.join(missing)}; run it as root"
    if error.errno == errno.EINVAL and not capabilities >> _CAP_SYS_ADMIN & 1:
        # the verifier searches the kernel's modules for what this kernel lacks, and gives up
        return "an older libbpf (before 1.4) needs CAP_SYS_ADMIN for all of it"
    if "[confidentiality]" in lockdown:
        return "this kernel lets nobody read it (lockdown=confidentiality)"
    if error.errno == errno.EPERM:  # EACCES: the verifier cannot prove that a program is safe
        return "this kernel's vendor lets nobody trace its functions"
    return f"this kernel refuses its programs ({error.strerror})"
