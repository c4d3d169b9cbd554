# SPDX-License-Identifier: MIT
"""Questions to flows of several machines: who, both ends, map, new, usage."""

from __future__ import annotations

import json
import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fleet.ask.ends import ends
from fleet.ask.hosts import hosts_of
from fleet.ask.map import service_map
from fleet.ask.questions import new, usage, who
from fleet.ask.store import open_folder
from fleet.ask.wanted import Wanted
from fleet_rows import BEGIN, FIRST, RANGE, Folder, S, alone, joined
from hunter.__main__ import main
from hunter.cli.arguments import parser_of
from nlproto.errors import Error, UsageError
from nlproto.filters.parse import parse
from nlproto.filters.words import quote


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "store")


def test_both_ends_are_joined(folder: Folder) -> None:
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl")
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", "nginx")
    with folder.open() as store:
        [one] = ends(store, Wanted())[1]
    assert (one["client"]["program"], one["server"]["program"]) == ("curl", "nginx")
    assert not one["ambiguous"] and one["reason"] is None


def test_rows_of_one_connection_are_one(folder: Folder) -> None:
    for at in range(3):
        for host, near, far, who_, tgid in (
            ("a", "10.0.0.1:40000", "10.0.0.2:443", "curl", 7),
            ("b", "10.0.0.2:443", "10.0.0.1:40000", "nginx", 8),
        ):
            first = FIRST + 10 * at * S
            folder.flow(host, near, far, who_, first=first, tgid=tgid, cookie=tgid)
    with folder.open() as store:
        [one] = ends(store, Wanted())[1]
    assert one["client"]["bytes_out"] == 300


def test_addresses_that_many_machines_have_join_on_their_own_machine(folder: Folder) -> None:
    """docker0 is 172.17.0.1 everywhere, loopback too; in two namespaces of one machine as well."""
    folder.flow("a", "127.0.0.1:80", "127.0.0.1:40000", "server-n", netns=9)
    for host in "abc":
        folder.flow(host, "127.0.0.1:40000", "127.0.0.1:80", f"client-{host}")
        folder.flow(host, "127.0.0.1:80", "127.0.0.1:40000", f"server-{host}")
        folder.flow(host, "172.17.0.2:40000", "172.17.0.3:80", f"box-{host}", netns=2)
        folder.flow(host, "172.17.0.3:80", "172.17.0.2:40000", f"web-{host}", netns=3)
    folder.flow("a", "127.0.0.1:40000", "127.0.0.1:80", "client-n", netns=9)
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    wanted = {(f"{h} client-{h}", f"{h} server-{h}") for h in "abc"}
    wanted.add(("a client-n", "a server-n"))
    wanted |= {(f"{h} box-{h}", f"{h} web-{h}") for h in "abc"}
    assert joined(found) == wanted


def test_where_two_machines_fit_none_is_named(folder: Folder) -> None:
    folder.flow("a", "192.168.1.2:40000", "192.168.1.3:80", "curl")
    for host in "bc":
        folder.flow(host, "192.168.1.3:80", "192.168.1.2:40000", f"nginx-{host}")
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == set()
    assert alone(found)["a curl"] == "ambiguous"


def test_an_address_that_several_machines_have_joins_no_others(folder: Folder) -> None:
    """Of two containers with the same addresses on two machines one end each was recorded."""
    folder.flow("a", "172.17.0.2:40000", "172.17.0.3:80", "curl")
    folder.flow("b", "172.17.0.3:80", "172.17.0.2:40000", "nginx")
    folder.flow("b", "172.17.0.2:5000", "198.51.100.1:443", "wget")
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == set()
    assert alone(found) == {"a curl": "ambiguous", "b nginx": "ambiguous", "b wget": "outside"}


def test_a_port_that_is_used_again_joins_the_right_ones(folder: Folder) -> None:
    for number, at in enumerate((0, 4, 8)):
        first = FIRST + at * S
        folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", f"c{number}", first=first)
        folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", f"s{number}", first=first + S // 100)
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == {(f"a c{n}", f"b s{n}") for n in range(3)}


def test_one_end_is_the_other_end_of_one_connection(folder: Folder) -> None:
    """The server recorded the first alone: the second has no partner."""
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "c0")
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "c1", first=FIRST + S // 20)
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", "s0")
    for host in "ab":
        folder.account(host)
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == {("a c0", "b s0")}
    assert alone(found) == {"a c1": "unseen"}


