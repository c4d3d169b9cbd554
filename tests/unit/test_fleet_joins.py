# SPDX-License-Identifier: MIT
"""Connections of a small world with two sites, routers and containers: none is joined wrongly."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet import wire
from fleet.ask.ends import ends
from fleet.ask.wanted import Wanted
from fleet.collect.tables import Received, hours_of
from fleet_rows import BEGIN, FIRST, Folder, S, alone, joined
from nlproto.filters.parse import parse

SITES = ("east", "west")
PUBLIC = {"east": "203.0.113.1", "west": "203.0.113.2"}
SERVERS = {"p1": "198.51.100.1", "p2": "198.51.100.2"}
LOCAL = {"h1": "192.168.1.11", "h2": "192.168.1.12", "h3": "192.168.1.13"}  # in each site
GATE = "192.168.1.1"
SIX = {"p1": "2001:db8::1", "p2": "2001:db8::2"}


class World:
    """Draws connections; `true`: which (client's program, server's) belong together."""

    def __init__(self, path: Any, seed: Any) -> None:
        self.random = random.Random(seed)
        self.folder = Folder(path)
        self.true: set[Any] = set()
        self.alone: set[Any] = set()
        self.vague: set[Any] = set()
        self.count = 0
        names = [*SERVERS, *(f"{site}-{one}" for site in SITES for one in (*LOCAL, "gate"))]
        self.clock = {name: self.random.choice((0, 0, 0, 3, -4, 40)) * S // 10 for name in names}
        self.clock["p2"] = 5 * S
        for name in names:
            self.folder.account(name)

    def connect(self, client: Any, server: Any, passing: Any = (), vague: bool = False) -> None:
        """(machine, local, remote, more) of both ends, and of the machines on the way."""
        number = self.count = self.count + 1
        begin = FIRST + self.random.randrange(100 * S, 400 * S)
        kept = [self.random.random() > 0.1 for _ in (client, server)]
        names = f"c{number}", f"s{number}"
        told = [True, False] if self.random.random() < 0.7 else [None, None]
        for one, name, keep, asks in zip((client, server), names, kept, told, strict=True):
            if keep:
                self._flow(one, name, begin, initiated=asks)
        for one in passing:
            self._flow(one, "", begin, forwarded=True)
        if all(kept):
            (self.vague if vague else self.true).add(names)
        else:
            self.alone |= {name for name, keep in zip(names, kept, strict=True) if keep}

    def _flow(self, one: Any, name: Any, begin: Any, **more: Any) -> None:
        host, local, remote, *rest = one
        late = self.random.randrange(S // 50)
        words = {**more, **(rest[0] if rest else {})}
        self.folder.flow(host, local, remote, name, first=begin + self.clock[host] + late, **words)

    def port(self) -> Any:
        return self.random.randrange(32768, 32768 + 3000)  # so that ports come back

    def draw(self) -> None:
        site = self.random.choice(SITES)
        name, other = self.random.sample(sorted(LOCAL), 2)
        server = self.random.choice(sorted(SERVERS))
        far, mine, port = SERVERS[server], LOCAL[name], self.port()
        protocol = self.random.choice((6, 17))
        both = {"protocol": protocol}
        gate, changed = f"{site}-gate", f"{PUBLIC[site]}:{self.port()}"
        host = f"{site}-{name}"
        kind = self.random.choice(("out", "box", "six", "published", "hairpin", "servers"))
        if kind == "out":  # masqueraded by the router
            nat = _nat(changed, f"{far}:443")
            self.connect(
                (host, f"{mine}:{port}", f"{far}:443", both),
                (server, f"{far}:443", changed, both),
                [(gate, f"{mine}:{port}", f"{far}:443", nat | both)],
            )
        elif kind == "box":  # a container: masqueraded by its host, then by the router
            near = f"{mine}:{self.port()}"
            self.connect(
                (host, f"172.17.0.2:{port}", f"{far}:443", both | {"netns": 7}),
                (server, f"{far}:443", changed, both),
                [
                    (host, f"172.17.0.2:{port}", f"{far}:443", _nat(near, f"{far}:443") | both),
                    (gate, near, f"{far}:443", _nat(changed, f"{far}:443") | both),
                ],
            )
        elif kind == "six":
            a, b = self.random.sample(sorted(SIX), 2)
            self.connect(
                (a, f"{SIX[a]}:{port}", f"{SIX[b]}:443", both),
                (b, f"{SIX[b]}:443", f"{SIX[a]}:{port}", both),
            )
        elif kind == "published":  # from outside to a machine of the site
            self.connect(
                (server, f"{far}:{port}", f"{PUBLIC[site]}:8080", both),
                (host, f"{mine}:80", f"{far}:{port}", both),
                [(gate, f"{far}:{port}", f"{mine}:80",
                  _nat(f"{far}:{port}", f"{PUBLIC[site]}:8080") | both)],
            )  # fmt: skip
        elif kind == "hairpin":  # by the public address to a neighbour: changed twice
            inner = f"{GATE}:{self.port()}"
            self.connect(
                (host, f"{mine}:{port}", f"{PUBLIC[site]}:8080", both),
                (f"{site}-{other}", f"{LOCAL[other]}:80", inner, both),
                [(gate, f"{mine}:{port}", f"{LOCAL[other]}:80",
                  _nat(inner, f"{PUBLIC[site]}:8080") | both)],
                vague=True,  # both sites' machines have these addresses
            )  # fmt: skip
        else:
            a, b = self.random.sample(sorted(SERVERS), 2)
            self.connect(
                (a, f"{SERVERS[a]}:{port}", f"{SERVERS[b]}:443", both),
                (b, f"{SERVERS[b]}:443", f"{SERVERS[a]}:{port}", both),
            )


def _nat(near: Any, far: Any) -> dict[str, Any]:
    laddr, lport = near.rsplit(":", 1)
    raddr, rport = far.rsplit(":", 1)
    return {
        "nat_laddr": laddr, "nat_lport": int(lport), "nat_raddr": raddr, "nat_rport": int(rport)
    }  # fmt: skip


def programs(found: Any) -> set[tuple[Any, ...]]:
    return {(one.split()[1], other.split()[1]) for one, other in joined(found)}


@pytest.mark.parametrize("seed", range(4))
def test_of_a_world_with_nat_none_is_joined_wrongly(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path / "store", seed)
    for _ in range(400):
        world.draw()
    with world.folder.open() as store:
        _, found = ends(store, Wanted())
        _, some = ends(store, Wanted(parse("port 443")))
    pairs = programs(found)
    wrong = pairs - world.true - world.vague
    assert not wrong
    missed = world.true - pairs
    assert len(missed) <= len(world.true) * 0.02, (len(missed), len(world.true))
    # what is asked for a port is joined as it is when everything is asked for
    assert programs(some) <= pairs
    why = {name.split()[1]: reason for name, reason in alone(found).items()}
    assert all(why[name] for name in world.alone if name in why)


def test_a_connection_that_is_older_than_the_range_is_joined(tmp_path: Path) -> None:
    """Its first rows there begin where each machine's ten seconds did."""
    folder = Folder(tmp_path)
    for at in range(0, 600, 10):
        for host, near, far, name, shift in (
            ("a", "10.0.0.1:40000", "10.0.0.2:443", "curl", 0),
            ("b", "10.0.0.2:443", "10.0.0.1:40000", "nginx", 6),
        ):
            first = BEGIN + (570 + at + shift) * S
            folder.flow(host, near, far, name, first=first, last=first + 9 * S, tgid=7, cookie=7)
    with folder.open() as store:
        assert joined(ends(store, Wanted())[1]) == {("a curl", "b nginx")}


