# SPDX-License-Identifier: MIT
"""Questions: users in turn, given up when the asker goes, never more answers than are read."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from daemon.serve.questions import Questions, QueuedQuestion
from daemon.sharing.allowance import Allowance
from nlproto.errors import Error


class Asked:
    """Questions of a loop, and what became of them."""

    def __init__(self, may_answer: Callable[..., Any] = lambda question: True) -> None:
        self.questions = Questions(
            asyncio.get_running_loop(), may_answer, Allowance(share=100.0, saved=100.0)
        )
        self.answers: list[Any] = []

    def ask(
        self,
        user: Any,
        work: Callable[..., Any] = lambda stop: None,
        full: bool = False,
        name: Any = None,
    ) -> Any:
        question = QueuedQuestion(
            user, full, work, lambda result: self.answers.append((name, result))
        )
        self.questions.ask(question)
        return question

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)


def _run(test: Any) -> None:
    asyncio.run(test())


def test_users_take_turns_however_many_questions_one_has() -> None:
    async def test() -> None:
        asked, go_on = Asked(), threading.Event()
        asked.ask(1, lambda stop: go_on.wait(20))
        for number in range(50):
            asked.ask(1, name=f"greedy{number}")
        asked.ask(2, name="other")
        go_on.set()
        await asked.until(lambda: len(asked.answers) == 52)
        assert [name for name, _ in asked.answers].index("other") <= 2

    _run(test)


def test_root_does_not_wait_for_others() -> None:
    async def test() -> None:
        asked, go_on = Asked(), threading.Event()
        asked.ask(1, lambda stop: go_on.wait(20), name="slow")
        asked.ask(0, full=True, name="root")
        await asked.until(lambda: asked.answers)
        assert asked.answers[0][0] == "root"
        go_on.set()
        await asked.until(lambda: len(asked.answers) == 2)

    _run(test)


def test_what_nobody_waits_for_is_not_begun_and_what_runs_is_given_up() -> None:
    async def test() -> None:
        asked, began, ended = Asked(), threading.Event(), threading.Event()

        def endless(stop: Any) -> None:
            began.set()
            try:
                while True:
                    stop()
            finally:
                ended.set()

        running = asked.ask(1, endless)
        waiting = [asked.ask(1, lambda stop: pytest.fail("begun")) for _ in range(100)]
        await asyncio.to_thread(began.wait, 20)
        for question in (*waiting, running):
            asked.questions.cancel(question)
        assert asked.questions.waiting == 0
        await asyncio.to_thread(ended.wait, 20)
        asked.ask(1, name="next")
        await asked.until(lambda: asked.answers)
        assert asked.answers == [("next", None)]

    _run(test)


def test_a_question_of_a_user_without_rights_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.serve.questions._LONGEST", 0.05)

    def endless(stop: Any) -> None:
        while True:
            stop()

    async def test() -> None:
        asked = Asked()
        asked.ask(1, endless)
        await asked.until(lambda: asked.answers)
        assert "ask for less" in str(asked.answers[0][1])

    _run(test)


def test_who_does_not_read_waits_and_others_do_not() -> None:
    async def test() -> None:
        blocked = {1}
        asked = Asked(lambda question: question.user not in blocked)
        asked.ask(1, name="deaf")
        asked.ask(2, name="other")
        await asked.until(lambda: asked.answers)
        assert asked.answers == [("other", None)]
        blocked.clear()
        asked.questions.pump()
        await asked.until(lambda: len(asked.answers) == 2)

    _run(test)


def test_an_unforeseen_failure_is_an_answer_and_the_next_question_is_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        asked = Asked()
        asked.ask(1, lambda stop: 1 // 0)
        asked.ask(1, lambda stop: 5, name="next")
        await asked.until(lambda: len(asked.answers) == 2)
        assert isinstance(asked.answers[0][1], Error)
        assert asked.answers[1] == ("next", 5)

    _run(test)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to go first")
def test_who_sees_everything_goes_before_all_others_of_the_machine() -> None:
    """A nice value counts in a session alone. So root waited for what other users started."""

    def first(stop: Any) -> bool:
        policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
        nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return policy == os.SCHED_RR or nice == -10

    async def test() -> None:
        asked = Asked()
        asked.ask(0, first, full=True, name="root")
        asked.ask(1000, first, name="a user")
        await asked.until(lambda: len(asked.answers) == 2)
        assert sorted(asked.answers) == [("a user", False), ("root", True)]

    _run(test)
