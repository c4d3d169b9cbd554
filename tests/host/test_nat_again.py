# SPDX-License-Identifier: MIT
"""A client's port that comes back at once, to another server: neither has the other's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from daemons import StartDaemon
from translating import PUBLISHED, ask, became, flow_of, place
from waiting import until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

OWN = 45678

FLUSH = """
from nlproto.kernel.netlink import Connection
with Connection(12) as asking:  # NETLINK_NETFILTER: IPCTNL_MSG_CT_DELETE of all, NLM_F_ACK
    list(asking.exchange(0x102, 4, bytes(4)))
print(0, flush=True)
"""


@dataclass(frozen=True)
class Case:
    """`then`: the port of the later server; 0: what it asks is the host's own."""

    proto: str = "tcp"
    where: str = "far"
    address: str = "10.77.0.1"
    port: int = 8080
    server: str = "10.88.0.2"
    then: int = 81
    delete: bool = False


CASES = {
    "tcp": Case(),
    "tcp, entries deleted": Case(delete=True),
    "udp, entries deleted": Case(proto="udp", delete=True),
    "IPv6": Case(address="fd77::1", port=8081, server="fd88::2"),
    "hairpin": Case(where="box"),
    "no translation": Case(then=0),
    "no translation, udp, entries deleted": Case(proto="udp", then=0, delete=True),
}

CHANGED = PUBLISHED.replace(":80\n", ":81\n")
NOTHING = "chain pre {\n type nat hook prerouting priority -100\n}\n"


@pytest.fixture(name="lab", scope="module")
def _lab() -> Iterator[Any]:
    with place() as found:
        yield found


def rules(lab: Any, text: Any) -> None:
    lab.run("host", "nft flush ruleset")
    lab.rules(text)


def delete_entries(lab: Any) -> None:
    lab.start("host", FLUSH).end()


def fits(flow: Any, case: Any, port: int) -> bool:
    """Whether a client's flow has the translation that leads to the server of this port."""
    if not port:
        return flow["nat_lport"] is None
    return (flow["nat_remote"], flow["nat_rport"]) == (case.server, port)


@pytest.mark.parametrize("older", [True, False], ids=["older than the daemon", "younger"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_port_that_comes_back_at_once(
    start: StartDaemon, lab: Any, case: Any, older: bool
) -> None:
    rules(lab, PUBLISHED)
    delete_entries(lab)  # those of an earlier case
    daemon = None if older else start()
    first = lab.server("box", 80, case.proto, case.server)
    old = lab.client(case.where, case.address, case.port, case.proto, OWN)
    daemon = daemon or start()

    def served() -> Any:
        old.again()  # a daemon that has just begun may not have the namespaces yet
        flows = ask(daemon.path, port=case.port)
        return next((one for one in flows if one["pid"] == first.pid), None)

    flow = until(served, 20, "the flow of the first server")
    assert became(flow)[:2] == (case.address, case.port)
    assert fits(flow_of(daemon.path, old, port=case.port), case, 80)
    old.end()
    first.end()
    rules(lab, CHANGED if case.then else NOTHING)
    if case.delete:
        delete_entries(lab)
    where, port = ("box", case.then) if case.then else ("host", case.port)
    address = case.server if case.then else case.address
    second = lab.server(where, port, case.proto, address)
    new = lab.client(case.where, case.address, case.port, case.proto, OWN)

    def asked() -> Any:
        new.again()
        flow = flow_of(daemon.path, new, port=case.port)
        assert not fits(flow, case, 80), flow
        return flow if fits(flow, case, case.then) else None

    until(asked, 20, "the later translation")
    flows = ask(daemon.path, port=case.port)
    (flow,) = [one for one in flows if one["pid"] == second.pid]
    if case.then:
        assert became(flow)[:2] == (case.address, case.port)
    else:
        assert flow["nat_lport"] is None
    assert {one["lport"] for one in flows if one["pid"] == first.pid} == {80}
    assert fits(flow_of(daemon.path, old, port=case.port), case, 80)
    lab.end_all()
