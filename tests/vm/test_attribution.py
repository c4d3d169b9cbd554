# SPDX-License-Identifier: MIT
"""The ground-truth suite with the module: each scenario is one test, and must be exact.

The scenarios themselves are in attribution/; this runs them in the guest.
PACKET_HUNTER_REPEAT=N      plays each N times
PACKET_HUNTER_LOAD=1        with two busy processes on each CPU
PACKET_HUNTER_ENGINE=ebpf   with that engine; the module is not loaded
PACKET_HUNTER_SOME=1        plays a part of them
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attribution.busy import busy
from attribution.catalog import load
from attribution.run import line, perform
from attribution.workers import BINARIES, compile_workers

REPEAT = int(os.environ.get("PACKET_HUNTER_REPEAT", "1"))
pytestmark = [
    pytest.mark.patience(600 * REPEAT),
    pytest.mark.parallel,
]
ENGINE = os.environ.get("PACKET_HUNTER_ENGINE") or "module"
if ENGINE == "module":
    pytestmark.append(pytest.mark.usefixtures("loaded"))

# While tests are collected: that is on the host, whose compiler is not emulated; the guest sees the
# same files and finds nothing to do.
compile_workers(BINARIES)
SOME = {
    *("tcp_accept_fork_close", "scm_rights_receiver_polls", "pidfd_getfd", "exec_after_socket"),
    *("prefork_server", "tcp_reuseport", "last_user_exits", "partner_closes_in_a_copy"),
    *("ring_closes_one_file", "datagrams_for_who_waits", "looked_at_while_another_writes"),
    *("io_uring_inline", "ring_closed", "sockets_older_than_engine", "pid_reused", "container"),
    *("udp_v4", "udp_v6", "udp_receive_only", "udp_send_then_exit", "multicast_v4", "forwarded"),
    *("splice_from_shared_socket", "redirected_to_local", "tcp_v4", "tcp_v6", "tcp_syn_cookies"),
    *("tcp_fin_wait2_and_time_wait", "tcp_refused", "tcp_late_after_reset", "tcp_fast_open"),
    *("mptcp_first_subflow", "nfs_datagrams_handed_over", "segments_and_interface_counters"),
}
"""Some of each kind, for `make test`."""

SCENARIOS = {
    name: one
    for name, one in load().items()
    if "module" in one.engines
    and (name in SOME or os.environ.get("PACKET_HUNTER_SOME") != "1")
    # without a reader nothing of engine ebpf is there; tests/host/test_engine_ebpf.py makes it lose
    and not (ENGINE == "ebpf" and (one.lossy or name.startswith("late_reader_")))
}


@pytest.fixture(scope="module", autouse=True)
def load_on_every_cpu() -> Iterator[None]:
    with busy(2 if os.environ.get("PACKET_HUNTER_LOAD") == "1" else 0):
        yield


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_packet_is_named_rightly(name: str, module_file: Path) -> None:
    for _ in range(REPEAT):
        result = perform(SCENARIOS[name], ENGINE, BINARIES, str(module_file))
        if result.get("unplayed"):  # what was judged is never judged again
            print(line(result))
            result = perform(SCENARIOS[name], ENGINE, BINARIES, str(module_file))
        if "unable" in result:
            pytest.skip(f"this machine cannot play it: {result['unable']}")
        print(line(result))
        notes = result.get("account", {}).get("notes", [])
        assert not any("in parts" in note for note in notes), notes
        if result["faults"]:
            pytest.fail("\n".join([line(result), *result["faults"], *result.get("examples", [])]))
