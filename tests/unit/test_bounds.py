# SPDX-License-Identifier: MIT
"""The sum of all bounds stays below the service's memory limit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from daemon.serve.bounds import bounds_of, memory_limit
from daemon.system.config import Config, load
from nlproto.errors import UsageError

UNIT = Path(__file__).parents[2] / "systemd" / "packet-hunterd.service"


def _unit_limit() -> int:
    found = re.search(r"^MemoryMax=(\d+)G$", UNIT.read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 30


@pytest.mark.parametrize("config", [Config(), load(str(UNIT.with_name("daemon.yaml")))])
def test_the_defaults_fit_into_the_units_limit_with_a_margin(config: Any) -> None:
    bounds = bounds_of(config, _unit_limit()).as_dict()
    assert bounds["together"] <= _unit_limit() * 0.9
    assert bounds["together"] == sum(bounds["bounds"].values())
    assert bounds["bounds"]["client_queues"] >= 16 * config.client_queue_size


def test_queues_of_clients_get_what_is_left() -> None:
    small, great = Config(client_queue_size=64 << 20), Config(client_queue_size=64 << 10)
    limit = _unit_limit()
    assert bounds_of(small, limit).client_queues < 512 * (64 << 20)
    assert bounds_of(great, limit).client_queues == 512 * (64 << 10)
    assert bounds_of(small).client_queues == 512 * (64 << 20)


def test_what_cannot_fit_is_refused_in_one_line() -> None:
    with pytest.raises(
        UsageError, match=r"need \d+ MiB more .* 2048 MiB .*raise MemoryMax"
    ) as error:
        bounds_of(Config(queue_size=4 << 30), 2 << 30)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError):
        bounds_of(Config(max_processes=1 << 24), 2 << 30)


def _tree(root: Any, cgroup: Any, files: Any) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_bytes(cgroup)
    for name, value in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(value)


def test_the_least_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    files = {"a.slice/memory.max": "1000\n", "a.slice/b.service/memory.max": "max\n"}
    _tree(tmp_path, b"0::/a.slice/b.service\n", files)
    assert memory_limit(str(tmp_path)) == 1000


def test_version_1_and_none_at_all(tmp_path: Path) -> None:
    files = {"memory/x/memory.limit_in_bytes": "5000\n"}
    _tree(tmp_path / "one", b"4:memory:/x\n0::/\n", files)
    assert memory_limit(str(tmp_path / "one")) == 5000
    files = {"memory/x/memory.limit_in_bytes": "9223372036854771712\n"}
    _tree(tmp_path / "two", b"4:memory:/x\n0::/\n", files)
    assert memory_limit(str(tmp_path / "two")) is None
    assert memory_limit(str(tmp_path / "three")) is None
