# SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.serve.requests import parse_request, request_id
from nlproto.client.frames import (
    MAX_REQUEST,
    Decoder,
    FrameError,
    Kind,
    encode,
    encode_json,
    parse_json,
)
from nlproto.errors import UsageError
from waiting import stand_in


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=300))), st.data())
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(
    frames: Any, data: st.DataObject
) -> None:
    stream = b"".join(encode(kind, payload) for kind, payload in frames)
    decoder, found = Decoder(MAX_REQUEST), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += list(decoder.feed(stream[:cut]))
        stream = stream[cut:]
    assert found == frames
    assert decoder.pending == 0


@given(st.lists(st.binary(max_size=2000), max_size=50))
def test_any_bytes_end_in_frames_or_in_one_clear_error_and_in_bounded_memory(chunks: Any) -> None:
    decoder = Decoder(1000)
    try:
        for chunk in chunks:
            for _, payload in decoder.feed(chunk):
                assert len(payload) <= 1000
            assert decoder.pending <= 1000 + 8
    except FrameError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x00\x00\x00\x01\x00\x00\x00",
        b"\xff\xff\xff\xff\x01\x00\x00\x00",
        b"\x04\x00\x00\x00\x09\x00\x00\x00",
        b"\x04\x00\x00\x00\x01\x00\x01\x00",
    ],
    ids=["no length", "too long", "unknown kind", "reserved bytes"],
)
def test_a_head_that_is_wrong_is_refused_before_anything_is_read(raw: bytes) -> None:
    with pytest.raises(FrameError):
        list(Decoder(1000).feed(raw))


def test_a_control_frame_holds_one_object() -> None:
    (frame,) = Decoder(1000).feed(encode_json(Kind.CONTROL, {"id": 1}))
    assert parse_json(frame[1]) == {"id": 1}
    for wrong in (b"[1]", b"{", b"\xff", b"[" * 5000):
        with pytest.raises(FrameError):
            parse_json(wrong)


def test_a_cookie_of_more_than_64_bits_is_refused() -> None:
    whole = b'{"id":1,"op":"lookup","keys":[{"cookie":%d}]}'
    assert stand_in(parse_request(whole % (2**64 - 1))).keys[0].cookie == 2**64 - 1
    with pytest.raises(UsageError, match="64 bits"):
        parse_request(whole % 2**64)


@given(st.binary(max_size=500))
def test_any_request_is_parsed_or_refused(payload: bytes) -> None:
    try:
        parse_request(payload)
    except UsageError as error:
        assert str(error).startswith("bad request")
    assert request_id(payload) >= 0


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
_NAMES = ["id", "op", "port", "proto", "host", "pid", "pname", "since", "at", "limit", "keys"]
_OPS = ["hello", "who", "lookup", "stats", "subscribe", "unsubscribe", "history", "owner"]


@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES), st.sampled_from(_OPS))
def test_requests_of_the_right_shape_with_wrong_values_are_refused_or_within_limits(
    fields: Any, op: Any
) -> None:
    import msgspec

    try:
        payload = msgspec.json.encode({"id": 1, **fields, "op": op})
    except (ValueError, OverflowError, TypeError):
        return
    try:
        request = parse_request(payload)
    except UsageError:
        return
    assert 0 <= getattr(request, "port", 0) <= 65535 if getattr(request, "port", 0) else True
    assert getattr(request, "limit", 1) <= 10_000


@pytest.mark.parametrize(
    ("payload", "word"),
    [
        (b'{"id":1,"op":"who","port":65536}', "port"),
        (b'{"id":1,"op":"who","port":"53"}', "port"),
        (b'{"id":1,"op":"who","prot":53}', "prot"),
        (b'{"id":1,"op":"who","limit":100000}', "limit"),
        (b'{"id":1,"op":"reboot"}', "reboot"),
        (b'{"id":1,"op":"who","host":"\x89"}', "utf-8"),
        (b'{"id":1,"\xc0":"who"}', "utf-8|missing|unknown"),
        (b'{"op":"stats"}', "id"),
    ],
)
def test_the_refusal_names_the_field(payload: bytes, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_request(payload)
