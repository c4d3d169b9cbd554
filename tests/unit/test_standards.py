# SPDX-License-Identifier: MIT
"""What others read: Community ID, ECS, a packet's process in pcapng."""

from __future__ import annotations

import io
import json
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hunter.formats import pcapng
from hunter.formats.ecs import document
from hunter.save.saving import format_of, open_saver
from hunter.show.columns import COLUMNS, cells, columns_of_batch
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.records.community_id import community_id
from nlproto.tables.processes import Process, Processes


@pytest.mark.parametrize(
    ("proto", "source", "target", "sport", "dport", "text"),
    [  # TCP and UDP of the specification's baseline_deflt.json
        (6, "2001:470:e5bf:dead:4957:2174:e82c:4887", "2607:f8b0:400c:c03::1a", 63943, 25,
         "1:/qFaeAR+gFe1KYjMzVDsMv+wgU4="),
        (6, "128.232.110.120", "66.35.250.204", 34855, 80, "1:LQU9qZlK+B5F3KDmev6m5PMibrg="),
        (17, "192.168.1.52", "8.8.8.8", 54585, 53, "1:d/FP5EW3wiY1vCndhwleRRKHowQ="),
    ],
)  # fmt: skip
def test_community_ids_are_those_of_the_specification(
    proto: int, source: str, target: str, sport: int, dport: int, text: str
) -> None:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    ends = [socket.inet_pton(family, one).ljust(16, b"\0") for one in (source, target)]
    assert community_id(family, proto, ends[0], sport, ends[1], dport) == text
    assert community_id(family, proto, ends[1], dport, ends[0], sport) == text


def test_equal_addresses_are_ordered_by_port() -> None:
    one, other = (bytes([127, 0, 0, 1]), 9), (bytes([127, 0, 0, 1]), 300)
    assert community_id(2, 6, *one, *other) == community_id(2, 6, *other, *one)


class Details(Processes):
    def interface(self, netns: Any, ifindex: Any) -> str:
        return "eth0"


def table(*changes: Any) -> Any:
    """Columns of TCP packets 10.0.0.1:40000 > 10.0.0.2:443, of a process or of nobody."""
    records = np.zeros(len(changes), wire.RECORD)
    records["family"], records["proto"], records["dir"] = 2, 6, wire.lib.SNIFFER_DIR_OUT
    records["saddr"][:, :4], records["daddr"][:, :4] = [10, 0, 0, 1], [10, 0, 0, 2]
    records["sport"], records["dport"], records["len"] = 40000, 443, 60
    records["time_ns"] = 10**18
    records["how"], records["netns"] = wire.lib.SNIFFER_HOW_SOCKET, 4026531840
    for record, change in zip(records, changes, strict=True):
        for name, value in change.items():
            record[name] = value
    details = Details()
    details.restore(
        [
            Process(7, 70, comm="curl", exe="/usr/bin/curl", cmdline="curl x", uid=5, ppid=1),
            Process(7, 90, comm="wget", exe="/usr/bin/wget", uid=0),
        ]
    )
    return columns_of_batch(NamedBatch(np.zeros(1, wire.BATCH)[0], records, Clock(0, 0)), details)


CURL = {"tgid": 7, "tid": 8, "start_ns": 70, "uid": 5, "comm": b"curl"}
WGET = {"tgid": 7, "start_ns": 90, "comm": b"wget"}
NOBODY = {"how": wire.lib.SNIFFER_HOW_NO_SOCKET}


def rows(found: Any) -> list[dict[str, Any]]:
    values = cells(found)
    return [
        dict(zip(COLUMNS, row, strict=True))
        for row in zip(*(values[name] for name in COLUMNS), strict=True)
    ]


