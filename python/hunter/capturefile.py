# SPDX-License-Identifier: MIT
"""Files that captures go into: private, given to whoever called sudo, never where a trap is laid.

A capture is written by root, often into /tmp, where anybody may have put a link before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from nlproto import Error, UsageError

__all__ = ["CaptureFile"]

_PAGE = os.sysconf("SC_PAGE_SIZE")
_MAX_LINKS = 40  # MAXSYMLINKS of the kernel (include/linux/namei.h)


class CaptureFile:
    """An output that only ever grows by whole rows; a context manager.

    `path` "-" is standard output. A regular file gets mode 0600 and, when new and written by
    root under sudo, the owner in `environ`'s SUDO_UID and SUDO_GID. Raises Error, UsageError.
    """

    def __init__(self, path: str, environ: Mapping[str, str] = os.environ) -> None:
        self.path = path
        self.size = 0
        self._fd = os.dup(1) if path == "-" else _open(path, environ)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode) and path != "-"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Append `data` whole, or nothing of it where the file allows. Raises as write_rows()."""
        self.write_rows((data,))

    def write_rows(self, rows: Iterable[bytes]) -> None:
        """Append `rows`; those that do not fit are left out whole.

        The kernel gives a write() up between two pages when SIGKILL has come (generic_perform_write
        in mm/filemap.c), so a row that crosses a page's end is a write by itself: only that one can
        be left in half, by a kill just then.

        Raises BrokenPipeError when the reader of a pipe has gone, Error for anything else.
        """
        pieces = _pieces(rows, self.size) if self._regular else iter((b"".join(rows),))
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(self._fd, view) :]
                self.size += len(piece)
        except BrokenPipeError:
            raise
        except OSError as error:
            if self._regular:
                os.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)
            raise Error(
                f"{self.path}: {error.strerror}; {self.size} bytes are saved and readable"
            ) from None

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _pieces(rows: Iterable[bytes], at: int) -> Iterator[bytes]:
    """Yield `rows`, from offset `at`, in pieces within one page; a row across two is one piece."""
    piece: list[bytes] = []
    end = at
    for row in rows:
        start, end = end, end + len(row)
        if start // _PAGE != (end - 1) // _PAGE:
            yield b"".join(piece)
            yield row
            piece = []
        else:
            piece.append(row)
    yield b"".join(piece)


def _open(path: str, environ: Mapping[str, str]) -> int:
    try:
        folder, name, sticky = _walk(path)
        try:
            return _open_in(folder, name, sticky, path, environ)
        finally:
            os.close(folder)
    except OSError as error:
        advice = {
            errno.ENOENT: "make its directory first",
            errno.EACCES: "choose a file that you may write",
            errno.EROFS: "choose a file elsewhere",
            errno.EISDIR: "name a file in it",
            errno.ENOSPC: "make room or choose a file elsewhere",
        }.get(error.errno or 0, "choose another file")
        raise Error(f"cannot write {path}: {error.strerror}; {advice}") from None


def _open_in(folder: int, name: str, sticky: bool, path: str, environ: Mapping[str, str]) -> int:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    except FileExistsError:
        fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=folder)
        os.set_blocking(fd, True)
        found = os.fstat(fd)
        if sticky and (not stat.S_ISREG(found.st_mode) or found.st_uid not in _ours(environ)):
            os.close(fd)
            raise Error(
                f"{path} was put there by somebody else, in a directory where anybody can write; "
                "choose another name"
            ) from None
        if stat.S_ISREG(found.st_mode):
            os.ftruncate(fd, 0)
            if found.st_uid == os.geteuid() or os.geteuid() == 0:
                os.fchmod(fd, 0o600)
        return fd
    os.fchmod(fd, 0o600)
    owner = _sudo_owner(environ)
    if owner is not None:
        os.fchown(fd, *owner)
    return fd


def _sudo_owner(environ: Mapping[str, str]) -> tuple[int, int] | None:
    uid, gid = environ.get("SUDO_UID", ""), environ.get("SUDO_GID", "")
    if os.geteuid() != 0 or not (uid.isdigit() and gid.isdigit()):
        return None
    return int(uid), int(gid)


def _ours(environ: Mapping[str, str]) -> set[int]:
    owner = _sudo_owner(environ)
    return {os.geteuid()} | ({owner[0]} if owner else set())


def _walk(path: str) -> tuple[int, str, bool]:
    """Open the directory of `path` step by step; return it, the last name, whether it is sticky.

    Every link on the way is read by hand, so that one in a sticky directory is refused.
    """
    if not path or path.endswith("/"):
        raise UsageError(f"{path!r} names no file")
    steps = path.split("/")[::-1]
    folder = os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_DIRECTORY)
    links = 0
    try:
        while True:
            step = steps.pop()
            if step in ("", "."):
                continue
            sticky = bool(os.fstat(folder).st_mode & stat.S_ISVTX)
            try:
                target = os.readlink(step, dir_fd=folder)
            except FileNotFoundError:
                target = ""
            except OSError as error:
                if error.errno != errno.EINVAL:  # not a link
                    raise
                target = ""
            if target:
                links += 1
                if sticky:
                    raise Error(
                        f"{path}: {step} is a link in a directory where anybody can write; "
                        "choose another name"
                    )
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                steps.extend(target.rstrip("/").split("/")[::-1])
                if not target.startswith("/"):
                    continue
                step = "/"
            elif not steps:
                return folder, step, sticky
            inner = os.open(step, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
    except BaseException:
        os.close(folder)
        raise
