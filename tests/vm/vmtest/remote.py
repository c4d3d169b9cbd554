# SPDX-License-Identifier: MIT
"""pytest on the host: runs each test of tests/vm in a guest and reports it here as its own.

One guest is booted per kernel and kernel command line, and kept: tests run in it one after the
other, in one pytest (vmtest.worker). So session fixtures there live as long as the guest. A
guest that panics or hangs fails the test that ran, and the next test gets a new one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from waiting import slowness

from .build import BuildFailed, build_module, build_planted
from .guest import BOOT_SECONDS, Guest, GuestLost
from .kernels import KERNELS, Unavailable, cache_directory, unpack

__all__ = ["Remote", "boot"]

PATIENCE_SECONDS = 300.0
EMULATED = 40.0  # slowness (tests/waiting.py) of a guest that has a processor to itself
HANGS_SECONDS = 240  # then the guest prints where its test is
LOST_GUESTS = 4
HANDED_ON = (
    *("PACKET_HUNTER_REPEAT", "PACKET_HUNTER_LOAD", "PACKET_HUNTER_STRESS"),
    *("PACKET_HUNTER_SOCKETS", "PACKET_HUNTER_CYCLES", "PACKET_HUNTER_LONG"),
    *("PACKET_HUNTER_ENGINE", "PACKET_HUNTER_SOME"),
)


class Remote:
    """The plugin: `directory` is the root of the tree, `kernel` a name in KERNELS."""

    def __init__(self, directory: Path, tests: Path, kernel: str) -> None:
        self._directory = directory
        self._tests = tests
        self._kernel = kernel
        self._files: list[str] = []
        self._guest: Guest | None = None
        self._booted: tuple[str, bool] | None = None
        self._known: set[str] = set()
        self._slowness = 1.0
        self._lost = 0
        self._hopeless: str | None = None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        ours = [item for item in items if self._is_ours(item)]
        others = [item for item in items if not self._is_ours(item)]
        # One boot for all tests that want the same; the order is otherwise kept.
        ours.sort(key=boot)
        items[:] = [*others, *ours]
        self._files = list(dict.fromkeys(str(item.path) for item in ours))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if not self._is_ours(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._run(item, nextitem):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionstart(self) -> None:
        # So that `timeout` and CI leave no guest behind: ends like Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def pytest_sessionfinish(self) -> None:
        self._shut_down()

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[pytest.TestReport]:
        started = time.time()
        follower = nextitem
        if nextitem is not None and (not self._is_ours(nextitem) or boot(nextitem) != boot(item)):
            follower = None
        marker = item.get_closest_marker("patience")
        patience = float(marker.args[0]) if marker else PATIENCE_SECONDS
        patience *= 4 if KERNELS[self._kernel].options else 1
        try:
            guest = self._guest_for(item)
            if item.nodeid not in self._known:
                raise GuestLost(f"the guest did not find this test\n{guest.printed()}")
            guest.send({"run": item.nodeid, "next": follower.nodeid if follower else None})
            while True:
                answer = guest.receive(patience, self._slower)
                if "done" in answer:
                    break
                report = item.config.hook.pytest_report_from_serializable(
                    config=item.config, data=answer["report"]
                )
                if isinstance(report.longrepr, list):  # where it was skipped: JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                yield report
        except (BuildFailed, GuestLost, Unavailable) as error:
            self._shut_down()
            self._count_loss(error)
            yield pytest.TestReport(
                nodeid=item.nodeid,
                location=item.location,
                keywords={},
                outcome="failed",
                longrepr=str(error),
                when="call",
                duration=time.time() - started,
                start=started,
                stop=time.time(),
            )
        else:
            if follower is None:
                self._shut_down()

    def _guest_for(self, item: pytest.Item) -> Guest:
        if self._hopeless:
            raise GuestLost(self._hopeless)
        if self._guest is not None and boot(item) == self._booted:
            return self._guest
        words, parallel = boot(item)
        self._shut_down()
        cache = cache_directory()
        kernel = unpack(KERNELS[self._kernel], cache)
        module = build_module(self._directory, kernel, cache)
        finds_bugs = bool(KERNELS[self._kernel].options)
        planted = []
        if finds_bugs:
            bugs = build_planted(self._tests / "proof" / "planted", kernel, cache)
            planted = [f"PACKET_HUNTER_PLANTED={bugs}"]
        worker = [
            "env",
            f"PYTHONPATH={self._tests}:{self._tests.parent}",
            "PACKET_HUNTER_KERNEL=own",
            f"PACKET_HUNTER_MODULE={module}",
            *planted,
            *(f"{name}={os.environ[name]}" for name in HANDED_ON if name in os.environ),
            *(sys.executable, "-m", "pytest", "-p", "vmtest.worker", "-p", "no:cacheprovider"),
            *("-q", "--tb=long", "--continue-on-collection-errors"),
            *("-o", f"faulthandler_timeout={HANGS_SECONDS}"),
            *self._files,
        ]
        guest = Guest(
            kernel,
            worker,
            append=f"{words} kasan_multi_shot" if finds_bugs else words,
            memory="4G" if finds_bugs else "2G",
            parallel=parallel,
            directory=self._directory,
        )
        guest.__enter__()
        self._guest, self._booted = guest, boot(item)
        answer = guest.receive(BOOT_SECONDS, slowness)
        self._known, self._slowness = set(answer["ready"]), answer["slowness"]
        return guest

    def _slower(self) -> float:
        """How many times longer than a guest that has a processor to itself ours takes now."""
        return max(self._slowness / EMULATED, slowness())

    def _count_loss(self, error: Exception) -> None:
        self._lost += 1
        first = str(error).splitlines()[0]
        if not isinstance(error, GuestLost):
            self._hopeless = f"{first} (see the first failure)"
        elif self._lost >= LOST_GUESTS and self._hopeless is None:
            self._hopeless = f"{self._lost} guests were lost, no more are booted (last: {first})"

    def _shut_down(self) -> None:
        guest, self._guest = self._guest, None
        if guest is None:
            return
        try:
            guest.send({"stop": True})
        except GuestLost:
            pass
        guest.__exit__()

    def _is_ours(self, item: pytest.Item) -> bool:
        return item.path.is_relative_to(self._tests)


def boot(item: pytest.Item) -> tuple[str, bool]:
    """What a test adds to the kernel command line; do its processors run at once?"""
    marker = item.get_closest_marker("boot")
    parallel = item.get_closest_marker("parallel") is not None
    return (str(marker.args[0]) if marker else "", parallel)


def kernel_to_test() -> str:
    """PACKET_HUNTER_KERNEL: a name in KERNELS, or "own" to test the kernel that runs us."""
    name = os.environ.get("PACKET_HUNTER_KERNEL", "6.1")
    if name != "own" and name not in KERNELS:
        raise pytest.UsageError(
            f"PACKET_HUNTER_KERNEL={name}: no such kernel; there are own, {', '.join(KERNELS)}"
        )
    return name
