# SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nlproto.records import wire
from nlproto.tables import flows
from nlproto.tables.flows import FLOW, group, pack_address, settle_opened, summarize
from recording import make_records

IN, OUT, FWD = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_DIR_OUT, wire.lib.SNIFFER_DIR_FWD


def test_both_directions_of_a_socket_are_one_flow_seen_from_its_local_end() -> None:
    records = make_records(
        {"time_ns": 10, "len": 60},
        {
            "time_ns": 20,
            "dir": IN,
            "len": 200,
            "saddr": "10.0.0.2",
            "daddr": "10.0.0.1",
            "sport": 53,
            "dport": 40000,
        },
    )
    (flow,) = summarize(records)
    assert (flow["lport"], flow["rport"]) == (40000, 53)
    assert flows.address_bytes(flow["laddr"]) == pack_address("10.0.0.1")[1]
    assert (flow["packets_out"], flow["bytes_out"]) == (1, 60)
    assert (flow["packets_in"], flow["bytes_in"]) == (1, 200)
    assert (flow["first_ns"], flow["last_ns"]) == (10, 20)


def test_two_forwarded_flows_without_a_cookie_stay_two_and_each_keeps_both_directions() -> None:
    fwd = {"dir": FWD, "tgid": 0, "start_ns": 0, "how": wire.lib.SNIFFER_HOW_FORWARDED}
    one = fwd | {"saddr": "10.0.0.1", "daddr": "10.0.0.9", "sport": 1, "dport": 2}
    back = fwd | {"saddr": "10.0.0.9", "daddr": "10.0.0.1", "sport": 2, "dport": 1}
    other = one | {"sport": 3}
    found = summarize(make_records(one, back, other))
    sums = sorted((int(f["packets_out"]), int(f["packets_in"])) for f in found)
    assert len(found) == 2
    assert sorted(map(sum, sums)) == [1, 2]
    both = next(f for f in found if f["packets_in"] + f["packets_out"] == 2)
    assert both["packets_in"] == both["packets_out"] == 1


def test_two_owners_of_one_tuple_are_two_flows() -> None:
    found = summarize(make_records({"tgid": 1}, {"tgid": 2}, {"tgid": 2, "start_ns": 9}))
    assert len(found) == 3


def test_segments_count_as_packets_with_headers_of_their_own() -> None:
    (flow,) = summarize(make_records({"len": 3028, "hdr_len": 28, "gso_segs": 3}))
    assert (flow["packets_out"], flow["bytes_out"]) == (3, 3028 + 2 * 28)


def test_flags_add_up_and_how_is_the_last() -> None:
    records = make_records({"flags": 1, "how": 1}, {"flags": 4, "how": 2})
    (flow,) = summarize(records)
    assert (flow["flags"], flow["how"]) == (5, 2)


def test_sums_are_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(3)
    count = 3000
    records = np.zeros(count, wire.RECORD)
    records["dir"] = random.integers(1, 4, count)
    records["sport"] = random.integers(1, 9, count)
    records["dport"] = random.integers(1, 9, count)
    records["saddr"][:, 0] = random.integers(1, 4, count)
    records["daddr"][:, 3] = random.integers(1, 4, count)
    records["tgid"] = random.integers(0, 3, count)
    records["len"] = random.integers(20, 1500, count)
    records["gso_segs"] = random.integers(0, 3, count)
    records["hdr_len"] = 40
    records["time_ns"] = random.integers(1, 1 << 40, count)
    expected: dict[tuple[Any, ...], list[int]] = {}
    for r in records:
        source = (bytes(r["saddr"]), int(r["sport"]))
        target = (bytes(r["daddr"]), int(r["dport"]))
        ends = tuple(sorted((source, target))) if r["dir"] == FWD else (source, target)
        if r["dir"] == IN:
            ends = (target, source)
        key = (*ends, int(r["tgid"]), bool(r["dir"] == FWD))
        sums = expected.setdefault(key, [0, 0])
        segments = max(1, int(r["gso_segs"]))
        sums[0] += segments
        sums[1] += int(r["len"]) + (segments - 1) * 40
    found: dict[tuple[Any, ...], list[int]] = {}
    for f in summarize(records, seed=12345):
        sides: tuple[tuple[bytes, int], ...] = (
            (flows.address_bytes(f["laddr"]), int(f["lport"])),
            (flows.address_bytes(f["raddr"]), int(f["rport"])),
        )
        if f["forwarded"]:
            sides = tuple(sorted(sides))
        key = (*sides, int(f["tgid"]), bool(f["forwarded"]))
        assert key not in found
        found[key] = [
            int(f["packets_in"] + f["packets_out"]),
            int(f["bytes_in"] + f["bytes_out"]),
        ]
    assert found == expected


