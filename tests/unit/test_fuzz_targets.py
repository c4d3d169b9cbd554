# SPDX-License-Identifier: MIT
"""What `make fuzz` runs for hours, for a moment: good input, and good input that was damaged."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from nlproto.errors import Error

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzzing"))
import targets  # noqa: E402


def damaged(data: Any, luck: Any) -> bytes:
    data = bytearray(data)
    for _ in range(luck.randint(1, 6)):
        at = luck.randrange(len(data) + 1)
        change = luck.randrange(4)
        if change == 0:
            del data[at : at + luck.randint(1, 9)]
        elif change == 1:
            data[at:at] = luck.randbytes(luck.randint(1, 9))
        elif at < len(data):
            data[at] = luck.choice((0, 255, data[at] ^ 1 << luck.randrange(8)))
    return bytes(data)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_target_takes_its_seeds_and_refuses_damage(name: Any) -> None:
    luck = random.Random(name)
    for data in [b"", *targets.SEEDS[name]()]:
        targets.run(name, data)
        for _ in range(60):
            targets.run(name, damaged(data, luck))


def test_every_target_has_a_seed_that_is_understood() -> None:
    """Else its corpus begins outside the format, and nothing behind the first check is reached."""
    taken = [name for name in targets.TARGETS if any(map(lambda d: _taken(name, d), seeds(name)))]
    assert set(targets.TARGETS) - set(taken) == set()


def seeds(name: Any) -> Any:
    return targets.SEEDS[name]()


def _taken(name: Any, data: Any) -> bool:
    try:
        targets.TARGETS[name](data)
    except Error:
        return False
    return True
