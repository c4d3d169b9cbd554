# SPDX-License-Identifier: MIT
"""make test-bare: a fresh clone on a Debian with nothing installed; each command sets itself up.

Debian 12 and 13, as root and as a user. A quarter of an hour a suite.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmtest.kernels import Unavailable

from packages.roots import Completed, Root, bare_root
from readme import blocks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["bookworm", "trixie"])
def bare(request: pytest.FixtureRequest) -> Iterator[Root]:
    """The Debian, with what HEAD is in /srv/clone, root's, and a user `somebody`."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a Debian system")
    try:
        base = bare_root(request.param)
    except Unavailable as error:
        pytest.skip(str(error))
    with Root(base) as root:
        clone = ["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(root.path / "srv/clone")]
        subprocess.run(clone, check=True)
        root.run("useradd --create-home somebody")
        yield root


def test_continuous_integration_sets_up_all_it_needs(bare: Root) -> None:
    done = run(bare, "bash .ci/run")
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"\d+ passed, 0 failed, \d+ skipped", last), done.stdout[-3000:]
    assert run(bare, "make clean && git status --porcelain --ignored").stdout == ""


def test_make_run_without_a_terminal_names_its_own_traffic_and_ends(bare: Root) -> None:
    run(bare, "apt-get update -q && apt-get install -qy --no-install-recommends make")
    done = run(bare, "make run")
    assert re.search(r" tcp localhost\.\d+ > localhost\.\d+ len \d+ .*python", done.stdout)
    assert re.search(r"shown = \d+ named", done.stdout), done.stdout[-3000:]


def test_a_user_is_told_the_command_that_root_has_to_run(bare: Root) -> None:
    run(bare, "chown -R somebody .")
    advice = run(bare, "su somebody -c './build.sh --no-module'", check=False)
    assert advice.returncode == 1
    [command] = re.findall(r"run: su - -c '(.*)'$", advice.stdout, re.MULTILINE)
    assert len(advice.stdout.splitlines()) == 1
    run(bare, command)
    run(bare, "su somebody -c './build.sh --no-module'")
    refused = run(bare, "su somebody -c ./build.sh", check=False)
    assert refused.returncode == 1
    [line] = refused.stdout.splitlines()
    takes_modules = Path("/proc/modules").exists()
    assert (f"linux-headers-{os.uname().release}" if takes_modules else "no modules") in line


def test_the_readme_can_be_pasted_on_a_machine_that_has_sudo(bare: Root) -> None:
    """Up to the daemon; tests/host/test_readme.py pastes what runs until Ctrl-C, and the rest."""
    run(bare, "apt-get update -q && apt-get install -qy --no-install-recommends sudo")
    everything = blocks()
    before = everything[: everything.index(["sudo -b packet-hunterd"])]
    pasted = [line for block in before for line in block if not ENDLESS.match(line)]
    assert len(pasted) >= 6
    done = run(bare, " && ".join(f"{{ {line}\n}}" for line in pasted))
    assert re.search(r"^ok +packages", done.stdout, re.MULTILINE), done.stdout[-3000:]


ENDLESS = re.compile(r"make |.*insmod|sudo packet-hunter(?!.* (--duration|--|doctor)( |$))")


def run(bare: Root, command: str, *, check: bool = True) -> Completed:
    return bare.run(f"cd /srv/clone && {command}", check=check, online=True)
