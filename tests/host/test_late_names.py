# SPDX-License-Identifier: MIT
"""Nobody is asked about packets that waited long: those behind them would wait as well (root)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet_names import PacketNames
from nlproto.host import netns
from nlproto.host.holders import Holders
from nlproto.host.sockdiag import SockDiag
from nlproto.pipeline.naming import Namer
from nlproto.records import wire

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="who holds a socket needs root")

FLOWS = 300
SECOND = 1_000_000_000


class Counting(Holders):
    """How often somebody was looked for."""

    looks = 0

    def find_soon(self, *arguments: Any) -> Any:
        self.looks += 1
        return super().find_soon(*arguments)

    def find(self, *arguments: Any) -> Any:
        self.looks += 1
        return super().find(*arguments)


@pytest.fixture
def packets() -> Iterator[Any]:
    """The first packet of each of many flows of one socket, sent `age_ns` ago."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def sent(age_ns: Any) -> Any:
            records = np.zeros(FLOWS, wire.RECORD)
            records["family"], records["proto"] = socket.AF_INET, socket.IPPROTO_UDP
            records["netns"], records["dir"] = netns.own(), wire.lib.SNIFFER_DIR_OUT
            records["how"] = wire.lib.SNIFFER_HOW_NOT_PROBED
            records["time_ns"] = time.monotonic_ns() - age_ns
            records["saddr"][:, :4] = records["daddr"][:, :4] = (127, 0, 0, 1)
            records["sport"], records["dport"] = sock.getsockname()[1], 1024 + np.arange(FLOWS)
            return records

        yield sent


def name_by_engine(records: Any, holders: Any) -> Any:
    with SockDiag() as diag:
        names = PacketNames(diag, holders, lambda *_: True, time.monotonic_ns)
        return names.name(records, np.zeros(len(records), bool))


def name_by_pipeline(records: Any, holders: Any) -> Any:
    with Namer(holders=holders) as namer:
        namer.name(records)
    return records


@pytest.mark.parametrize("name", [name_by_engine, name_by_pipeline])
@pytest.mark.parametrize(("age_ns", "asked"), [(0, True), (60 * SECOND, False)])
def test_only_those_of_the_last_moments_are_asked_about(
    packets: Any, name: Any, age_ns: int, asked: bool
) -> None:
    holders = Counting()
    records = name(packets(age_ns), holders)
    assert (holders.looks > 0, bool(records["tgid"].any())) == (asked, asked)
    if not asked:
        assert set(records["how"].tolist()) == {wire.lib.SNIFFER_HOW_NOT_PROBED}
