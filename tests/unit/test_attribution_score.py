# SPDX-License-Identifier: MIT
"""What the ground-truth suite takes for right where a connection ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "vm"))
from attribution.score import DIR_IN, DIR_OUT, TCP_FIN, TCP_RST, score
from attribution.truth import Claim

from nlproto.records.wire import RECORD, how_name

HOW = {how_name(number): number for number in range(256)}
OWNER, ACK = 5, 16


def packet(direction: int, flags: int, how: str) -> Any:
    record = np.zeros(1, RECORD)[0]
    near, far = ("d", "s") if direction == DIR_IN else ("s", "d")
    record["netns"], record["proto"], record["family"], record["len"] = 1, 6, 2, 52
    record[f"{near}port"], record[f"{far}port"] = 10, 20
    record["dir"], record["tcp_flags"], record["how"] = direction, flags, HOW[how]
    record["tgid"] = 0 if how == "no_socket" else OWNER
    return record


CLOSES = packet(DIR_OUT, TCP_FIN | ACK, "socket")
DATA, LATE = packet(DIR_IN, ACK, "socket"), packet(DIR_IN, TCP_FIN | ACK, "no_socket")
RESETS = packet(DIR_OUT, TCP_RST, "reverse")


@pytest.mark.parametrize(
    ("records", "missed"),
    [
        ([CLOSES, DATA, LATE, RESETS], 0),  # a second processor: the socket has gone, no reset yet
        ([CLOSES, DATA, RESETS, LATE, packet(DIR_OUT, TCP_RST, "no_socket")], 0),
        ([CLOSES, LATE, DATA, RESETS], 1),  # the socket was there: the next packet found it
        ([CLOSES, LATE], 1),
        ([LATE, RESETS], 1),  # never closed
    ],
)
def test_a_closed_socket_ends_before_the_reset_that_data_brings(
    records: list[Any], missed: int
) -> None:
    claim = Claim("one", "server", OWNER, 0, "", 1, "tcp", 10)
    result = score(np.array(records), [claim], how_name, comm=False)
    assert result.unnamed.total() == missed
