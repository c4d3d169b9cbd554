# SPDX-License-Identifier: MIT
"""The filter language over a fleet's flows says what it says over packets."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fleet import schema
from fleet.ask.questions import who
from fleet.ask.wanted import Wanted
from fleet_rows import FIRST, Folder
from nlproto.errors import UsageError
from nlproto.filters.mistakes import FilterError
from nlproto.filters.parse import parse
from nlproto.filters.words import quote
from nlproto.host.procfs import Parent
from nlproto.records import wire
from nlproto.records.ends import TRANSLATED

ADDRESSES = ("10.0.0.1", "10.0.0.2", "192.168.7.9", "2001:db8::5", "::ffff:10.0.0.1", "fe80::1")
PORTS = (53, 80, 443, 40000, 65535)
NAMES = ("nginx", "nginx-worker-17-of-many", "a*b", "'; DROP TABLE flow; --", "$f0", "x?[y]", "")
DOMAINS = (None, "example.org", "www.example.org", "a.test|b.example.org", "x'y.test")
HOWS = ("context", "socket", "no_socket", "predates")

texts = st.sampled_from(NAMES)
processes = st.builds(
    lambda **fields: SimpleNamespace(**fields),
    exe=st.sampled_from(("", "/usr/sbin/nginx", "/opt/a b/nginx-worker-17-of-many", "/opt/a*b")),
    cmdline=st.sampled_from(("", "nginx -g daemon", "python3 -m http.server")),
    container=st.sampled_from(("", "docker:4f1c0d2e9a3b", "lxc:web")),
    container_name=st.sampled_from(("", "web", "db-1")),
    pod=st.sampled_from(("", "default/web-0", "web-0")),
    unit=st.sampled_from(("", "nginx.service", "cron.service", "user@1000.service")),
    parents=st.lists(st.builds(Parent, st.integers(1, 9), st.sampled_from(NAMES)), max_size=3),
)


@st.composite
def flows(draw: Any) -> tuple[Any, ...]:
    """A flow, and its process: None where none is told."""
    six = draw(st.booleans())
    addresses = [one for one in ADDRESSES if (":" in one) == six]
    address, port = st.sampled_from(addresses), st.sampled_from(PORTS)
    forwarded = draw(st.booleans())
    how = "forwarded" if forwarded else draw(st.sampled_from(HOWS))
    named = how in ("context", "socket")
    counts = draw(st.sampled_from(((1, 0), (0, 1), (2, 3))))
    nat = draw(st.none() | st.tuples(address, port, address, port))
    row = {
        "protocol": draw(st.sampled_from((6, 17))),
        "laddr": draw(address), "lport": draw(port), "raddr": draw(address), "rport": draw(port),
        "forwarded": forwarded, "how": how, "netns": draw(st.integers(1, 2)),
        "tgid": draw(st.integers(1, 3)) if named else 0, "uid": draw(st.integers(0, 2)),
        "comm": draw(texts).encode()[:15].decode() if named else "",
        "packets_out": counts[0], "packets_in": counts[1], "domain": draw(st.sampled_from(DOMAINS)),
    }  # fmt: skip
    for name, value in zip(("laddr", "lport", "raddr", "rport"), nat or (None,) * 4, strict=True):
        row[f"nat_{name}"] = value
    return row, draw(st.none() | processes) if named else None


def _words(address: Any) -> Any:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return np.frombuffer(socket.inet_pton(family, address).ljust(16, b"\0"), np.uint8)


def records(row: Any) -> Any:
    """The packets of a flow, one for each way, and what NAT made of each."""
    made = []
    outward = wire.lib.SNIFFER_DIR_FWD if row["forwarded"] else wire.lib.SNIFFER_DIR_OUT
    inward = wire.lib.SNIFFER_DIR_FWD if row["forwarded"] else wire.lib.SNIFFER_DIR_IN
    for count, way, ends in (
        (row["packets_out"], outward, "lr"),
        (row["packets_in"], inward, "rl"),
    ):
        if not count:
            continue
        one = np.zeros(1, wire.RECORD)
        nat = np.zeros(1, TRANSLATED)
        for end, side in zip(ends, "sd", strict=True):
            one[f"{side}addr"][0] = _words(row[f"{end}addr"])
            one[f"{side}port"] = row[f"{end}port"]
            if row["nat_laddr"] is not None:
                nat[f"{side}addr"][0] = _words(row[f"nat_{end}addr"]).view(np.uint64)
                nat[f"{side}port"] = row[f"nat_{end}port"]
        one["family"] = socket.AF_INET6 if ":" in row["laddr"] else socket.AF_INET
        one["dir"], one["proto"], one["netns"] = way, row["protocol"], row["netns"]
        one["how"] = wire.HOW_NAMES.index(row["how"])
        one["tgid"], one["uid"], one["start_ns"] = row["tgid"], row["uid"], 5
        one["comm"] = row["comm"].encode()
        made.append((one, nat))
    return made


def in_memory(wanted: Any, row: Any, process: Any) -> bool:
    """Whether a packet of the flow fits, as on one host."""

    def fits(one: Any, nat: Any) -> Any:
        ends = SimpleNamespace(
            domains=lambda some: [row["domain"] or ""] * len(some), translations=lambda some: nat
        )
        details = SimpleNamespace(get=lambda tgid, start: process, ends=ends)
        return wanted.mask(one, details)[0]

    return any(fits(one, nat) for one, nat in records(row))


tests = st.one_of(
    st.sampled_from("tcp udp ip ip6 inbound outbound".split()),
    st.sampled_from(
        "how named|how unnamed|how forwarded|how socket|pid 11|pid 22|not pid 12|uid 0"
        "|netns 1|net 10.0.0.0/30"
        "|net 2001:db8::/32|net 0.0.0.0/0|src net 192.168.0.0 mask 255.255.0.0|portrange 50-100"
        "|src and dst portrange 50-500|tcp port 80|exe *nginx*|cmdline http|pod web-0|unit nginx"
        "|unit user@*|container 4f1c|container docker:4f1c0d2e9a3b|container web|container lxc:web"
        "|domain example.org|domain *.example.org|domain x'y.test|parent 3|pname *|pname [!a]*"
        "|exe ''|parent *worker*".replace("''", '""').split("|")
    ),
    st.builds(
        "{} {} {}".format,
        st.sampled_from(("", "src", "dst", "src and dst", "dst or src")),
        st.just("host"), st.sampled_from(ADDRESSES),
    ),
    st.builds("{} port {}".format, st.sampled_from(("", "src", "dst")), st.sampled_from(PORTS)),
    st.builds(
        lambda word, name: f"{word} {quote(name)}",
        st.sampled_from(("pname", "exe", "cmdline", "container", "pod", "unit", "parent")), texts,
    ),
)  # fmt: skip
filters = st.recursive(
    tests,
    lambda some: st.one_of(
        st.builds("not ({})".format, some),
        st.builds("({} and {})".format, some, some),
        st.builds("{} or {}".format, some, some).map("({})".format),
        st.builds("({} or {} and {})".format, some, some, some),
    ),
    max_leaves=6,
)


def tgid_of(number: int, row: Any) -> Any:
    """Each flow has a process of its own."""
    return row["tgid"] and 10 * number + row["tgid"]


def store_of(path: Any, told: Any) -> Any:
    folder = Folder(path)
    for number, (row, process) in enumerate(told, 1):
        tgid = tgid_of(number, row)
        near, far = f"{row['laddr']}:{row['lport']}", f"{row['raddr']}:{row['rport']}"
        host = f"h{number}"
        folder.flow(host, near, far, cookie=number, start_ns=5, **{**row, "tgid": tgid})
        if process is not None:
            parents = [f"{one.pid} {one.comm}" for one in process.parents] or None
            texts = {name: value or None for name, value in vars(process).items()}
            folder.process(host, tgid, row["comm"], **{**texts, "parents": parents})
    return folder.open()


@settings(
    max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    told=st.lists(flows(), min_size=1, max_size=12), some=st.lists(filters, min_size=6, max_size=20)
)
def test_a_flow_fits_when_a_packet_of_it_would(
    tmp_path_factory: pytest.TempPathFactory, told: Any, some: Any
) -> None:
    with store_of(tmp_path_factory.mktemp("store"), told) as store:
        for text in some:
            wanted = parse(text, resolve=False)
            expected = {
                f"h{number}"
                for number, (row, process) in enumerate(told, 1)
                if in_memory(wanted, {**row, "tgid": tgid_of(number, row)}, process)
            }
            _, rows = who(store, Wanted(wanted), 100)
            assert {row["host"] for row in rows} == expected, text


@pytest.mark.parametrize("text", ["less 100", "greater 100", "ifindex 1", "pname x or less 9"])
def test_words_for_single_packets_are_refused(tmp_path: Path, text: str) -> None:
    folder = Folder(tmp_path)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl", first=FIRST)
    with folder.open() as store, pytest.raises(UsageError, match=r"flows"):
        who(store, Wanted(parse(text)), 10)


@pytest.mark.parametrize("text", ["uid root", "netns default"])
def test_names_that_mean_something_on_this_machine_alone_are_refused(text: str) -> None:
    with pytest.raises(FilterError, match="is no "):
        parse(text, elsewhere=True)


def test_every_column_of_the_language_is_one_of_the_store() -> None:
    assert {"protocol", "tgid", "uid", "netns", "how", "domain"} <= set(schema.FLOWS.names)


@pytest.mark.parametrize(
    "wanted",
    [Wanted(on="\udca0"), Wanted(user="x\ud800"),
     Wanted(parse("pname parent\udca0init or domain \udcff")),
     Wanted(parse("exe \ud800* or parent \udca0 or container \udca0"))],
)  # fmt: skip
def test_bytes_of_a_shell_that_are_no_text_fit_nothing(tmp_path: Path, wanted: Any) -> None:
    folder = Folder(tmp_path)
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl", domain="a.test")
    with folder.open() as store:
        assert who(store, wanted, 10) == (0, [])