@pytest.mark.parametrize("ahead", [-5 * S, 5 * S])
def test_clocks_that_differ_are_learnt(folder: Folder, ahead: int) -> None:
    """A port comes back after three seconds: with the clock as it is the wrong one is nearer."""
    for number in range(8):
        first = FIRST + 100 * S + number * 20 * S
        near, far = f"10.0.0.1:{40000 + number}", "10.0.0.2:443"
        folder.flow("a", near, far, f"c{number}", first=first)
        folder.flow("b", far, near, f"s{number}", first=first + ahead)
    again = FIRST + 100 * S + 5 * S
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "again", first=again)
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", "answer", first=again + ahead)
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == {(f"a c{n}", f"b s{n}") for n in range(8)} | {("a again", "b answer")}


def test_through_nat_of_the_server_s_machine(folder: Folder) -> None:
    """A published port: the client knows the machine, the server its own address."""
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:8080", "curl")
    folder.flow(
        "b", "172.17.0.2:80", "10.0.0.1:40000", "nginx",
        nat_laddr="10.0.0.2", nat_lport=8080, nat_raddr="10.0.0.1", nat_rport=40000,
    )  # fmt: skip
    with folder.open() as store:
        assert joined(ends(store, Wanted())[1]) == {("a curl", "b nginx")}


def test_ports_need_not_tell_who_asked(folder: Folder) -> None:
    """NTP has one port at both ends; a published port may be higher than the client's."""
    folder.flow("a", "10.0.0.1:123", "10.0.0.2:123", "chronyd", protocol=17)
    folder.flow("b", "10.0.0.2:123", "10.0.0.1:123", "ntpd", protocol=17)
    folder.flow("c", "10.0.0.3:40000", "10.0.0.2:50000", "curl")
    folder.flow(
        "b", "172.17.0.2:80", "10.0.0.3:40000", "nginx",
        nat_laddr="10.0.0.2", nat_lport=50000, nat_raddr="10.0.0.3", nat_rport=40000,
    )  # fmt: skip
    folder.flow("d", "10.0.0.4:6000", "10.0.0.5:7000", "asks", initiated=True)
    folder.flow("e", "10.0.0.5:7000", "10.0.0.4:6000", "serves", initiated=False)
    folder.flow("f", "10.0.0.6:9", "10.0.0.6:9", "itself", protocol=17)
    with folder.open() as store:
        found = joined(ends(store, Wanted())[1])
    assert {("c curl", "b nginx"), ("d asks", "e serves"), ("f itself", "f itself")} <= found
    assert len(found & {("a chronyd", "b ntpd"), ("b ntpd", "a chronyd")}) == 1


def test_through_nat_of_a_machine_on_the_way(folder: Folder) -> None:
    """It masquerades and redirects; only its forwarded flow tells both."""
    folder.flow("a", "10.0.0.1:40000", "10.9.0.1:8080", "curl")
    folder.flow("b", "10.0.1.2:80", "10.9.0.2:50000", "nginx")
    folder.flow(
        "r", "10.0.0.1:40000", "10.0.1.2:80", forwarded=True,
        nat_laddr="10.9.0.2", nat_lport=50000, nat_raddr="10.9.0.1", nat_rport=8080,
    )  # fmt: skip
    with folder.open() as store:
        assert joined(ends(store, Wanted())[1]) == {("a curl", "b nginx")}


