# SPDX-License-Identifier: MIT
"""One connection behind NAT, not three: a published port, masquerade, hairpin, as they are."""

import os
import shutil

import pytest

from nlproto.client.client import DaemonClient
from translating import PUBLISHED, place
from waiting import until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("nft"), reason="nft is not installed"),
]


@pytest.fixture(name="lab", scope="module")
def _lab():
    with place() as lab:
        lab.rules(PUBLISHED)
        yield lab


def flows(daemon, **question):
    with DaemonClient(daemon.path) as asking:
        return asking.who(**question)["flows"]


def of(daemon, process, **question):
    """The flow of a process among what fits the question."""

    def look():
        found = [one for one in flows(daemon, **question) if one["pid"] == process.pid]
        return found[0] if found else None

    return until(look, 20, f"a flow of {process.pid} for {question}")


def became(flow):
    return (flow["nat_local"], flow["nat_lport"], flow["nat_remote"], flow["nat_rport"])


@pytest.mark.parametrize(
    ("proto", "address", "port", "server"),
    [
        ("tcp", "10.77.0.1", 8080, "10.88.0.2"),
        ("udp", "10.77.0.1", 8080, "10.88.0.2"),
        ("tcp", "fd77::1", 8081, "fd88::2"),
    ],
)
def test_who_names_the_process_behind_a_published_port(daemon, lab, proto, address, port, server):
    serving = lab.server("box", 80, proto, server)
    client = lab.client("far", address, port, proto)
    flow = of(daemon, serving, port=port)
    assert (flow["local"], flow["lport"]) == (server, 80)
    assert became(flow) == (address, port, client.address, client.port)
    assert flow["netns"] == lab.inode("box")
    asked = of(daemon, client, port=80)
    assert (asked["remote"], asked["rport"]) == (address, port)
    assert became(asked) == (client.address, client.port, server, 80)
