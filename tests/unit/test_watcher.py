# SPDX-License-Identifier: MIT
"""How often the daemon looks at the kernel's sockets."""

from types import SimpleNamespace

import pytest

from daemon.system.watcher import _SOCKETS, Watcher, _pause
from nlproto.host.holders import Holders


@pytest.mark.parametrize("took", [0.001, 0.01, 0.05, 0.08, 0.1, 0.2, 0.4])
def test_a_closed_listener_is_never_known_for_more_than_a_second(took):
    """It closes right after a look began; the next must have ended within a second."""
    assert _pause(_SOCKETS, took) + took <= 1.0


@pytest.mark.parametrize("took", [0.001, 0.05, 0.08])
def test_looks_take_a_tenth_of_a_core_at_most_while_the_promise_allows(took):
    assert took <= _pause(_SOCKETS, took) / 10


def test_probes_that_stop_and_fire_again_are_told_once_each_in_one_line(caplog):
    told = []
    pipeline = SimpleNamespace(engine_stats={"canary": 1}, engine=SimpleNamespace(name="module"))
    watcher = Watcher(
        "auto", pipeline, lambda event, **fields: told.append((event, fields)), print, Holders()
    )
    for canary in (1, 0, 0, 1):
        pipeline.engine_stats = {"canary": canary}
        watcher._look_at_probes()
    assert [event for event, _ in told] == ["probes", "probes"]
    assert "named late, wrongly or not at all" in told[0][1]["message"]
    assert "fire again" in told[1][1]["message"]
    assert all("\n" not in fields["message"] for _, fields in told)
    assert len(caplog.messages) == 2
