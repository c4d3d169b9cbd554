# SPDX-License-Identifier: MIT
"""What the daemon holds in memory for nobody's use. `make bench-memory` has the figures."""

from __future__ import annotations

import subprocess
import sys

from daemon.history.memory import FlowMemory
from nlproto.overheard.domains import Domains
from nlproto.overheard.names import NumberedNames


def test_flows_that_the_history_has_are_not_kept_twice() -> None:
    """The history is empty when the daemon starts; it is the one to ask all the same."""
    history = FlowMemory(10)
    assert Domains(NumberedNames(), history).beginnings is history


def test_openssl_is_not_loaded_for_names_of_far_ends() -> None:
    """3.5 MB. Hashes of programs (`sha256: on`) load it."""
    code = """
import sys
import daemon.__main__
from nlproto.overheard.names import number_of
assert number_of("a.example") == 0xCC8844B3C5D6320E, hex(number_of("a.example"))
print(*sorted(sys.modules))
"""
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    assert {"_hashlib", "_ssl"}.isdisjoint(found.stdout.split())


def test_what_only_the_start_used_is_given_back() -> None:
    """Most pages of programs and libraries; they are the page cache's in any case."""
    code = """
import daemon.__main__
from nlproto._host import lib

def of_files():
    lines = open("/proc/self/status").read().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

before = of_files()
lib.host_trim()
print(before, of_files())
"""
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    before, after = map(int, found.stdout.split())
    assert after < before / 2
