# SPDX-License-Identifier: MIT
"""Generic Netlink: encoding against the kernel's own control family, decoding of anything."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlproto import Error, NoModule, UsageError
from nlproto.engines.engine import open_engine
from nlproto.kernel.netlink import (
    Connection,
    Listener,
    Sniffer,
    attributes,
    encode_attribute,
    messages,
    resolve,
    set_receive_buffer,
)

without_module = pytest.mark.skipif(
    Path("/sys/module/sniffer").exists(), reason="sniffer.ko is loaded"
)


def test_the_control_family_is_resolved_with_its_groups() -> None:
    with Connection() as connection:
        family = resolve(connection, "nlctrl")
    assert family.id == 0x10
    assert family.version >= 1
    assert family.groups["notify"] > 0


def test_a_family_that_is_not_there_is_not_found() -> None:
    with Connection() as connection, pytest.raises(FileNotFoundError):
        resolve(connection, "no-such-family")


def test_one_connection_answers_many_requests() -> None:
    with Connection() as connection:
        found = {resolve(connection, "nlctrl").id for _ in range(50)}
    assert found == {0x10}


def test_a_dump_lists_every_family() -> None:
    with Connection() as connection:
        answers = connection.request(0x10, 3, dump=True)
    names = {attrs[2].rstrip(b"\0") for _, attrs in answers}
    assert b"nlctrl" in names
    assert len(answers) == len(names)


def test_a_dump_of_a_table_that_changed_meanwhile_is_asked_for_again() -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def message(kind: Any, flags: Any, request: pytest.FixtureRequest, body: Any) -> Any:
        return struct.pack("=IHHII", 16 + len(body), kind, flags, request, 0) + body

    def answer() -> None:
        # the first time the second entry is passed over
        for flags, names in ((0x12, b"a"), (0x2, b"ab")):
            request = struct.unpack_from("=I", kernel.recv(1000), 8)[0]
            for name in names:
                kernel.send(
                    message(0x20, flags, request, bytes(4) + struct.pack("=HHI", 8, 1, name))
                )
            kernel.send(message(3, 0, request, bytes(4)))

    with kernel, ours, Connection() as connection:
        connection._socket.close()
        connection._socket = ours
        ours.settimeout(5)
        peer = threading.Thread(target=answer, daemon=True)
        peer.start()
        answers = connection.request(0x20, 1, dump=True)
        peer.join(5)
    assert {found[1][0] for _, found in answers} == {ord("a"), ord("b")}


def test_an_unknown_command_gives_the_kernels_error() -> None:
    with Connection() as connection, pytest.raises(OSError) as caught:
        connection.request(0x10, 200)
    assert caught.value.errno == errno.EOPNOTSUPP


@without_module
@pytest.mark.parametrize("opening", [Sniffer, Listener])
def test_without_the_module_the_next_step_is_told(opening: Any) -> None:
    with pytest.raises(NoModule, match=r"doctor says how to load it; or use --engine packet"):
        opening()


@without_module
def test_engine_module_without_the_module_leaves_no_descriptor_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NoModule):
        open_engine("module", print)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_unknown_engine_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="auto, module, ebpf, packet"):
        open_engine("magic", print)


def test_attributes_come_back_as_encoded() -> None:
    raw = encode_attribute(1, b"abc") + encode_attribute(0x8002, b"") + encode_attribute(3, b"1234")
    assert len(raw) == 8 + 4 + 8
    assert [(kind, bytes(data)) for kind, data in attributes(memoryview(raw))] == [
        (1, b"abc"),
        (2, b""),
        (3, b"1234"),
    ]


@pytest.mark.parametrize(
    "raw", [b"\x01", struct.pack("=HH", 3, 1), struct.pack("=HH", 9, 1) + b"1234"]
)
def test_malformed_attributes_are_errors(raw: Any) -> None:
    with pytest.raises(Error, match="malformed"):
        list(attributes(memoryview(raw)))


@pytest.mark.parametrize(
    "raw",
    [b"\x01" * 15, struct.pack("=IHHII", 15, 1, 0, 0, 0), struct.pack("=IHHII", 17, 1, 0, 0, 0)],
)
def test_malformed_messages_are_errors(raw: Any) -> None:
    with pytest.raises(Error, match="malformed"):
        list(messages(memoryview(raw)))


@given(st.binary(max_size=256))
def test_any_bytes_are_parsed_or_are_an_error(raw: bytes) -> None:
    for parse in (attributes, messages):
        try:
            list(parse(memoryview(raw)))
        except Error:
            pass


def test_a_smaller_receive_buffer_than_wanted_is_told() -> None:
    notes: list[Any] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        got = set_receive_buffer(sock, 1 << 30 if os.geteuid() else 1 << 20, notes.append)
    assert (got >= 1 << 20) == (not notes)
    assert all("sudo sysctl net.core.rmem_max" in note for note in notes)
