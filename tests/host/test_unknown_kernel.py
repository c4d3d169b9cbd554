# SPDX-License-Identifier: MIT
"""On a kernel that lacks what the module needs the build ends at once, and names it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "vm"))

from vmtest.build import BuildFailed, copy_sources, make  # noqa: E402
from vmtest.kernels import KERNELS, UnpackedKernel, cache_directory, unpack  # noqa: E402

SECURITY, SCHED = "linux/security.h", "trace/events/sched.h"
CHANGES = [
    (SECURITY, r"int security_socket_bind\(", "int security_socket_tie(", "security_socket_bind"),
    (SECURITY, r"(post_create\(struct socket \*sock), int family", r"\1", "socket_post_create"),
    (SECURITY, r"graft\(struct sock ?\*sk, ", "graft(", "security_sock_graft"),
    ("net/sock.h", r"__receive_sock\(", "__got_sock(", "__receive_sock"),
    (SECURITY, r"security_sk_free\(struct sock \*", "security_sk_free(struct socket *", "sk_free"),
    ("linux/fs.h", r"locks_remove_posix\(", "locks_drop_posix(", "locks_remove_posix"),
    (SCHED, r"(sched_process_exec,\s+TP_PROTO\()struct task_struct \*p, ", r"\1", "process_exec"),
    (SCHED, r"TRACE_EVENT\(sched_process_fork", "TRACE_EVENT(forked", "sched_process_fork"),
    ("trace/events/task.h", r"task_rename", "task_named", "task_rename"),
    ("trace/events/sock.h", r"const int oldstate, ", "", "inet_sock_set_state"),
    ("trace/events/tcp.h", r"tcp_send_reset,", "tcp_reset_sent,", "tcp_send_reset"),
    ("symvers", r"\t__inet_lookup_established\t", "\tgone\t", "__inet_lookup_established"),
    ("symvers", r"\tudp_table\t", "\tgone\t", "udp_table"),
    ("config", r"(CONFIG_MODULES=y\n)", r"\1CONFIG_PREEMPT_RT=y\n", "without PREEMPT_RT"),
    ("config", r"CONFIG_IPV6=y\n", "", "CONFIG_IPV6"),
]
ELSEWHERE = {"symvers": "Module.symvers", "config": "include/config/auto.conf"}


@pytest.fixture(scope="module")
def kernel() -> UnpackedKernel:
    if os.environ.get("PACKET_HUNTER_KERNEL") == "own":
        pytest.skip("builds for an unpacked kernel, which a machine made for tests does not have")
    return unpack(KERNELS["6.1"], cache_directory())


@pytest.mark.parametrize(("file", "pattern", "text", "named"), CHANGES)
def test_the_build_names_what_the_kernel_lacks(
    kernel: UnpackedKernel, tmp_path: Path, file: str, pattern: str, text: str, named: str
) -> None:
    headers = f"/usr/src/linux-headers-{kernel.release}"
    place = f"{headers.replace('-amd64', '-common')}/include/{file}"
    if file in ELSEWHERE:
        place = f"{headers}/{ELSEWHERE[file]}"
    before = (kernel.root / place[1:]).read_text()
    after = re.sub(pattern, text, before)
    assert after != before
    (tmp_path / "doctored").write_text(after)
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_sources(ROOT, tree)
    with pytest.raises(BuildFailed) as failed:
        make(kernel, tree / "kmod", ["modules"], {place: tmp_path / "doctored"})
    log = str(failed.value)
    told = re.findall(r"\*\*\* (sniffer: this kernel lacks .*?see kmod/compat\.h)", log)
    assert told and named in told[0], log
    assert " CC " not in log
