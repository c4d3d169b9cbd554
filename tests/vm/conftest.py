# SPDX-License-Identifier: MIT
"""Tests of the module on a real kernel: in a guest (default), or on the kernel that runs us.

PACKET_HUNTER_KERNEL=own runs them right here: as root, on a machine that may crash (the Vagrant
guest, or the guest that vmtest booted). Otherwise it names the kernel to boot; 6.1 by default.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent.parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from vmtest.kernlog import COMPLAINT, KernelLog, problems  # noqa: E402
from vmtest.remote import Remote, kernel_to_test  # noqa: E402

MARKERS = (
    "parallel: the guest's processors run at once; not for what unloads the module under traffic",
    "boot(command_line): boot the guest with these words on the kernel command line",
    "patience(seconds): how long a guest of usual speed may take over this test (default 300)",
)
LOG = pytest.StashKey[KernelLog]()


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    kernel = kernel_to_test()
    if kernel != "own":
        # so that the guest ends too
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        config.pluginmanager.register(Remote(ROOT, TESTS, kernel))
    elif os.geteuid() == 0:
        config.stash[LOG] = KernelLog().__enter__()


def pytest_unconfigure(config: pytest.Config) -> None:
    if LOG in config.stash:
        config.stash[LOG].__exit__()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if kernel_to_test() == "own" and os.geteuid() != 0:
        for item in items:
            if item.path.is_relative_to(TESTS):
                item.add_marker(pytest.mark.skip(reason="needs root to load the module"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """If the kernel complains, the test that ran fails, whatever it found."""
    yield
    log = item.config.stash.get(LOG, None)
    if log is not None:
        lines = log.read()
        if found := problems(lines):
            said = [*found, "the log's end:", *lines[-200:]]
            pytest.fail(f"{COMPLAINT}\n" + "\n".join(said), pytrace=False)


@pytest.fixture
def kernel_log(request: pytest.FixtureRequest) -> KernelLog:
    """What the kernel says from here on; what a test reads is not held against it."""
    log = request.config.stash[LOG]
    log.read()
    return log


@pytest.fixture(scope="session")
def module_file() -> Path:
    """sniffer.ko for the running kernel."""
    path = Path(os.environ.get("PACKET_HUNTER_MODULE", ROOT / "kmod" / "sniffer.ko"))
    if not path.exists():
        pytest.fail(f"{path} is not there; ./build.sh makes it")
    return path


@pytest.fixture
def loopback_is_up() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@pytest.fixture
def unloaded(module_file: Path) -> Iterator[None]:
    """The module is not loaded when the test begins, nor after it."""
    _unload()
    yield
    _unload()


@pytest.fixture
def loaded(module_file: Path) -> Iterator[None]:
    """The module is loaded when the test begins; it stays loaded for the next test."""
    if not Path("/sys/module/sniffer").exists():
        subprocess.run(["insmod", str(module_file)], check=True)
    yield


@pytest.fixture(scope="session", autouse=True)
def unload_at_the_end() -> Iterator[None]:
    """Unloads with the last test, so that a complaint about it fails a test."""
    yield
    if os.geteuid() == 0 and kernel_to_test() == "own":
        _unload()


def _unload() -> None:
    if Path("/sys/module/sniffer").exists():
        subprocess.run(["rmmod", "sniffer"], check=True)