def test_an_old_connection_is_not_joined_to_a_later_one_of_its_ports(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for host in "ab":
        folder.account(host)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "old", first=BEGIN + 605 * S)
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", "later", first=BEGIN + 700 * S)
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == set()
    assert alone(found) == {"a old": "unseen", "b later": "unseen"}


def test_two_connections_of_one_port_do_not_make_a_clock(tmp_path: Path) -> None:
    """Of each one end was recorded: nothing says that the clocks are 20 s apart."""
    folder = Folder(tmp_path)
    for host in "ab":
        folder.account(host)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "one")
    folder.flow("b", "10.0.0.2:443", "10.0.0.1:40000", "other", first=FIRST + 20 * S)
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == set()
    assert alone(found) == {"a one": "unseen", "b other": "unseen"}


def test_a_wrong_clock_is_learnt_from_connections_to_others(tmp_path: Path) -> None:
    """One connection to each of four machines: together they say that a's clock is 5 s ahead."""
    folder = Folder(tmp_path)
    for number, host in enumerate("bcde", 2):
        near, far = f"10.0.0.1:{40000 + number}", f"10.0.0.{number}:443"
        folder.flow("a", near, far, f"c{number}", first=FIRST + (100 + 5) * S)
        folder.flow(host, far, near, f"s{number}", first=FIRST + 100 * S)
        for peer in range(1, 4):  # these have the right time
            folder.flow(host, f"10.0.0.{number}:{5000 + peer}", f"10.0.1.{peer}:443", "x")
            folder.flow(f"q{peer}", f"10.0.1.{peer}:443", f"10.0.0.{number}:{5000 + peer}", "y")
    with folder.open() as store:
        found = programs(ends(store, Wanted())[1])
    assert {(f"c{number}", f"s{number}") for number in range(2, 6)} <= found


def test_the_same_addresses_in_two_sites_are_not_joined_across(tmp_path: Path) -> None:
    """Both sites' machines talk from one port at one moment, each through its own router."""
    folder = Folder(tmp_path)
    for host in ("east", "west", "gate-e", "gate-w", "p"):
        folder.account(host)
    for site, public in (("east", "203.0.113.1"), ("west", "203.0.113.2")):
        folder.flow(site, "192.168.1.2:40000", "198.51.100.1:443", f"curl-{site}")
        folder.flow(f"gate-{site[0]}", "192.168.1.2:40000", "198.51.100.1:443", forwarded=True,
                    **_nat(f"{public}:50000", "198.51.100.1:443"))  # fmt: skip
        folder.flow("p", "198.51.100.1:443", f"{public}:50000", f"nginx-{site}")
    with folder.open() as store:
        found = ends(store, Wanted())[1]
    assert joined(found) == set()
    assert set(alone(found).values()) == {"ambiguous"}


def test_an_ipv4_address_in_ipv6_is_stored_as_what_the_other_end_has() -> None:
    row = np.zeros(1, wire.ROW)
    row["family"], row["protocol"], row["last_ns"] = socket.AF_INET6, 6, FIRST
    for name, address in (("laddr", "::ffff:10.0.0.2"), ("raddr", "::ffff:0:10.0.0.1")):
        row[name][0] = np.frombuffer(socket.inet_pton(socket.AF_INET6, address), np.uint64)
    batch = wire.HostBatch(wire.FLOWS, "boot", 1, row, {}, ())
    [hour], _ = hours_of([Received("a", batch)], (FIRST - S, FIRST))
    [stored] = hour.table.to_pylist()
    assert (stored["laddr"], stored["raddr"]) == ("10.0.0.2", "::ffff:0:a00:1")
