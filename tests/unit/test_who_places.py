# SPDX-License-Identifier: MIT
"""who --unit, --container, --pod: what runs there, and a word when not all was looked at."""

from __future__ import annotations

from typing import Any, cast

import pytest

from hunter.cli import arguments
from hunter.cli.options import WhoOptions
from hunter.who.places import asks_for_place, in_place

PROCESSES = [
    {"tgid": 1, "start_ns": 1, "unit": "nginx.service", "container": "", "pod": ""},
    {
        **{"tgid": 2, "start_ns": 2, "unit": "docker-0123456789ab.scope", "pod": ""},
        **{"container": "docker:0123456789ab", "container_name": "web"},
    },
    {"tgid": 3, "start_ns": 3, "unit": "", "container": "cri-o:ab", "pod": "shop/cart-1"},
]


def answer(**more: Any) -> dict[Any, Any]:
    of = [{"pid": n, "start_ns": n} for n in (1, 2, 3)]
    return {
        "owners": [{**one, "holders": [one, of[0]]} for one in of],
        "owners_total": 3,
        "flows": [*of, {"pid": None, "start_ns": None}],
        "total": 4,
        "processes": PROCESSES,
        **more,
    }


@pytest.mark.parametrize(
    ("words", "pids"),
    [
        (["--unit", "nginx"], [1]),
        (["--unit", "nginx.service"], [1]),
        (["--unit", "docker-*"], [2]),
        (["--container", "web"], [2]),
        (["--container", "01234567"], [2]),
        (["--pod", "cart-1"], [3]),
        (["--pod", "shop/cart-1"], [3]),
        (["--pod", "shop/cart-1", "--unit", "nginx"], []),
        (["--unit", "web", "--container", "web"], []),
    ],
)
def test_what_runs_there_is_kept(words: list[str], pids: list[Any]) -> None:
    told: list[Any] = []
    options = cast(WhoOptions, arguments.parse(["who", *words]))
    assert asks_for_place(options) and not options.listening
    found = in_place(answer(), options, told.append)
    assert [one["pid"] for one in found["flows"]] == pids
    assert [one["tgid"] for one in found["processes"]] == pids
    assert found["total"] == len(pids) and not told
    # a socket is of each of its holders: here process 1 holds all
    expected = [1, 2, 3] if 1 in pids else pids
    assert [one["pid"] for one in found["owners"]] == expected


def test_what_was_not_looked_at_is_said() -> None:
    told: list[Any] = []
    in_place(
        answer(total=12_345), cast(WhoOptions, arguments.parse(["who", "--unit", "x"])), told.append
    )
    (line,) = told
    assert "of 12,345 flows the 4 newest were looked at" in line
    assert not asks_for_place(cast(WhoOptions, arguments.parse(["who", "8080"])))
