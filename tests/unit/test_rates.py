# SPDX-License-Identifier: MIT
"""Rates that add up, and how amounts are shown."""

from __future__ import annotations

import math

import pytest

from hunter.show import rates as rates_module
from hunter.show.rates import KEPT_S, Rates
from hunter.show.units import amount
from hunter.top.views import bars, sparkline
from nlproto.records import wire
from topping import REPLY, batch


def test_rates_are_bytes_a_second_each_way() -> None:
    rates = Rates()
    rates.tick([batch({}, {}, REPLY)], 10.0, 2.0)
    (process,) = rates
    assert (process.meter.sent_rate, process.meter.received_rate) == (1000.0, 1500.0)
    assert (process.meter.total, process.meter.packets) == (5000, 3)
    (flow,) = process.flows.values()
    assert (flow.local, flow.lport, flow.remote, flow.rport) == ("10.0.0.1", 50000, "10.0.0.2", 80)
    rates.tick([], 11.0, 1.0)
    assert process.meter.rate == 0 and process.meter.total == 5000
    assert list(process.sent_history)[-2:] == [1000.0, 0.0]


def test_far_ends_add_up_their_flows() -> None:
    rates = Rates()
    rates.tick([batch({}, {"sport": 50001}, {"daddr": [10, 0, 0, 3] + [0] * 12})], 1.0, 1.0)
    (process,) = rates
    ends = process.remotes()
    sent = {end: meter.sent for (_, end), meter in ends.items()}
    assert sent == {"10.0.0.2": 2000, "10.0.0.3": 1000}


def test_equal_addresses_of_two_namespaces_are_two_far_ends() -> None:
    rates = Rates()
    rates.tick([batch({"netns": 11}, {"netns": 12}, {"netns": 12})], 1.0, 1.0)
    (process,) = rates
    sent = {end: meter.sent for end, meter in process.remotes().items()}
    assert sent == {(11, "10.0.0.2"): 1000, (12, "10.0.0.2"): 2000}


def test_a_process_stays_for_a_minute_after_its_last_packet() -> None:
    rates = Rates()
    rates.tick([batch({})], 0.0, 1.0)
    rates.tick([], KEPT_S, 1.0)
    assert len(rates.processes) == 1 and KEPT_S >= 60
    rates.tick([], KEPT_S + 1, 1.0)
    assert not rates.processes


def test_unnamed_packets_stand_together_by_reason() -> None:
    rates = Rates()
    gone = {"tgid": 0, "how": wire.lib.SNIFFER_HOW_SOCKET_GONE}
    forwarded = {"tgid": 0, "how": wire.lib.SNIFFER_HOW_FORWARDED, "dir": wire.lib.SNIFFER_DIR_FWD}
    rates.tick([batch(gone, gone, forwarded)], 0.0, 1.0)
    assert {(one.comm, one.pid, one.meter.packets) for one in rates} == {
        ("socket gone", None, 2),
        ("forwarded", None, 1),
    }


def test_flows_are_bounded_and_the_idlest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates_module, "MAX_FLOWS", 100)
    rates = Rates()
    rates.tick([batch(*({"sport": 1000 + i} for i in range(90)))], 0.0, 1.0)
    rates.tick([batch(*({"sport": 2000 + i} for i in range(60)))], 1.0, 1.0)
    (process,) = rates
    ports = {flow.lport for flow in process.flows.values()}
    assert len(ports) == 75 and ports >= set(range(2000, 2060))


def test_what_a_file_said_stays() -> None:
    rates = Rates(math.inf)
    rates.tick([batch({})], 0.0, 1.0)
    rates.tick([], 1e6, 1.0)
    assert [(one.comm, one.meter.rate, one.meter.total) for one in rates] == [("web", 0, 1000)]


@pytest.mark.parametrize(
    ("value", "units", "text"),
    [
        (0, "bin-bytes", "0 B"),
        (1023, "bin-bytes", "1023 B"),
        (1536, "bin-bytes", "1.5 KiB"),
        (200 * 1024, "bin-bytes", "200 KiB"),
        (1500, "si-bytes", "1.5 kB"),
        (1_000_000, "si-bits", "8.0 Mb"),
        (131072, "bin-bits", "1.0 Mib"),
        (5e15, "si-bytes", "5000 TB"),
    ],
)
def test_amounts_are_short_in_every_unit(value: float, units: str, text: str) -> None:
    assert amount(value, units) == text


def test_a_sparkline_has_full_height_at_its_maximum() -> None:
    assert sparkline([0, 1, 4, 8]) == " ▁▄█"
    assert sparkline([0, 0]) == "  "


@pytest.mark.parametrize(
    ("environment", "plain"),
    [
        ({"LANG": "C.UTF-8"}, False),
        ({"LANG": "C"}, True),
        ({"LANG": "C.UTF-8", "LC_ALL": "POSIX"}, True),
        ({"LANG": "C.UTF-8", "TERM": "dumb"}, True),
        ({"LANG": "C.UTF-8", "TERM": "linux"}, True),
    ],
)
def test_bars_are_ascii_where_the_terminal_has_no_others(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], plain: bool
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert sparkline([0, 1, 4, 8], bars()).isascii() == plain
