# SPDX-License-Identifier: MIT
"""Capture files: who may read them, where they are not written, what survives a failure."""

from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hunter.save.capturefile import CaptureFile
from hunter.save.saving import format_of
from nlproto import Error, UsageError

ROOT = os.geteuid() == 0


@pytest.fixture
def sticky(tmp_path: Path) -> Any:
    path = tmp_path / "tmp"
    path.mkdir()
    path.chmod(0o1777)
    return path


def write(path: Any, data: bytes = b"x", **environ: Any) -> None:
    with CaptureFile(str(path), environ) as file:
        file.write(data)


def test_a_capture_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write(tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_an_older_file_is_emptied_and_made_private(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("older and longer")
    path.chmod(0o644)
    write(path)
    assert path.read_bytes() == b"x" and stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(not ROOT, reason="only root can give a file away")
def test_a_new_capture_belongs_to_who_called_sudo(tmp_path: Path) -> None:
    write(tmp_path / "a", SUDO_UID="1234", SUDO_GID="2345")
    found = (tmp_path / "a").stat()
    assert (found.st_uid, found.st_gid) == (1234, 2345)


def test_a_link_in_a_sticky_directory_is_refused(sticky: Any, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (sticky / "a").symlink_to(target)
    with pytest.raises(Error, match="is a link"):
        write(sticky / "a")
    assert target.read_text() == "precious"


def test_a_directory_for_all_that_is_not_sticky_is_no_better(tmp_path: Path) -> None:
    place, target = tmp_path / "place", tmp_path / "target"
    place.mkdir()
    place.chmod(0o777)
    target.write_text("precious")
    (place / "a").symlink_to(target)
    (place / "b").hardlink_to(target)
    for name in ("a", "b"):
        with pytest.raises(Error, match="anybody can write"):
            write(place / name)
    assert target.read_text() == "precious"


@pytest.mark.skipif(not ROOT, reason="is about root")
def test_root_follows_no_link_of_another_user(tmp_path: Path) -> None:
    home, target = tmp_path / "home", tmp_path / "target"
    home.mkdir()
    target.write_text("precious")
    (home / "a").symlink_to(target)
    os.chown(home, 1234, 1234)
    os.lchown(home / "a", 1234, 1234)
    with pytest.raises(Error, match="link of somebody else"):
        write(home / "a")
    assert target.read_text() == "precious"
    write(home / "a", SUDO_UID="1234", SUDO_GID="1234")
    assert target.read_text() != "precious"


def test_a_dangling_link_in_a_sticky_directory_makes_no_file(sticky: Any, tmp_path: Path) -> None:
    (sticky / "a").symlink_to(tmp_path / "target")
    with pytest.raises(Error, match="is a link"):
        write(sticky / "a")
    assert not (tmp_path / "target").exists()


def test_a_linked_directory_in_a_sticky_directory_is_refused(sticky: Any, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (sticky / "mine").symlink_to(tmp_path / "etc")
    with pytest.raises(Error, match="is a link"):
        write(sticky / "mine" / "a")
    assert not list((tmp_path / "etc").iterdir())


def test_a_link_that_leads_through_a_sticky_directory_is_refused(
    sticky: Any, tmp_path: Path
) -> None:
    (sticky / "hop").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(sticky / "hop" / "b")
    with pytest.raises(Error, match="is a link"):
        write(tmp_path / "a")


def test_a_link_elsewhere_is_followed(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "a").symlink_to("dir/b")
    (tmp_path / "linked").symlink_to(tmp_path / "dir")
    write(tmp_path / "a", b"one")
    assert (tmp_path / "dir" / "b").read_bytes() == b"one"
    write(tmp_path / "linked" / ".." / "linked" / "c", b"two")
    assert (tmp_path / "dir" / "c").read_bytes() == b"two"


@pytest.mark.skipif(not ROOT, reason="only root can give a file away")
def test_somebody_elses_file_or_fifo_in_a_sticky_directory_is_refused(sticky: Any) -> None:
    (sticky / "a").write_text("bait")
    os.chown(sticky / "a", 1234, 1234)
    os.mkfifo(sticky / "b")
    for name in "ab":
        with pytest.raises(Error, match="somebody else|cannot write"):
            write(sticky / name)
    assert (sticky / "a").read_text() == "bait"


def test_link_loops_and_missing_directories_are_plain_errors(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(Error, match="cannot write .*symbolic links"):
        write(tmp_path / "a")
    with pytest.raises(Error, match="make its directory first"):
        write(tmp_path / "no" / "such")
    with pytest.raises(Error, match="cannot write"):
        write(tmp_path)
    with pytest.raises(UsageError, match="names no file"):
        write("")


@pytest.mark.parametrize("name", [".", "./.", "{0}/.", "{0}/here", "{0}/root"])
def test_a_path_that_ends_with_a_dot_is_a_directory(tmp_path: Path, name: str) -> None:
    """Or a link that leads to one."""
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "root").symlink_to("/")
    with pytest.raises(Error, match="Is a directory; name a file in it"):
        CaptureFile(name.format(tmp_path))


@pytest.mark.parametrize("rows", [False, True])
def test_a_full_disk_keeps_what_fits_whole(tmp_path: Path, rows: bool) -> None:
    """/dev/full is no regular file, so the limit on file sizes stands in for a full disk."""
    path = tmp_path / "a"
    pid = os.fork()
    if pid == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (15, 15))
        code = 1
        try:
            with CaptureFile(str(path), {}) as file:
                if rows:
                    file.write_rows([b"12345\n", b"67890\n", b"abcde\n"])
                for _ in range(3):
                    file.write(b"12345\n")
        except Error as error:
            code = 0 if "File too large; 12 bytes are saved" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_bytes() == (b"12345\n67890\n" if rows else b"12345\n12345\n")


def test_sigkill_cuts_no_row(tmp_path: Path) -> None:
    """Rows of several pages: a write of one's own is given up between two of them."""
    path = tmp_path / "a"
    row = b"%0*d\n" % (12_287, 1)
    for turn in range(20):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(writing, 2)  # the writer has it too
            with CaptureFile(str(path), {}) as file:
                file.write_rows([row] * 50)
                os.write(writing, b"begun")
                while file.size < 1 << 28:
                    file.write_rows([row] * 50)
            os._exit(0)
        os.close(writing)
        os.read(reading, 5)
        time.sleep(turn * 0.0007)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert not os.read(reading, 1)  # until the writer has ended too
        os.close(reading)
        data = path.read_bytes()
        assert len(data) % len(row) == 0 and data == row * (len(data) // len(row))


def test_a_killed_writer_is_told(tmp_path: Path) -> None:
    with CaptureFile(str(tmp_path / "a"), {}) as file:
        file.write_rows([b"1\n"])
        (child,) = psutil.Process().children()
        child.kill()
        with pytest.raises(Error, match=f"process that writes it, {child.pid}, is gone; 2 bytes"):
            file.write_rows([b"2\n"])


def test_dev_full_is_an_error_with_its_cause() -> None:
    with pytest.raises(Error, match="No space left"):
        write("/dev/full")


@pytest.mark.parametrize(
    ("path", "asked", "kind"),
    [
        ("x.csv", None, "csv"),
        ("x.JSONL", None, "jsonl"),
        ("x.parquet", None, "parquet"),
        ("x.pcapng", None, "pcapng"),
        ("x.txt", "jsonl", "jsonl"),
        ("-", None, "csv"),
    ],
)
def test_the_suffix_or_the_option_tells_the_format(path: str, asked: str | None, kind: str) -> None:
    assert format_of(path, asked) == kind


@pytest.mark.parametrize("path", ["x", "x.txt", "x.pcap"])
def test_an_unknown_suffix_is_bad_usage(path: str) -> None:
    with pytest.raises(UsageError):
        format_of(path, None)
