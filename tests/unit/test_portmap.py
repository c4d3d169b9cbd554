# SPDX-License-Identifier: MIT
from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from nlproto.host.kernel_sockets import BoundSocket
from nlproto.tables.flows import pack_address, summarize
from nlproto.tables.portmap import PortMap
from recording import make_records
from waiting import noting

NETNS = 4026531840
UDP, TCP = socket.IPPROTO_UDP, socket.IPPROTO_TCP


def _bound(
    port: int,
    tgid: int = 100,
    address: str = "0.0.0.0",
    proto: Any = TCP,
    cookie: int = 1,
    netns: Any = NETNS,
) -> BoundSocket:
    family, raw = pack_address(address)
    return BoundSocket((netns, proto, family, raw, port), tgid, 5, 1000, "server", cookie)


def test_a_packet_tells_who_owns_its_local_port() -> None:
    portmap = PortMap()
    portmap.update(summarize(make_records({"cookie": 9})))
    (owner,) = portmap.who(40000)
    assert (owner.tgid, owner.address, owner.proto, owner.cookie) == (100, "10.0.0.1", UDP, 9)
    assert not owner.listening
    assert portmap.who(53) == []


def test_forwarded_and_unnamed_packets_tell_nothing() -> None:
    portmap = PortMap()
    portmap.update(summarize(make_records({"dir": 3}, {"tgid": 0, "how": 18})))
    assert len(portmap) == 0


def test_a_listener_that_closed_is_gone_at_the_next_look() -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(80), _bound(443)], 10)
    assert [o.port for o in portmap.who(80)] == [80]
    portmap.replace_bound([_bound(443)], 20)
    assert portmap.who(80) == []
    assert portmap.who(443)[0].listening


def test_all_holders_of_a_shared_listener_are_listed() -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(80, tgid) for tgid in (1, 2, 3)], 10)
    assert sorted(o.tgid for o in portmap.who(80)) == [1, 2, 3]
    assert sorted(o.tgid for o in portmap.with_cookies([1])[1]) == [1, 2, 3]
    portmap.replace_bound([_bound(80, 2)], 20)
    assert [o.tgid for o in portmap.with_cookies([1])[1]] == [2]


def test_who_was_last_seen_with_a_socket_is_one_owner_however_many_have_it() -> None:
    portmap = PortMap()
    portmap.replace_bound(
        [_bound(80, 1), _bound(80, 2), _bound(80, 3), _bound(81, 4, cookie=2)], 10
    )
    portmap.add_connected([_bound(80, 2, cookie=1)], 30)
    found = portmap.last_users([1, 2, 3])
    assert {cookie: one.tgid for cookie, one in found.items()} == {1: 2, 2: 4}


def test_a_reused_port_has_only_its_new_owner() -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(80, 1, cookie=1)], 10)
    portmap.replace_bound([_bound(80, 2, cookie=2)], 20)
    assert [o.tgid for o in portmap.who(80)] == [2]
    assert not portmap.with_cookies([1])


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("127.0.0.1", ["0.0.0.0", "127.0.0.1", "::"]),
        ("10.0.0.1", ["0.0.0.0", "::"]),
        ("::1", ["::"]),
    ],
)
def test_an_address_finds_sockets_bound_to_it_and_to_the_wildcards_that_serve_it(
    asked: str, found: list[str]
) -> None:
    portmap = PortMap()
    addresses = ("127.0.0.1", "0.0.0.0", "::")
    portmap.replace_bound([_bound(80, n, a, cookie=n) for n, a in enumerate(addresses, 1)], 10)
    assert sorted(o.address for o in portmap.who(80, address=pack_address(asked))) == found


@pytest.mark.parametrize("others", [0, 50])
def test_many_owners_of_a_port_are_chosen_from_as_few_are(others: int) -> None:
    portmap = PortMap()
    bound = [_bound(80, 1, "127.0.0.1"), _bound(80, 2), _bound(80, 3, proto=UDP)]
    bound += [_bound(80, 100 + n, "10.0.0.1") for n in range(others)]
    portmap.replace_bound(bound, 10)
    address = pack_address("127.0.0.1")
    assert sorted(o.tgid for o in portmap.who(80, TCP, address)) == [1, 2]
    assert portmap.who(80, uid=5) == [] and len(portmap.who(80, uid=1000)) == 3 + others
    assert len(portmap.who(80, limit=2)) == len(portmap.select(port=80, limit=2)) == 2
    assert [o.tgid for o in portmap.select(port=80, proto=UDP)] == [3]
    assert [o.tgid for o in portmap.select(keys=[(2, 5), (9, 9)])] == [2]
    assert portmap.count(80) == 3 + others and portmap.count(81) == 0


def test_what_others_have_at_a_port_costs_a_user_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(80, 1 + n) for n in range(50)], 10)
    read: list[Any] = []
    monkeypatch.setattr(portmap._table, "take", noting(read, portmap._table.take, len))
    monkeypatch.setattr(portmap, "_owner", noting(read, portmap._owner))
    assert portmap.who(80, uid=5) == [] and read in ([], [0])
    assert len(portmap.who(80, uid=1000)) == 50 and read[-1] == 50


def test_network_namespaces_are_kept_apart() -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(80, 1, netns=1), _bound(80, 2, netns=2, cookie=2)], 10)
    family, raw = pack_address("127.0.0.1")
    assert [o.tgid for o in portmap.at((2, TCP, family, raw, 80))] == [2]


