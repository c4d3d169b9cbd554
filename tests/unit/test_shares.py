# SPDX-License-Identifier: MIT
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nlproto.tables.shares import NOBODY, Payers, level, surplus


def _left(goes: Any, groups: Any) -> dict[int, int]:
    names, counts = np.unique(np.asarray(groups)[~goes], return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))


def test_whoever_has_most_gives_and_of_that_the_oldest() -> None:
    payers = np.array([1] * 90 + [2] * 8 + [3] * 2)
    age = np.arange(100)
    goes = surplus(age, [payers], 40)
    assert _left(goes, payers) == {1: 30, 2: 8, 3: 2}
    assert np.flatnonzero(~goes).tolist() == [*range(30), *range(90, 100)]


def test_several_greedy_ones_give_alike() -> None:
    payers = np.array([1] * 100 + [2] * 60 + [3] * 10)
    assert _left(surplus(np.arange(170), [payers], 90), payers) == {1: 40, 2: 40, 3: 10}


def test_within_a_payer_the_greatest_program_gives() -> None:
    payers = np.zeros(100, int)
    programs = np.array([7] * 5 + [8] * 95)
    assert _left(surplus(np.arange(100)[::-1], [payers, programs], 50), programs) == {7: 5, 8: 45}


def test_weights_count_instead_of_rows() -> None:
    payers = np.array([1, 1, 2, 2, 2, 2])
    weights = np.array([100, 100, 1, 1, 1, 1])
    goes = surplus(np.array([1, 0, 5, 4, 3, 2]), [payers], 104, weights)
    assert np.flatnonzero(goes).tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=60), st.integers(0, 60))
def test_nobody_under_the_level_loses_a_row(rows: Any, keep: int) -> None:
    payers = np.array([payer for payer, _ in rows], np.int64)
    programs = payers * 10 + np.array([program for _, program in rows], np.int64)
    goes = surplus(np.arange(len(rows)), [payers, programs], keep)
    assert np.count_nonzero(~goes) == min(keep, len(rows))
    before = _left(np.zeros(len(rows), bool), payers)
    after = _left(goes, payers)
    allowed = level(before, keep)
    for payer, count in before.items():
        assert after.get(payer, 0) >= min(count, allowed)


def test_the_level_shares_out_what_there_is() -> None:
    assert level({"a": 10, "b": 100, "c": 50}, 100) == 45
    assert level({"a": 10}, 100) == 10
    assert level({}, 100) == 0


def test_subordinate_uids_count_against_their_user(tmp_path: Path) -> None:
    path = tmp_path / "subuid"
    path.write_text(
        "1234:100000:65536\n# words\nno-such-user-here:300000:65536\nroot:400000:1000\n"
        "0:500000:1000\nbad\n1:x:y\n1:2:0\n9:4294967000:4000\n"
    )
    payers = Payers(str(path))
    uids = np.array([0, 1234, 99_999, 100_000, 165_535, 165_536, 300_007, 400_007, 500_001])
    expected = [0, 1234, 99_999, 1234, 1234, 165_536, 300_000, 400_000, 500_000]
    assert payers.of(uids.astype(np.uint32)).tolist() == expected
    assert payers.of_one(None) == NOBODY
    path.write_text("1235:100000:65536\n")
    os.utime(path, ns=(1, 1))
    payers.refresh()
    assert payers.of_one(100_000) == 1235


def test_without_the_file_everybody_pays_for_themselves(tmp_path: Path) -> None:
    payers = Payers(str(tmp_path / "none"))
    assert payers.of(np.array([5, 100_000], np.uint32)).tolist() == [5, 100_000]