def test_an_event_has_the_names_of_ecs() -> None:
    row, nobody = rows(table(CURL, NOBODY | {"dir": wire.lib.SNIFFER_DIR_IN}))
    found = document(row)
    assert found["source"] == {"ip": "10.0.0.1", "port": 40000}
    assert found["destination"] == {"ip": "10.0.0.2", "port": 443}
    assert found["process"] == {
        "pid": 7,
        "name": "curl",
        "executable": "/usr/bin/curl",
        "command_line": "curl x",
        "parent": {"pid": 1},
        "thread": {"id": 8},
    }
    assert found["user"] == {"id": "5"} and found["@timestamp"].startswith("2001-09-09T01:46:40")
    assert found["network"] == {
        "type": "ipv4",
        "direction": "egress",
        "transport": "tcp",
        "bytes": 60,
        "packets": 1,
        "community_id": row["community_id"],
    }
    assert found["packet_hunter"]["how"] == "socket"
    found = document(nobody)
    assert "process" not in found and "user" not in found
    assert found["network"]["direction"] == "ingress"


def test_the_name_of_a_file_asks_for_ecs(tmp_path: Path) -> None:
    assert format_of("x.ecs.jsonl", None) == format_of("X.ECS.json", None) == "ecs"
    assert format_of("ecs.jsonl", None) == "jsonl"
    with pytest.raises(Exception, match=r"\.ecs\.jsonl"):
        format_of("x.ecs", None)
    saver = open_saver(str(tmp_path / "x"), "ecs", None)
    saver.add(table(CURL, NOBODY))
    saver.close()
    lines = (tmp_path / "x").read_text().splitlines()
    assert saver.rows == len(lines) == 2 and "ecs" in json.loads(lines[1])


def blocks(path: Any) -> list[Any]:
    with open(path, "rb") as file:
        return list(pcapng.blocks(io.BytesIO(file.read()), "x"))


def options(block: Any) -> dict[int, bytes]:
    return dict(pcapng._read_options(block.data[pcapng._options_at(block) : -4], block.order))


def save(path: Any, found: Any, **words: Any) -> Any:
    saver = open_saver(str(path), "pcapng", None, **words)
    saver.add(found)
    saver.close()
    return blocks(path)


def test_a_packet_has_its_process_as_option_8(tmp_path: Path) -> None:
    found = save(tmp_path / "x", table(CURL, NOBODY))
    assert [block.kind for block in found] == [pcapng.SECTION, pcapng.INTERFACE, 6, 6]
    assert options(found[2])[8] == struct.pack("<II", 7, 8) and 8 not in options(found[3])


def test_each_process_has_a_block_before_its_first_packet_when_asked(tmp_path: Path) -> None:
    found = save(tmp_path / "x", table(CURL, CURL, NOBODY, WGET, CURL), process_blocks=True)
    assert [block.kind for block in found[2:]] == [0xBAD, 6, 6, 6, 0xBAD, 6, 0xBAD, 6]
    pen, entry, size, pid = struct.unpack_from("<IIII", found[2].data, 8)
    assert (pen, entry, pid) == (32622, 3, 7) and size == len(found[2].data) - 12 - 12
    told = list(pcapng._read_options(found[2].data[24:-4], "<"))
    assert told == [
        (2, b"curl"),
        (3, b"/usr/bin/curl"),
        (4, b"curl x"),
        (5, struct.pack("<I", 1)),
        (6, struct.pack("<I", 5)),
    ]


@pytest.mark.parametrize("order", "<>")
def test_ids_are_written_once_in_the_order_of_the_section(order: Any) -> None:
    data = struct.pack(f"{order}IIIII", 0, 0, 0, 4, 4) + b"data"
    block = pcapng.Block(6, order, pcapng._block(6, data, order))
    more = pcapng.Block(6, order, pcapng.with_comment(block, "x", (7, 8)))
    assert options(more)[8] == struct.pack(f"{order}II", 7, 8)
    again = pcapng.Block(6, order, pcapng.with_comment(more, "y", (9, 9)))
    assert options(again)[8] == options(more)[8] and pcapng.comments(again) == ["x", "y"]


def test_a_process_block_is_little_endian_in_either_section() -> None:
    one, other = (pcapng.process_block(7, "a", order=order) for order in "<>")
    assert one[12:-4] == other[12:-4] and one[:12] != other[:12]
