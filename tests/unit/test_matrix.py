# SPDX-License-Identifier: MIT
"""The table of make test-matrix: nothing that went wrong is missing from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

from vmtest import kernels, matrix  # noqa: E402
from vmtest.build import BuildFailed  # noqa: E402
from vmtest.kernlog import COMPLAINT  # noqa: E402

CASE = '<testcase classname="tests.vm.{}" name="{}">{}</testcase>'


def results(tmp_path: Path, *cases: Any) -> Any:
    path = tmp_path / "results.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    row = matrix.Row({"kernel": "6.1"})
    matrix.read_results(path, row)
    return row


def whole() -> list[Any]:
    return [
        CASE.format(file, "works", "")
        for file in ("test_module", "test_attribution", "test_unload", "test_table")
    ]


def test_a_kernel_on_which_all_passed_is_clean(tmp_path: Path) -> None:
    row = results(tmp_path, *whole())
    assert {row.cells[c] for c in ("load", "attribution", "unload", "others")} == {"1 ok"}
    assert row.cells["dmesg"] == "clean"
    assert not row.failed and not row.notes


def test_failures_and_skips_stand_in_their_column_and_below_the_table(tmp_path: Path) -> None:
    fault = '<failure message="x">wrong</failure>'
    skip = '<skipped message="no MPTCP"/>'
    row = results(
        tmp_path,
        *whole(),
        CASE.format("test_attribution", "tcp", fault),
        CASE.format("test_attribution", "mptcp", skip),
    )
    assert row.failed
    assert row.cells["attribution"] == "1 of 3, 1 skipped, 1 FAILED"
    text = matrix.table([row])
    assert "FAILED  tcp" in text and "skipped mptcp: no MPTCP" in text


def test_a_complaint_of_the_kernel_counts_as_one_and_not_against_the_test(tmp_path: Path) -> None:
    fault = f'<error message="on teardown">{COMPLAINT}\nBUG</error>'
    row = results(tmp_path, *whole(), CASE.format("test_unload", "under_traffic", fault))
    assert row.failed
    assert (row.cells["unload"], row.cells["dmesg"]) == ("2 ok", "1 complaints")


def test_a_guest_that_was_lost_is_no_clean_kernel(tmp_path: Path) -> None:
    fault = '<failure message="x">the guest is gone (kernel panic?) (kernel 6.1)</failure>'
    row = results(tmp_path, *whole(), CASE.format("test_unload", "under_traffic", fault))
    assert row.failed
    assert (row.cells["unload"], row.cells["dmesg"]) == ("1 of 2, 1 FAILED", "1 guests lost")


def test_a_column_without_a_test_fails_the_row(tmp_path: Path) -> None:
    row = results(tmp_path, *whole()[1:])
    assert row.failed
    assert row.cells["load"] == "none ran"


def test_a_kernel_that_the_mirror_lacks_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unpack(kernel: Any, cache: Any) -> None:
        raise kernels.Unavailable(f"{kernel.name}: the mirror has it no more")

    monkeypatch.setattr(matrix, "unpack", unpack)
    row = matrix.try_kernel("5.10")
    assert row.failed
    assert row.cells["release"] == "not to be had"
    assert "the mirror has it no more" in matrix.table([row])


def test_a_kernel_for_which_it_does_not_build_is_a_row_with_the_compilers_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*_: Any) -> None:
        raise BuildFailed("x.c:1: warning: unused")

    monkeypatch.setattr(
        matrix, "unpack", lambda *_: kernels.UnpackedKernel("6.1", Path("/"), "6.1.1")
    )
    monkeypatch.setattr(matrix, "build_module", build)
    row = matrix.try_kernel("6.1")
    assert row.failed
    assert row.cells["build"] == "FAILED"
    assert "warning: unused" in matrix.table([row])


@pytest.mark.parametrize(("there", "fits"), [("7.2.13-amd64", True), ("7.4.1-amd64", False)])
def test_a_suite_that_moved_on_to_another_version_is_told(
    tmp_path: Path, there: str, fits: bool
) -> None:
    root = tmp_path / "kernels" / "7.2"
    (root / "boot").mkdir(parents=True)
    (root / "boot" / f"vmlinuz-{there}").touch()
    (root / "lib/modules" / there).mkdir(parents=True)
    (root / "lib/modules" / there / "build").symlink_to("/nowhere")
    if fits:
        assert kernels.unpack(kernels.KERNELS["7.2"], tmp_path).release == there
    else:
        with pytest.raises(kernels.Unavailable, match=r"had no such kernel .* 7\.4\.1-amd64"):
            kernels.unpack(kernels.KERNELS["7.2"], tmp_path)
