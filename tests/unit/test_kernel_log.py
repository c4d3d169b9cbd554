# SPDX-License-Identifier: MIT
"""Which lines of a kernel's log the VM tests take for a fault."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "vm"))
from vmtest.kernlog import problems

HEAD = ["=====", "WARNING: suspicious RCU usage", "6.1.192-debug #1 Tainted: G  O", "-----"]


@pytest.mark.parametrize(
    ("place", "faults"),
    [
        ("net/netfilter/nf_tables_api.c:4122 RCU-list traversed in non-reader section!!", 0),
        ("net/netfilter/nft_set_bitmap.c:96 RCU-list traversed in non-reader section!!", 0),
        ("kmod/owner.c:4122 RCU-list traversed in non-reader section!!", 1),
        ("net/netfilter/nf_tables_api.c:4122 suspicious rcu_dereference_check() usage!", 1),
    ],
)
def test_nfts_own_unchecked_walk_is_no_fault(place: str, faults: int) -> None:
    assert len(problems([*HEAD, place])) == faults
    assert len(problems([*HEAD, place, "BUG: KASAN: use-after-free"])) == faults + 1


@pytest.mark.parametrize(
    ("functions", "faults"),
    [
        ("process_one [sniffer] / owner_of [sniffer]", 1),
        ("tcp_poll / owner_of [sniffer]", 1),
        ("tick_nohz_stop_tick / tick_sched_do_timer", 0),
        ("nft_do_chain [nf_tables] / nft_do_chain [nf_tables]", 0),
    ],
)
def test_data_races_of_the_kernel_alone_are_no_fault(functions: str, faults: int) -> None:
    assert len(problems([f"BUG: KCSAN: data-race in {functions}"])) == faults
