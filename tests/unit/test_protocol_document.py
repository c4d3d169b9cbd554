# SPDX-License-Identifier: MIT
"""docs/PROTOCOL.md says what the wire does."""

from __future__ import annotations

import re
from pathlib import Path

from nlproto.kernel.netlink import attributes, messages
from nlproto.records import wire
from waiting import there

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "PROTOCOL.md").read_text()
NETLINK = TEXT[TEXT.index("## Netlink") : TEXT.index("### Reading it right")]


def test_the_example_bytes_decode_to_what_the_text_says() -> None:
    rows = re.findall(r"^    [0-9a-f]{4}  ([0-9a-f ]+)$", NETLINK, re.MULTILINE)
    (message,) = messages(memoryview(bytes.fromhex("".join(rows))))
    assert message.payload[0] == wire.lib.SNIFFER_CMD_PACKETS
    ((kind, payload),) = attributes(message.payload[4:])
    assert kind == wire.lib.SNIFFER_A_RECORDS
    batch = wire.decode_batch(payload)
    assert (int(batch.head["cpu"]), int(batch.head["count"])) == (1, 1)
    (record,) = batch.records
    assert wire.text(record["comm"]) == "curl"
    assert (int(record["tcp_flags"]), int(record["dport"])) == (2, 443)
    assert wire.address_text(int(record["family"]), record["daddr"]) == "192.0.2.2"


def test_the_tables_have_every_field_at_its_offset() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` ", NETLINK, re.MULTILINE)
    expected = [
        (str(there(dtype.fields)[name][1]), str(there(dtype.fields)[name][0].itemsize), name)
        for dtype in (wire.BATCH, wire.RECORD, wire.FLOW_RECORD)
        for name in there(dtype.names)
    ]
    assert rows == expected


def test_every_command_and_attribute_named_is_the_headers() -> None:
    for name in set(re.findall(r"SNIFFER_\w+", TEXT)):
        assert hasattr(wire.lib, name), name
