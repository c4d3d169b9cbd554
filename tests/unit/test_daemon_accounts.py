# SPDX-License-Identifier: MIT
"""One capture over several daemons: the account shows the time between them as lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from hunter.sources.daemon_accounts import DaemonAccounts
from waiting import there


def account(packets: Any, position: Any, instance: int = 7, **more: Any) -> dict[str, Any]:
    return {
        "packets": packets,
        "recorded": packets,
        "skipped": 0,
        "records": packets,
        "delivered": packets,
        "named": packets,
        "lost": {"alloc": 0, "socket": 0},
        "gap_ms": 0,
        "closes": True,
        "position": {"instance": instance, "packets": position},
    } | more


def test_what_passed_between_two_daemons_is_lost_and_the_sum_closes() -> None:
    spans = DaemonAccounts()
    assert spans.begin(account(10, 1010)) is None
    spans.mark(account(30, 1030))
    spans.received(np.array([1, 2, 18], np.uint8))
    spans.cut()
    # of the 70 packets since the mark 3 arrived
    assert spans.begin(account(0, 1100)) == 67
    spans.end(account(5, 1105))
    total = spans.total()
    assert there(total)["packets"] == there(total)["records"] == 20 + 3 + 67 + 5
    assert there(total)["delivered"] == 28
    assert there(total)["named"] == 20 + 2 + 5
    assert there(total)["lost"] == {"alloc": 0, "socket": 0, "gap": 67}
    assert there(total)["records"] == there(total)["delivered"] + sum(there(total)["lost"].values())
    assert there(total)["closes"] is True


def test_another_instance_cannot_tell_how_much_passed() -> None:
    spans = DaemonAccounts()
    spans.begin(account(0, 1000))
    spans.cut()
    assert spans.begin(account(0, 5, instance=8)) is None
    spans.end(account(4, 9, instance=8))
    assert there(spans.total())["records"] == 4


def test_an_account_that_may_not_be_seen_stays_unseen() -> None:
    spans = DaemonAccounts()
    spans.begin(None)
    spans.received(np.array([1], np.uint8))
    spans.cut()
    assert spans.begin(None) is None
    spans.end(None)
    assert spans.total() is None


def test_a_span_that_goes_on_counts_up_to_its_mark() -> None:
    spans = DaemonAccounts()
    spans.begin(account(10, 10))
    spans.mark(account(25, 25))
    assert there(spans.total())["records"] == 15
