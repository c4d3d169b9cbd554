# SPDX-License-Identifier: MIT
"""Engine ebpf on the kernel that runs us, whole or in parts: no doubtful name without AMBIGUOUS."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it loads programs")

# What hangs on descriptors that are passed, inherited, shared and closed, by calls and rings.
SCENARIOS = (
    *("tcp_accept_fork_close", "scm_rights_receiver_reads", "scm_rights_receiver_polls"),
    *("scm_rights_in_flight", "pidfd_getfd", "exec_after_socket", "vfork_exec_inherited"),
    *("listener_shared_in_epoll", "listener_passed", "prefork_server", "tcp_reuseport"),
    *("descriptor_table_shared", "exec_out_of_shared_table", "last_user_exits"),
    *("last_user_closes", "last_user_closes_by_dup2", "last_user_closes_a_range"),
    *("scm_rights_cut_short", "shared_table_unshared", "shared_table_split_by_close_range"),
    *("partner_in_table_closes", "partner_closes_in_a_copy", "thread_with_the_last_table_ends"),
    *("splice_from_shared_socket", "splice_into_closed_window", "io_uring_fixed_file"),
    *(
        "ring_closed",
        "ring_closed_by_exec",
        "ring_has_what_was_closed",
        "ring_closed_another_keeps",
    ),
    *("ring_without_a_descriptor", "ring_unregisters_its_files", "socket_without_a_descriptor"),
    *("kernel_tunnel", "socket_replaced_by_supervisor", "udp_receive_only"),
    *("raw_socket_sends_udp", "udp_with_ip_options", "reset_of_listener", "tcp_refused"),
    *("tcp_syn_cookies", "tcp_fast_open", "tcp_queue_migrated", "tcp_fin_wait2_and_time_wait"),
)


def test_sockets_that_change_hands_are_named_or_flagged(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "attribution.run", "--engine", "ebpf", "--scale", "0.1"]
    command += ["--json", str(out), *(word for name in SCENARIOS for word in ("--only", name))]
    path = f"{ROOT / 'python'}:{ROOT / 'tests'}:{ROOT / 'tests/vm'}"
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if not out.exists():
        ctypes.CDLL("libbpf.so.1")
        assert "engine ebpf cannot run" in done.stderr, done.stderr
        pytest.skip(done.stderr.strip().splitlines()[-1])
    total = json.loads(out.read_text())["total"]
    assert total["scenarios"] >= 0.8 * len(SCENARIOS), done.stdout
    assert total["wrong"] == total["wrong_told"], done.stdout
    assert not total["wrong_reason"], done.stdout
    assert total["right"] + total["rightly_unnamed"] >= 0.98 * total["packets"], done.stdout
