# SPDX-License-Identifier: MIT
"""One connection behind NAT, not three: a published port, masquerade, hairpin, as they are."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from nlproto.client.client import DaemonClient
from translating import PUBLISHED, place
from waiting import until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not shutil.which("nft"), reason="nft is not installed"),
]


@pytest.fixture(name="namespaces", scope="module")
def _namespaces():
    with place() as found:
        found.rules(PUBLISHED)
        yield found


@pytest.fixture(name="lab")
def _lab(namespaces):
    yield namespaces
    namespaces.end_all()


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


HUNTER = [sys.executable, "-m", "hunter"]


def hunt(daemon, *words):
    """The hunter on its way, and what ends it and gives what it wrote."""
    command = [*HUNTER, "--socket", daemon.path, "-n", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "Ctrl-C ends" in process.stderr.readline()

    def end():
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=30)[0]

    return process, end


def test_lines_have_both_addresses_and_filters_match_either(daemon, lab):
    serving = lab.server("box", 80, address="10.88.0.2")
    lab.client("far", "10.77.0.1", 8080)  # the daemon follows the namespaces then
    of(daemon, serving, port=8080)
    process, end = hunt(daemon, "port", "8080", "and", "pname", "python*")
    client = lab.client("far", "10.77.0.1", 8080)
    client.again()
    until(lambda: of(daemon, serving, port=client.port))
    lines = end().splitlines()
    outside = f"{client.address}.{client.port}"
    there = f"out tcp 10.88.0.2.80 (nat 10.77.0.1.8080) > {outside} "
    back = f"in  tcp {outside} > 10.88.0.2.80 (nat 10.77.0.1.8080) "
    for part, pid in ((there, serving.pid), (back, serving.pid)):
        assert any(part in line and f".{pid}" in line for line in lines), lines
    asks = f"out tcp {outside} > 10.77.0.1.8080 (nat 10.88.0.2.80) "
    assert any(asks in line and f".{client.pid}" in line for line in lines), lines
    assert process.returncode == 0


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet", "pcapng", "ecs.jsonl"])
def test_saved_addresses_are_read_again(daemon, lab, tmp_path, ending):
    serving = lab.server("box", 80, address="10.88.0.2")
    lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=8080)
    saved = str(tmp_path / f"nat.{ending}")
    words = ["-w", saved] if ending == "pcapng" else ["--save", saved]
    _, end = hunt(daemon, "--print", *words, "host", "10.88.0.2")
    client = lab.client("far", "10.77.0.1", 8080)
    of(daemon, serving, port=client.port)
    end()
    read = [*HUNTER, "-r", saved, "--json", "port 8080 and dst port 80"]
    rows = [json.loads(line) for line in subprocess.check_output(read, text=True).splitlines()]
    mine = [one for one in rows if one["pid"] == serving.pid and one["sport"] == client.port]
    assert mine
    for row in mine:
        assert (row["nat_src"], row["nat_sport"]) == (client.address, client.port)
        assert (row["nat_dst"], row["nat_dport"]) == ("10.77.0.1", 8080)
