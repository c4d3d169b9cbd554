# SPDX-License-Identifier: MIT
"""who for people: sums instead of repetitions, the newest rows, far ends, namespaces."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from hunter.cli.options import WhoOptions
from hunter.show.console import Output
from hunter.who import who_show
from hunter.who.who_groups import show_groups, summed
from nlproto.host import netns
from waiting import stand_in

NOW = 1_780_000_000.0


def flow(**fields: Any) -> dict[str, Any]:
    return {
        "proto": "tcp",
        "local": "10.0.0.1",
        "lport": 40000,
        "remote": "10.0.0.2",
        "rport": 443,
        "forwarded": False,
        "pid": 7,
        "start_ns": 1,
        "comm": "curl",
        "uid": 0,
        "netns": netns.own(),
        "how": "context",
        "flags": [],
        "first": NOW - 20,
        "last": NOW - 10,
        "packets_in": 1,
        "bytes_in": 100,
        "packets_out": 2,
        "bytes_out": 200,
    } | fields


def owner(**fields: Any) -> dict[str, Any]:
    one = {
        "netns": netns.own(),
        "proto": "tcp",
        "address": "10.0.0.1",
        "port": 8080,
        "remote": None,
        "rport": None,
        "state": "listening",
        "cookie": 1,
        "listening": True,
        "pid": 7,
        "start_ns": 1,
        "uid": 0,
        "comm": "nginx",
    } | fields
    return one | {"holders": fields.get("holders", [{"pid": one["pid"], "comm": one["comm"]}])}


def process(pid: int, **fields: Any) -> dict[str, Any]:
    empty = {"exe": "", "unit": "", "container": "", "uid": 0, "ppid": 1, "cmdline": ""}
    return {"tgid": pid, "start_ns": 1, "comm": "curl"} | empty | fields


def options(**given: Any) -> WhoOptions:
    empty = dict.fromkeys(
        "port proto host pid pname unit container pod domain since until netns by limit".split()
    )
    return WhoOptions(**empty | given, json=False, socket="", socket_given=False)


def shown(
    owners: Any = (),
    flows: Any = (),
    processes: Any = (),
    width: Any = None,
    total: Any = None,
    limit: Any = None,
    port: int = 1,
    **answer: Any,
) -> Any:
    out = io.StringIO()
    console = Output(file=out, soft_wrap=True, width=width or 80, force_terminal=bool(width))
    whole = {
        "owners": owners,
        "owners_total": len(owners),
        "flows": flows,
        "total": len(flows) if total is None else total,
        "truncated": False,
        "processes": processes,
        "complete": True,
        "since": NOW - 23,
    } | answer
    who_show.show(whole, console, NOW, options(limit=limit, port=port))
    return out.getvalue()


def test_connections_to_one_far_host_are_one_row_with_their_sum() -> None:
    text = shown(flows=[flow(lport=port) for port in range(40000, 40012)])
    (row,) = [line for line in text.splitlines() if "curl" in line]
    assert "curl.7" in row and "tcp 10.0.0.1.* <> 10.0.0.2.443" in row
    words = row.split()
    assert words[words.index("10.0.0.2.443") + 1 :][:3] == ["12", "36", "3,600"]


def test_one_connection_keeps_its_ports_and_has_no_row_twice() -> None:
    rows = [flow(how="listener"), flow(how="context", last=NOW - 5)]
    text = shown(flows=rows)
    (row,) = [line for line in text.splitlines() if "curl" in line]
    assert "10.0.0.1.40000 <> 10.0.0.2.443" in row and "context" in row
    assert "5 s ago" in row and row.count(":") == 4  # first and last by the clock


def test_many_processes_of_a_program_are_one_row() -> None:
    flows = [flow(pid=pid, lport=40000 + pid) for pid in range(1, 65)]
    known = [process(pid, exe="/usr/bin/curl" if pid % 2 else "") for pid in range(1, 65)]
    text = shown(flows=flows, processes=known)
    assert text.count("curl (64 processes)") == 2  # seen, and its executable
    assert "curl." not in text


def test_the_newest_rows_are_shown_and_how_many_more_there_are() -> None:
    flows = [flow(remote=f"10.1.{n // 250}.{n % 250}", last=NOW - n) for n in range(695)]
    text = shown(flows=flows)
    assert sum("curl.7" in line for line in text.splitlines()) == 50
    assert "645 more: --limit 695" in text and "10.1.0.0.443" in text
    assert "more" not in shown(flows=flows, limit=700)
    assert "of 5,000 flows these are the 695 newest" in shown(flows=flows, total=5000)
    assert "of 99 sockets" in shown(owners=[owner()], owners_total=99)


def test_now_has_the_far_end_and_the_state() -> None:
    far = {"remote": "10.0.0.9", "rport": 40000, "listening": False, "state": "established"}
    text = shown(owners=[owner(), owner(cookie=2, **far)])
    assert re.search(r"listens on tcp 10\.0\.0\.1\.8080 +root\n", text)
    assert "has tcp 10.0.0.1.8080 <> 10.0.0.9.40000" in text and "established" in text
    many = [owner(cookie=n, **far | {"rport": n}) for n in range(40000, 40100)]
    (row,) = [line for line in shown(owners=many).splitlines() if "nginx" in line]
    assert "10.0.0.9.*" in row and "100" in row.split()


def test_another_namespace_is_told_and_the_own_is_not() -> None:
    assert "netns" not in shown(owners=[owner()], flows=[flow()])
    text = shown(owners=[owner(netns=12345)], flows=[flow(netns=12345)])
    assert text.count("netns") == 2 and text.count("12345") == 2
    # the same tuple in two namespaces is not one row
    text = shown(flows=[flow(), flow(netns=12345)])
    assert sum("curl.7" in line for line in text.splitlines()) == 2


def test_an_uncertain_owner_is_said_to_be_one() -> None:
    assert "AMBIGUOUS" in shown(flows=[flow(flags=["ambiguous"])])


def test_nobody_is_said_with_how_far_back_that_is_known() -> None:
    text = shown()
    assert "nobody" in text and "since" in text and ":" in text
    assert "still reading" in shown(complete=False)
    assert shown(port=stand_in(None)) == "nothing listens that you may see\n"
    assert "still reading" in shown(port=stand_in(None), complete=False)


@pytest.mark.parametrize("width", [20, 36, 60])
def test_a_narrow_terminal_cuts_nothing_and_breaks_at_words(width: int) -> None:
    text = shown(owners=[owner()], flows=[flow()], processes=[process(7)], width=width)
    plain = [line for line in text.replace("\x1b[0m", "").splitlines() if "\x1b" not in line]
    assert plain and max(map(len, plain)) <= width
    assert "10.0.0.2.443" in text and "3 packets" in " ".join(text.split())


def test_what_listens_is_one_table_with_user_and_place() -> None:
    known = [process(7, comm="nginx", unit="web.service", container="docker:0123456789ab")]
    known[0] |= {"container_name": "web", "pod": ""}
    text = shown(
        owners=[owner(), owner(proto="udp", port=53)], processes=known, port=stand_in(None)
    )
    rows = [line.split() for line in text.splitlines() if "nginx" in line]
    assert rows == [
        ["nginx.7", proto, f"10.0.0.1.{port}", "root", "docker:web"]
        for proto, port in (("tcp", 8080), ("udp", 53))
    ]
    assert text.startswith("listening")


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("name", {"curl": 3, "nginx": 1}),
        ("unit", {"web.service": 1, "": 3}),
        ("container", {"docker:web": 1, "": 3}),
        ("user", {"root": 4}),
        ("host", {"10.0.0.2": 2, "10.0.0.3": 1}),
        ("port", {"tcp 443": 3, "tcp 8080": 1}),
    ],
)
def test_sums_are_of_sockets_and_flows_alike(by: str, names: dict[str, int]) -> None:
    known = [process(7), process(8, comm="nginx", unit="web.service")]
    known[1] |= {"container": "docker:0123456789ab", "container_name": "web", "pod": ""}
    answer = {
        "owners": [owner(pid=8)],
        "flows": [flow(), flow(lport=40001), flow(remote="10.0.0.3", pid=9)],
        "processes": known,
        **{"owners_total": 1, "total": 3, "truncated": False, "since": 0.0},
    }
    sums = summed(answer, options(by=by))
    assert {one["name"]: one["sockets"] + one["flows"] for one in sums["groups"]} == names
    assert sums["groups"][0]["bytes"] >= 300 and "total" in sums
    out = io.StringIO()
    show_groups(answer | {"total": 9}, Output(file=out, width=100), NOW, options(by=by))
    assert "of 9 flows these are the 3 newest" in out.getvalue()


def test_the_first_packets_of_a_connection_are_no_flow_more() -> None:
    flows = [flow(cookie=cookie, rport=port) for cookie, port in ((1, 443), (2, 443), (2, 80))]
    answer = {"owners": [], "flows": flows, "processes": [], "owners_total": 0, "total": 3}
    answer |= {"truncated": False, "since": 0.0}
    [group] = summed(answer, options(by="name"))["groups"]
    assert group["flows"] == 2


def test_a_table_of_sums_has_its_limit_and_says_so() -> None:
    flows = [flow(remote=f"10.1.{n // 250}.{n % 250}") for n in range(695)]
    answer = {"owners": [], "flows": flows, "processes": [], "owners_total": 0, "total": 695}
    answer |= {"truncated": False, "since": 0.0}
    out = io.StringIO()
    show_groups(answer, Output(file=out, width=100), NOW, options(by="host"))
    assert "645 more: --limit 695" in out.getvalue()


def test_a_process_is_shown_with_who_started_it() -> None:
    above = [{"pid": 12, "comm": "sh"}, {"pid": 8, "comm": "cr\x1bon"}, {"pid": 1, "comm": "init"}]
    text = shown(flows=[flow()], processes=[process(7, parents=above)])
    assert " sh.12 < cr\\x1bon.8\n" in text and "init" not in text
    assert " 4711\n" in shown(flows=[flow()], processes=[process(7, ppid=4711)])