def test_an_exact_address_wins_over_the_wildcard() -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(80, 1), _bound(80, 2, "127.0.0.1", cookie=2)], 10)
    family, raw = pack_address("127.0.0.1")
    assert [o.tgid for o in portmap.at((NETNS, TCP, family, raw, 80))] == [2]


def test_traffic_alone_is_forgotten_after_its_time() -> None:
    portmap = PortMap(ttl_ns=100)
    portmap.update(summarize(make_records({"time_ns": 1000})))
    portmap.expire(1050)
    assert len(portmap) == 1
    portmap.expire(1200)
    assert len(portmap) == 0


def test_a_socket_the_kernel_no_longer_has_is_forgotten() -> None:
    portmap = PortMap()
    rows = ({"sport": n, "cookie": n, "time_ns": 1000} for n in (1, 2))
    portmap.update(summarize(make_records(*rows)))
    portmap.keep_cookies({2}, before_ns=500)
    assert len(portmap) == 2
    portmap.keep_cookies({2}, before_ns=2000)
    assert [o.port for o in portmap.everything()] == [2]


def test_an_exited_process_owns_nothing() -> None:
    portmap = PortMap()
    portmap.update(summarize(make_records({"sport": 1}, {"sport": 2}, {"sport": 3, "tgid": 7})))
    portmap.forget_process((100, 5_000_000_000))
    assert [o.tgid for o in portmap.everything()] == [7]


def test_the_same_packets_again_bring_a_dropped_owner_back() -> None:
    portmap = PortMap()
    flows = summarize(make_records({"time_ns": 10**10}))
    portmap.update(flows)
    portmap.forget_process((100, 5_000_000_000))
    portmap.update(flows)
    assert len(portmap.who(40000)) == 1


def test_at_its_limit_the_least_recently_seen_go() -> None:
    portmap = PortMap(limit=100)
    for n in range(1, 301):
        portmap.update(summarize(make_records({"sport": n, "time_ns": n * 10**9})))
    assert len(portmap) <= 100
    assert portmap.evicted == 300 - len(portmap)
    assert portmap.who(300) and not portmap.who(1)


def test_threads_that_ask_and_update_do_not_disturb_each_other() -> None:
    portmap = PortMap(limit=50)
    failures: list[BaseException] = []

    def run(work: Any) -> None:
        try:
            for n in range(300):
                work(n)
        except BaseException as error:
            failures.append(error)

    batches = [summarize(make_records({"sport": n % 97, "time_ns": n * 10**9})) for n in range(300)]
    works = (
        lambda n: portmap.update(batches[n]),
        lambda n: portmap.replace_bound([_bound(n % 97)], n),
        lambda n: portmap.who(n % 97),
        lambda n: portmap.everything(),
        lambda n: portmap.expire(n),
    )
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_server_with_many_connections_is_one_owner_with_the_last_ones_cookie() -> None:
    portmap = PortMap()
    rows = ({"sport": 443, "dport": n, "cookie": n, "time_ns": 1000 + n} for n in range(1, 500))
    portmap.update(summarize(make_records(*rows)))
    (owner,) = portmap.who(443)
    assert (owner.cookie, owner.seen_ns) == (499, 1499)
    assert not portmap.with_cookies([7])


def test_a_connection_on_the_listeners_own_address_leaves_the_listener() -> None:
    portmap = PortMap()
    portmap.replace_bound([_bound(443, 100, "10.0.0.1", UDP, cookie=5)], 10)
    portmap.update(
        summarize(make_records({"sport": 443, "cookie": 9, "start_ns": 5, "time_ns": 20}))
    )
    (owner,) = portmap.who(443)
    assert owner.listening and (owner.cookie, owner.seen_ns) == (5, 20)


def test_rows_of_owners_that_went_are_used_again() -> None:
    portmap = PortMap(limit=1000)
    for n in range(2000):
        portmap.update(summarize(make_records({"sport": n + 1, "tgid": n + 1})))
        portmap.forget_process((n + 1, 5_000_000_000))
    assert len(portmap) == 0
    assert portmap._top == 1


def test_one_users_many_listeners_hide_nobody_elses() -> None:
    portmap = PortMap()
    flood = [_bound(20_000 + n, cookie=n + 1) for n in range(300)]
    portmap.replace_bound(flood, 10)
    end = _bound(22).endpoint
    portmap.replace_bound([*flood, BoundSocket(end, 7, 5, 0, "sshd", 999)], 20)
    found = portmap.listeners(100)
    assert len(found) == 100 and "sshd" in {one.comm for one in found}


def test_a_flood_of_one_users_ports_evicts_that_users_alone() -> None:
    portmap = PortMap(limit=400)
    rows = ({"sport": n, "uid": 0, "comm": b"sshd", "time_ns": n} for n in range(1, 51))
    portmap.update(summarize(make_records(*rows), 1))
    for at in range(1000, 9000, 500):
        rows = ({"sport": n, "tgid": 7, "time_ns": n} for n in range(at, at + 500))
        portmap.update(summarize(make_records(*rows), 1))
    assert len(portmap) <= 400
    assert sum(owner.uid == 0 for owner in portmap.everything()) == 50
    assert portmap.evicted + len(portmap) == 8050
