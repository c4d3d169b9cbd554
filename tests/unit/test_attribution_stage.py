# SPDX-License-Identifier: MIT
"""What a worker of the ground-truth suite cannot do on this kernel."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "vm"))
from attribution.stage import Stage, Unable, Wire, run
from attribution.truth import Worker


def lacks(worker: Worker, wire: Wire) -> None:
    run("false")


def has_such_a_child(worker: Worker, wire: Wire, stage: Stage) -> None:
    stage.spawn("child", lacks).hear()


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_worker_lacks_is_no_fault(tmp_path: Path, nested: bool) -> None:
    with (
        socket.socket(socket.AF_UNIX) as unused,
        Stage(tmp_path, Wire(unused), None, tmp_path, 1.0) as stage,
    ):
        work = (has_such_a_child, stage) if nested else (lacks,)
        child = stage.spawn("worker", *work)
        with pytest.raises(Unable, match="false"):
            child.hear()
