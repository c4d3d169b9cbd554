# SPDX-License-Identifier: MIT
"""Why engine ebpf does not run, or not whole, in one line."""

from __future__ import annotations

import errno
import os

import pytest

from nlproto.kernel.refusal import why_refused

NET_ADMIN, SYS_ADMIN, PERFMON, BPF = 1 << 12, 1 << 21, 1 << 38, 1 << 39
ENOUGH = NET_ADMIN | PERFMON | BPF
INTEGRITY, CONFIDENTIALITY = "none [integrity] confidentiality", "none integrity [confidentiality]"


@pytest.mark.parametrize(
    ("number", "capabilities", "lockdown", "why"),
    [
        (errno.EPERM, PERFMON | BPF, "", "it needs CAP_NET_ADMIN; run it as root"),
        (errno.EPERM, NET_ADMIN, "", "it needs CAP_PERFMON, CAP_BPF; run it as root"),
        (errno.EPERM, SYS_ADMIN, INTEGRITY, "vendor lets nobody trace its functions"),
        (errno.EPERM, ENOUGH, CONFIDENTIALITY, "lockdown=confidentiality"),
        (errno.EINVAL, ENOUGH, "", "older libbpf (before 1.4) needs CAP_SYS_ADMIN"),
        (errno.EACCES, ENOUGH, "", "refuses its programs (Permission denied)"),
    ],
)
def test_a_refusal_is_told_by_its_cause(
    number: int, capabilities: int, lockdown: str, why: str
) -> None:
    error = OSError(number, os.strerror(number))
    assert why in why_refused(error, capabilities, lockdown)
