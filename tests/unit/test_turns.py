# SPDX-License-Identifier: MIT
"""Places and turns: what one user, and all without rights together, may take."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from daemon.sharing.quota import Quota
from daemon.sharing.rounds import Rounds


def test_a_quarter_is_kept_for_those_who_see_everything() -> None:
    places: Quota[Any] = Quota(512)
    taker = iter(range(10_000))
    for user in range(1000, 1100):
        while places.has_room(user):
            places.take(next(taker), user)
    assert places.taken == 384
    for _ in range(128):
        assert places.has_room(None)
        places.take(next(taker), None)
    assert not places.has_room(None)


def test_one_user_has_an_eighth_and_gets_back_what_it_gives_back() -> None:
    places: Quota[Any] = Quota(16)
    places.take("a", 1000)
    places.take("b", 1000)
    assert not places.has_room(1000) and places.has_room(1001)
    places.give_back("a")
    places.give_back("a")
    assert places.has_room(1000)


@given(
    st.integers(1, 600),
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), max_size=300),
)
def test_users_without_rights_never_take_the_last_place(total: int, wishes: Any) -> None:
    places: Quota[Any] = Quota(total)
    for number, (user, weight) in enumerate(wishes):
        if places.has_room(user, weight):
            places.take(number, user, weight)
    assert places.has_room(None)


def test_users_take_turns_and_within_a_user_the_oldest_comes_first() -> None:
    rounds: Rounds[Any] = Rounds()
    for thing in "abc":
        rounds.add(1, thing)
    rounds.add(2, "x")
    rounds.add(3, "y")
    rounds.add(1, "a")
    rounds.discard(3, "y")
    order = []
    while rounds:
        order.append(rounds.next())
    assert order == ["a", "x", "b", "c"]
    assert rounds.next() is None


def test_who_weighs_nothing_may_be_the_last_to_leave() -> None:
    places: Quota[Any] = Quota(16)
    places.take("everything", None, 0)
    places.take("filtered", None, 3)
    places.give_back("filtered")
    places.give_back("everything")
    assert places.taken == 0 and places.has_room(None, 16)