@pytest.mark.parametrize(
    "early",
    [{"how": "listener", "tgid": 7, "flags": 32}, {"how": "predates"},
     {"how": "context", "tgid": 7, "cookie": 0}],
)  # fmt: skip
@pytest.mark.parametrize("text", ["", "port 443", "pname worker*"])
def test_the_server_is_who_accepted_and_not_who_listens(
    folder: Folder, early: dict[str, Any], text: str
) -> None:
    """As from a machine whose history answers, or over two of an exporter's batches."""
    for number, shift in enumerate((0, 3)):
        near, far, first = "10.0.0.1:40000", "10.0.0.2:443", FIRST + shift * S
        folder.flow("a", near, far, f"curl{number}", first=first)
        folder.flow("b", far, near, first=first, **early)
        folder.flow("b", far, near, f"worker{number}", first=first + S // 9, tgid=8 + number)
    folder.account("a")
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:41000", "master", how="listener")
    with folder.open() as store:
        found = ends(store, Wanted(parse(text)))[1]
    assert joined(found) == {("a curl0", "b worker0"), ("a curl1", "b worker1")}
    assert sum(one["server"]["bytes_in"] for one in found if one["client"]) == 4 * 200
    assert {one["server"]["how"] for one in found if one["client"]} == {"socket"}
    expected = {} if "pname" in text else {"b master": "unseen"}
    assert alone(found) == expected


@pytest.mark.parametrize("later", [0, 100])
def test_what_was_accepted_long_before_its_next_packet_is_one_connection(
    folder: Folder, later: int
) -> None:
    near, far = "10.0.0.1:40000", "10.0.0.2:443"
    folder.flow("a", near, far, "curl", last=FIRST + (later + 1) * S)
    for at, cookie in ((0, 7), (1, 8), (2, 8)):
        first = FIRST + at * S // 1000
        folder.flow("b", far, near, "master", first=first, how="listener", cookie=cookie, tgid=7)
    if later:
        folder.flow("b", far, near, "worker", first=FIRST + later * S, cookie=8)
    with folder.open() as store:
        [one] = ends(store, Wanted())[1]
    assert one["server"]["program"] == ("worker" if later else "master")
    assert one["server"]["packets_in"] == (8 if later else 6)


def test_an_end_without_a_partner_says_why(folder: Folder) -> None:
    for host in "abcd":
        folder.account(host, range(600, 701, 20) if host == "c" else range(600, 1201, 60))
    folder.account("e", daemon_lost=1)
    folder.account("f", gap_ms=10)
    for number, host in enumerate("abcdef", 1):
        folder.flow(host, f"10.0.0.{number}:22", "203.0.113.7:40000", f"sshd-{host}")
    for name, far in (
        ("outside", "198.51.100.1:443"),
        ("silent", "10.0.0.3:443"),
        ("unread", "10.0.0.6:443"),
        ("lost", "10.0.0.5:443"),
        ("unseen", "10.0.0.2:443"),
        ("local", "10.0.0.1:443"),
    ):
        folder.flow("a", "10.0.0.1:50000", far, name)
    folder.flow("a", "10.0.0.1:50001", "198.51.100.2:443", "forwarded")
    folder.flow("b", "10.0.0.1:50001", "198.51.100.2:443", forwarded=True)
    with folder.open() as store:
        reasons = alone(ends(store, Wanted(on="a"))[1])
        hosts = {one.name: one for one in hosts_of(store)}
    for name in ("outside", "silent", "lost", "unseen", "local", "forwarded"):
        assert reasons[f"a {name}"] == name
    assert reasons["a unread"] == "silent" and hosts["f"].silent_s == 6
    assert {name for name, one in hosts.items() if not one.whole} == {"c", "e", "f"}


@pytest.mark.parametrize("how", ["no_socket", "predates", "socket_gone"])
def test_a_partner_without_a_process_says_why(
    folder: Folder,
    how: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: RANGE.until_ns)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl")
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", how=how)
    folder.write()
    command = ["fleet", "ends", "--store", str(folder.path)]
    assert main(command) == 0
    assert f"b - ({how})" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert (row["server"]["host"], row["server"]["tgid"], row["server"]["how"]) == ("b", 0, how)
    assert main(["fleet", "map", *command[2:], "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert (row["client"], row["server"]) == ("curl", f"({how})")


def test_what_was_told_twice_counts_once(folder: Folder) -> None:
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl")
    folder.write("part-0.parquet")
    with folder.open() as store:
        total, [row] = who(store, Wanted(), 10)
    assert (total, row["bytes_out"], row["rows"]) == (1, 100, 1)


HOSTILE = ["'; DROP TABLE flow; --", '"x"', "a\x1b[31m\n", "%_", "$since", "x' OR '1'='1"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_hostile_machines_are_values_and_nothing_else(folder: Folder, name: str) -> None:
    folder.flow(name, "10.0.0.1:40000", "not-an-address:443", name, domain=name)
    folder.flow("b", "10.0.0.2:40000", "10.0.0.3:443", "curl")
    with folder.open() as store:
        for wanted in (Wanted(on=name), Wanted(parse(f"pname {quote(name)}"))):
            total, [row] = who(store, wanted, 10)
            assert (total, row["host"], row["program"]) == (1, name, name)
        assert len(ends(store, Wanted(host="10.0.0.0/8"))[1]) == 1
        assert service_map(store, Wanted(on=name), "process")[1][0]["client"] == name


def test_who_takes_the_words_of_one_host(folder: Folder) -> None:
    row = folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl", domain="www.example.org")
    folder.process(
        "a", row["tgid"], "curl", at_ns=FIRST + 1, unit="cron.service",
        container="docker:4f1c0d2e9a3b", container_name="web", pod="web-0", user="alice",
    )  # fmt: skip
    folder.flow("b", "10.0.0.3:53", "10.0.0.4:40001", "named", protocol=17)
    with folder.open() as store:
        for text in (
            "port 443", "port 40000", "tcp", "dst host 10.0.0.2", "net 10.0.0.1/32",
            f"pid {row['tgid']}", "pname curl", "unit cron", "unit cron.service", "container web",
            "container docker:4f1c", "pod web-0", "domain example.org", "domain WWW.example.org.",
        ):  # fmt: skip
            total, [found] = who(store, Wanted(parse(text, elsewhere=True)), 10)
            assert (total, found["host"]) == (1, "a"), text
        for wanted in (
            Wanted(on="a"), Wanted(user="alice"), Wanted(host="10.0.0.2"),
            Wanted(host="10.0.0.2/31"),
        ):  # fmt: skip
            assert who(store, wanted, 10)[0] == 1
        assert who(store, Wanted(parse("domain ample.org")), 10) == (0, [])
        with pytest.raises(UsageError, match="neither an IP address nor a network"):
            who(store, Wanted(host="nonsense"), 10)


WORDS_OF_WHO = {
    "--port": ["443", "https"], "--proto": ["tcp"], "--host": ["10.0.0.2", "10.0.0.2/31"],
    "--pid": ["77"], "--pname": ["curl", "cu*"], "--unit": ["cron", "cron.service"],
    "--container": ["web", "docker:4f1c"], "--pod": ["default/web-0"],
    "--domain": ["example.org"], "--netns": ["4026532000"],
    "--since": ["10m", "%H:%M", "%H:%M:%S", "%Y-%m-%d", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S"],
    "--until": ["2m", "%H:%M", "%Y-%m-%d %H:%M"],
    "--limit": ["9"], "--socket": ["/nowhere"],
}  # fmt: skip
"""Options of `who` and values that fit one flow, of five minutes ago. Times are for strftime()."""


@pytest.mark.parametrize("option", WORDS_OF_WHO)
def test_each_option_of_who_asks_the_fleet(
    folder: Folder, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now()
    moment = now - timedelta(minutes=2 if option == "--until" else 10)
    first = int(now.timestamp() - 300) * S
    folder.flow(
        "a", "10.0.0.1:40000", "10.0.0.2:443", first=first, tgid=77, start_ns=5,
        domain="www.example.org", netns=4026532000,
    )  # fmt: skip
    folder.process(
        "a", 77, "curl", at_ns=first, exe="/usr/bin/curl", unit="cron.service",
        pod="default/web-0", container="docker:4f1c0d2e9a3b", container_name="web",
    )  # fmt: skip
    folder.flow("b", "10.0.0.3:53", "10.0.0.4:40001", "named", protocol=17, first=first)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "old", first=first - 2 * 86_400 * S)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "young", first=first + 290 * S)
    folder.write()
    command = ["fleet", "who", "--store", str(folder.path), "--json", "--until", "1m", option]
    for value in WORDS_OF_WHO[option]:
        assert main([*command, moment.strftime(value)]) == 0, value
        found = json.loads(capsys.readouterr().out)["rows"]
        told = sorted(one["host"] for one in found)
        any_fits = option in ("--since", "--until", "--limit", "--socket")
        assert told == (["a", "b"] if any_fits else ["a"]), value


def test_no_option_of_who_is_missing() -> None:
    """`--by` has its own question: usage."""
    of_who = set(parser_of("who")._option_string_actions)
    assert of_who - set(parser_of("fleet")._option_string_actions) == set()
    assert of_who == {"-h", "--help", "--by", "--json", *WORDS_OF_WHO}


@pytest.mark.parametrize("words", [["443"], ["https"], ["443", "and", "tcp"], ["443 and not udp"]])
def test_a_port_needs_no_word_as_with_who(
    folder: Folder, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: RANGE.until_ns)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl")
    folder.write()
    command = ["fleet", "who", "--store", str(folder.path)]
    assert main([*command, *words]) == 0
    assert main([*command, "444", *words[1:]]) == 1


@pytest.mark.parametrize(
    "words",
    [["prot", "443"], ["99999"], ["port"], ["less", "9"], ["\udcff"], ["uid", "root"],
     ["--netns", "default"], ["--host", "nonsense"], ["--since", "25:00"],
     ["--since", "5m", "--until", "10m"], ["--by", "unit"], ["--html", "x"], ["--nonsense"]],
)  # fmt: skip
def test_a_bad_word_is_one_line_and_what_it_points_at(
    folder: Folder, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl")
    folder.write()
    assert main(["fleet", "who", "--store", str(folder.path), *words]) == 2
    shown, told = capsys.readouterr()
    first, *pointing = told.splitlines()
    assert not shown and first.startswith("packet-hunter: ")
    assert not pointing or (len(pointing) == 2 and set(pointing[1]) <= {" ", "^"})


def test_usage_sums_up_by_what_is_asked(folder: Folder) -> None:
    for host in "ab":
        folder.flow(host, "10.0.0.1:40000", "10.0.0.9:443", "curl")
    folder.flow("a", "10.0.0.1:40001", "10.0.0.9:443", "wget", bytes_in=5000)
    with folder.open() as store:
        _, rows = usage(store, Wanted(), "process", 10)
        assert [(row["name"], row["hosts"], row["flows"]) for row in rows] == [
            ("wget", 1, 1),
            ("curl", 2, 2),
        ]
        total, rows = usage(store, Wanted(), "host", 1)
        assert (total, rows[0]["name"]) == (2, "a")


def test_new_is_what_the_days_before_have_not(folder: Folder) -> None:
    for at, port in enumerate((443, 8443)):
        folder.flow("a", f"10.0.0.1:4000{at}", f"203.0.113.7:{port}", "curl")
    folder.flow("a", "10.0.0.1:22", "203.0.113.7:40000", "sshd")
    folder.rollup("a", "curl", "203.0.113.0/24", 443, True, BEGIN - 48 * 3600 * S)
    with folder.open() as store:
        old = BEGIN - 30 * 86400 * S
        _, rows = new(store, Wanted(), "destination", old, 10)
        assert [(row["program"], row["service"]) for row in rows] == [("curl", 8443)]
        _, rows = new(store, Wanted(), "program", old, 10)
        assert [row["program"] for row in rows] == ["sshd"]
        _, rows = new(store, Wanted(), "listener", old, 10)
        assert [(row["program"], row["service"]) for row in rows] == [("sshd", 22)]


def test_new_knows_the_networks_of_ipv6(folder: Folder) -> None:
    folder.flow("a", "2001:db8::1:40000", "2001:db8:1:2::7:443", "curl")
    folder.flow("a", "2001:db8::1:40001", "2001:db8:1:3::7:443", "curl")
    folder.rollup("a", "curl", "2001:db8:1:2::/64", 443, True, BEGIN - 48 * 3600 * S)
    with folder.open() as store:
        _, rows = new(store, Wanted(), "destination", BEGIN - 30 * 86400 * S, 10)
    assert [row["remote"] for row in rows] == ["2001:db8:1:3::/64"]


def test_a_map_has_services_and_why_an_end_is_missing(folder: Folder) -> None:
    for number in range(3):
        near = f"10.0.0.1:{40000 + number}"
        folder.flow("a", near, "10.0.0.2:443", "curl")
        folder.flow("b", "10.0.0.2:443", near, "nginx")
    folder.flow("a", "10.0.0.1:50000", "203.0.113.7:443", "wget", domain="example.org")
    with folder.open() as store:
        rows = service_map(store, Wanted(), "process")[1]
    told = {
        (row["client"], row["server"], row["service"], row["connections"], row["reason"])
        for row in rows
    }
    assert told == {
        ("curl", "nginx", 443, 3, None),
        ("wget", "example.org", 443, 1, "outside"),
    }


def test_a_folder_that_is_none_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(Error, match="has no flows"):
        open_folder(tmp_path, RANGE)


@pytest.mark.parametrize("question", ["who", "ends", "map", "new", "usage"])
def test_the_command_shows_and_tells_machines(
    folder: Folder,
    question: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hunter.fleet.fleet.time.time_ns", lambda: RANGE.until_ns)
    folder.flow("a\x1b[31m", "10.0.0.1:40000", "10.0.0.2:443", "curl\x1b]0;x\x07")
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", "nginx")
    folder.account("b", range(600, 700, 20))
    folder.write()
    words = ["fleet", question, "--store", str(folder.path), "--since", "10m"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "\x1b]" not in shown and "\x07" not in shown
    assert "silent for two minutes" in shown
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["total"] == len(answer["rows"]) > 0
    assert {one["host"] for one in answer["partial"]} == {"a\x1b[31m", "b"}
    assert main([*words, "--pname", "nobody"]) == 1


def test_a_map_is_a_page_that_runs_nothing(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hunter.fleet.fleet.time.time_ns", lambda: RANGE.until_ns)
    for port in range(441, 448):
        folder.flow("a", "10.0.0.1:40000", f"10.0.0.2:{port}", "<script>alert(1)</script>")
    folder.write()
    page = tmp_path / "map.html"
    words = ["fleet", "map", "--store", str(folder.path), "--since", "10m", "--html", str(page)]
    assert main(words) == 0
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "<svg" in text
    assert text.count("<tr><td>") == 7
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert text.count("<path") == 1 and "tcp 445 and 2 more; 2.1 KiB outside</title>" in text
