# SPDX-License-Identifier: MIT
"""Whose a network namespace is, asked of the kernel."""

import os
import subprocess
from pathlib import Path

import pytest

from nlproto import netns

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")

USER = 65534
INSIDE = ["unshare", "-Urn"]


def started(command, user=None):
    """A process in namespaces of its own; its netns path."""
    child = subprocess.Popen(
        [*command, "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE, user=user
    )
    if not child.stdout.readline():
        child.wait()
        pytest.skip("users may not make user namespaces here")
    return child, Path(f"/proc/{child.pid}/ns/net")


@pytest.mark.parametrize(
    ("command", "user", "owner"),
    [
        (["unshare", "-n"], None, None),
        (INSIDE, USER, USER),
        ([*INSIDE, *INSIDE, *INSIDE], USER, USER),
        (INSIDE, None, 0),
    ],
    ids=["ours", "users", "nested", "roots_user_namespace"],
)
def test_a_namespace_is_of_who_made_the_outermost_user_namespace(command, user, owner):
    child, path = started(command, user)
    try:
        assert netns.owner(path) == owner
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
