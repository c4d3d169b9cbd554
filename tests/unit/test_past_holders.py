# SPDX-License-Identifier: MIT
"""What earlier looks say of a packet that was sent before the last one."""

from __future__ import annotations

from nlproto.engines.past_holders import PastHolders

SOCKET, FIRST, SECOND = 7, 100, 200


def test_the_first_look_knows_of_nobody_who_left() -> None:
    assert not PastHolders(10).has_been_left(SOCKET, [FIRST], now_ns=10, sent_ns=5)


def test_packets_before_the_look_that_missed_a_holder_are_doubtful() -> None:
    past = PastHolders(10)
    past.has_been_left(SOCKET, [FIRST, SECOND], now_ns=10, sent_ns=5)
    assert past.has_been_left(SOCKET, [SECOND], now_ns=20, sent_ns=15)
    assert past.has_been_left(SOCKET, [SECOND], now_ns=30, sent_ns=16)
    assert not past.has_been_left(SOCKET, [SECOND], now_ns=40, sent_ns=20)


def test_another_holder_more_is_no_reason_for_doubt() -> None:
    past = PastHolders(10)
    past.has_been_left(SOCKET, [FIRST], now_ns=10, sent_ns=5)
    assert not past.has_been_left(SOCKET, [FIRST, SECOND], now_ns=20, sent_ns=15)


def test_who_alone_held_it_is_known() -> None:
    past = PastHolders(10)
    past.has_been_left(SOCKET, [FIRST], now_ns=10, sent_ns=5)
    assert past.only(SOCKET, FIRST)
    assert not past.only(SOCKET, SECOND) and not past.only(SOCKET + 1, FIRST)


def test_no_more_sockets_are_remembered_than_the_limit() -> None:
    past = PastHolders(10)
    for inode in range(1000):
        past.has_been_left(inode, [FIRST], now_ns=10, sent_ns=5)
        past.nobody_stays(inode, 10)
        assert len(past._seen) <= 11 and len(past._unheld) <= 11


def test_a_socket_that_nobody_has_for_long_stays_so() -> None:
    past = PastHolders(10)
    assert not past.nobody_stays(SOCKET, 0)
    assert not past.nobody_stays(SOCKET, 100_000_000)
    assert past.nobody_stays(SOCKET, 300_000_000)
