# SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlproto.records.wire import among
from nlproto.tables.column_table import ColumnTable, mix, part_of

ROW = np.dtype([("hash", "u8"), ("port", "u2"), ("address", "u8", (2,)), ("seen", "u4")])

GROUPS = part_of(ROW, "port"), part_of(ROW, "address", "seen")


def _values(*rows: Any) -> Any:
    values = np.zeros(len(rows), ROW)
    for at, (number, port, address, seen) in enumerate(rows):
        values[at] = (number, port, (address, 0), seen)
    return values


def _table(*rows: Any) -> Any:
    table = ColumnTable(GROUPS, ("port", "address"), 8)
    table.put(np.arange(len(rows)), _values(*rows))
    return table


def test_a_row_is_found_by_its_key_whatever_else_it_has() -> None:
    table = _table((1, 80, 7, 100), (2, 443, 7, 100))
    assert table.find(_values((2, 443, 7, 5), (3, 22, 7, 5))).tolist() == [1, -1]


def test_the_same_hash_of_another_key_is_not_taken_for_it() -> None:
    table = _table((1, 80, 7, 100))
    assert table.find(_values((1, 81, 7, 100), (1, 80, 8, 100))).tolist() == [-1, -1]


def test_a_removed_row_is_not_found_and_the_one_that_took_its_hash_still_is() -> None:
    table = _table((1, 80, 7, 100), (1, 81, 7, 100))
    table.remove(np.array([0]))
    assert table.find(_values((1, 80, 7, 0), (1, 81, 7, 0))).tolist() == [-1, 1]
    table.remove(np.array([1]))
    assert len(table) == 0


def test_kept_rows_become_the_first() -> None:
    table = _table((1, 80, 7, 100), (2, 443, 7, 200), (3, 22, 7, 300))
    table.keep(np.array([False, True, True]))
    assert table.find(_values((1, 80, 7, 0), (2, 443, 7, 0), (3, 22, 7, 0))).tolist() == [-1, 0, 1]
    assert table.take(np.array([1]), ROW)["seen"].tolist() == [300]


def test_rows_beyond_the_table_are_refused() -> None:
    table = _table((1, 80, 7, 100))
    for row in (-1, 8):
        with pytest.raises(IndexError):
            table.put(np.array([row]), _values((2, 80, 7, 0)))
    assert len(table) == 1


def test_another_seed_makes_other_hashes() -> None:
    column = np.arange(1000, dtype=np.uint64)
    one, two = mix((column,), 1), mix((column,), 2)
    assert len(np.unique(one)) == len(np.unique(two)) == 1000
    assert not np.any(one == two)


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_among_is_what_isin_says_and_imports_nothing(values: Any, some: Any) -> None:
    values, some = np.array(values, np.uint64), np.array(some, np.uint64)
    assert among(values, some).tolist() == np.isin(values, some).tolist()
