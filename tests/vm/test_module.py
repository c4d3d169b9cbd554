# SPDX-License-Identifier: MIT
"""The module itself: it loads, and says what it is."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from sockets import udp_receiver

from nlproto.engines.module import ModuleEngine
from nlproto.records.wire import Batch


def test_module_loads_on_a_kernel_that_has_not_loaded_nf_socket(
    module_file: Path, unloaded: None
) -> None:
    subprocess.run(["insmod", str(module_file)], check=True)
    assert Path("/sys/module/sniffer").exists()


def test_modinfo_describes_every_parameter(module_file: Path) -> None:
    text = subprocess.run(
        ["modinfo", str(module_file)], check=True, capture_output=True, text=True
    ).stdout
    assert "license:" in text and "GPL" in text
    parameters = [line for line in text.splitlines() if line.startswith("parm:")]
    assert parameters
    for line in parameters:
        name, _, description = line.removeprefix("parm:").strip().partition(":")
        assert len(description) > 10, f"{name} is not described"


@pytest.mark.boot("ipv6.disable=1")
@pytest.mark.usefixtures("loopback_is_up")
def test_module_names_packets_where_ipv6_is_disabled(module_file: Path, unloaded: None) -> None:
    subprocess.run(["insmod", str(module_file)], check=True)
    with ModuleEngine(("packets",)) as engine, closing(udp_receiver()) as receiver:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", receiver.getsockname())
            port = sender.getsockname()[1]
        batches = [one.records for one in engine.finish() if isinstance(one, Batch)]
    records = np.concatenate(batches)
    assert records["tgid"][records["sport"] == port].tolist() == [os.getpid()] * 2


RULES = "table ip t { chain in { type filter hook input priority 0; ct state new accept; }; }"


def test_what_conntrack_drops_when_it_confirms_is_not_received(
    module_file: Path, unloaded: None
) -> None:
    """Of hooks of one priority the older runs last. A namespace that is made later has ours first.

    Where connection tracking is older than the module, the order is the other one.
    """
    subprocess.run(["insmod", str(module_file)], check=True)
    script = f"nft '{RULES}' && nft list hooks ip"
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", script], check=False, capture_output=True, text=True
    )
    if done.returncode or "hooks_in4" not in done.stdout:
        pytest.skip(f"this kernel does not list its hooks: {done.stderr.strip()[:200]}")
    hooks = done.stdout.partition("hook input {")[2].partition("}")[0]
    assert "confirm" in hooks
    assert hooks.index("confirm") < hooks.index("hooks_in4")