def test_each_record_is_told_which_flow_it_belongs_to() -> None:
    records = make_records(*({"sport": port} for port in (5, 6, 5, 7)))
    found, belongs = group(records)
    assert [int(found[index]["lport"]) for index in belongs] == [5, 6, 5, 7]


def test_no_records_are_no_flows() -> None:
    assert len(summarize(np.zeros(0, wire.RECORD))) == 0
    assert summarize(np.zeros(0, wire.RECORD)).dtype == FLOW


@pytest.mark.parametrize("wrong", ["", "300.1.1.1", "::g", "localhost"])
def test_an_address_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError):
        pack_address(wrong)


SYN, ACK = 2, 16


def shake(*packets: Any) -> Any:
    """Packets of one TCP connection, of which this end is 10.0.0.1:1, as (dir, flags)."""
    near, far = ("10.0.0.1", 1), ("10.0.0.2", 2)
    rows = []
    for at, (way, flags) in enumerate(packets):
        source, target = (far, near) if way == IN else (near, far)
        rows.append(
            {"dir": way, "proto": 6, "tcp_flags": flags, "time_ns": 1000 + at, "cookie": 5}
            | {"saddr": source[0], "sport": source[1], "daddr": target[0], "dport": target[1]}
        )
    return rows


CONNECTS = (OUT, SYN), (IN, SYN | ACK), (OUT, ACK), (IN, ACK)
ACCEPTS = (IN, SYN), (OUT, SYN | ACK), (IN, ACK), (OUT, ACK)


@pytest.mark.parametrize(
    "packets, opened",
    [
        (CONNECTS, 1),
        (ACCEPTS, 2),
        (CONNECTS[1:], 1),
        (ACCEPTS[1:], 2),
        (CONNECTS[2:], 0),
        ([(OUT, SYN)], 1),
        ([(FWD, SYN)], 1),
    ],
)
def test_who_sent_the_syn_began_the_connection(packets: Any, opened: int) -> None:
    (flow,) = summarize(make_records(*shake(*packets)))
    assert flow["opened"] == opened


@pytest.mark.parametrize("late", [False, True], ids=["in order", "the other CPU first"])
@pytest.mark.parametrize(
    "packets, opened",
    [
        (CONNECTS, 1),
        (ACCEPTS, 2),
        ([(OUT, SYN), (OUT, ACK)], 0),
        ([(IN, SYN), (IN, ACK)], 0),
        ([(OUT, SYN), (OUT, SYN)], 1),
        ([(IN, SYN | ACK)], 1),
        ([(OUT, SYN | ACK)], 2),
        ([(IN, ACK), (OUT, ACK)], 0),
    ],
)
def test_records_that_were_merged_tell_it_only_where_they_can(
    packets: Any, opened: int, late: bool
) -> None:
    parts = []
    for way in (OUT, IN):
        some = make_records(*[one for one in shake(*packets) if one["dir"] == way])
        if len(some):
            one = np.zeros(1, wire.FLOW_RECORD)
            one["last"] = some[-1:]
            one["last"]["tcp_flags"] = np.bitwise_or.reduce(some["tcp_flags"])
            one["first_ns"], one["records"] = some["time_ns"].min(), len(some)
            parts.append(one)
    merged = np.concatenate(parts[::-1] if late else parts)
    flows, belongs = group(merged["last"].copy())
    settle_opened(flows, belongs, merged)
    assert flows["opened"].tolist() == [opened]
