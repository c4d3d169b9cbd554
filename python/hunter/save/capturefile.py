# SPDX-License-Identifier: MIT
"""Files for captures: private, owned by the user behind sudo, and safe from planted links.

Root writes a capture, often into /tmp, where anybody may have put a link before.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, takewhile

from hunter.save.writer import Writer
from nlproto import Error, UsageError
from nlproto.running.closing import Closing

__all__ = ["CaptureFile"]

_PIECE = 1 << 16  # bytes that the writer gets at once
_MAX_LINKS = 40  # MAXSYMLINKS of the kernel (include/linux/namei.h)


class CaptureFile(Closing):
    """An output that grows only by whole rows. A context manager.

    `path` "-" is standard output. A regular file gets mode 0600. A new one that root writes under
    sudo gets the owner of `environ`'s SUDO_UID and SUDO_GID. Raises Error, UsageError.
    """

    def __init__(self, path: str, environ: Mapping[str, str] = os.environ) -> None:
        self.path = path if path != "-" else "standard output"
        self.size = 0
        self.rows = 0
        """How many whole rows are in the file."""
        self._fd = os.dup(1) if path == "-" else _open(path, environ)
        self._writer: Writer | None = None
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode) and path != "-"

    def write(self, data: bytes) -> None:
        """Append `data`; to a regular file completely or not at all.

        Raises BrokenPipeError if the reader of a pipe has gone, Error for anything else.
        """
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            if self._regular:
                os.ftruncate(self._fd, self.size)
                os.lseek(self._fd, self.size, os.SEEK_SET)
                raise self._failed(error) from None
            self.size += len(data) - len(view)
            if isinstance(error, BrokenPipeError):
                raise
            raise self._failed(error) from None
        self.size += len(data)

    def write_rows(self, rows: Iterable[bytes]) -> None:
        """Append `rows`. Each is written completely or not at all, even if we are killed.

        Raises what write() raises.
        """
        if not self._regular:
            self._write_on(list(rows))
            return
        try:
            if self._writer is None:
                self._writer = Writer(self._fd)
            for piece in _pieces(rows):
                self._append(piece, self._writer)
        except OSError as error:
            raise self._failed(error) from None

    def _write_on(self, rows: Sequence[bytes]) -> None:
        before = self.size
        try:
            self.write(b"".join(rows))
        finally:
            ends = accumulate(map(len, rows))
            self.rows += sum(1 for _ in takewhile(lambda end: end <= self.size - before, ends))

    def _append(self, rows: Sequence[bytes], writer: Writer) -> None:
        piece = b"".join(rows)
        try:
            writer.append(piece)
        except OSError:
            if len(rows) == 1:
                raise
            for row in rows:  # rows for which there is room
                self._append([row], writer)
        else:
            self.size += len(piece)
            self.rows += len(rows)

    def _failed(self, error: OSError) -> Error:
        return Error(f"{self.path}: {error.strerror}; {self.size} bytes are saved and readable")

    def fileno(self) -> int:
        return self._fd

    def is_moved(self) -> bool:
        """Return whether its path no longer leads to it."""
        if not self._regular:
            return False
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            return True

    def is_output(self) -> bool:
        """Whether it is standard output: then words for people must not go there."""
        return os.path.sameopenfile(self._fd, 1)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
            if self._writer is not None:
                self._writer.close()


def _pieces(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield `rows` in lists of about _PIECE bytes."""
    piece: list[bytes] = []
    size = 0
    for row in rows:
        piece.append(row)
        size += len(row)
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _open(path: str, environ: Mapping[str, str]) -> int:
    try:
        folder, name, shared = _walk(path, environ)
        try:
            return _open_in(folder, name, shared, path, environ)
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


def _open_in(folder: int, name: str, shared: bool, path: str, environ: Mapping[str, str]) -> int:
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
    except FileExistsError:
        fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=folder)
        os.set_blocking(fd, True)
        found = os.fstat(fd)
        plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if shared and not (plain and found.st_uid in _ours(environ)):
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
    if os.geteuid() != 0 or not (uid.isdecimal() and gid.isdecimal()):
        return None
    return int(uid), int(gid)


def _ours(environ: Mapping[str, str]) -> set[int]:
    owner = _sudo_owner(environ)
    return {os.geteuid()} | ({owner[0]} if owner else set())


def _walk(path: str, environ: Mapping[str, str]) -> tuple[int, str, bool]:
    """Open the directory of `path`; return it, the last name, and whether anybody can write.

    It goes step by step and reads every link by hand. So a link in a directory where anybody can
    write is refused, sticky or not; root also refuses links that others made.
    """
    if not path or path.endswith("/"):
        raise UsageError(f"{path!r} names no file")
    steps = path.split("/")[::-1]
    folder = os.open("/" if path.startswith("/") else ".", os.O_PATH | os.O_DIRECTORY)
    links = 0
    try:
        while steps:
            step = steps.pop()
            if step in ("", "."):
                continue
            shared = bool(os.fstat(folder).st_mode & (stat.S_ISVTX | stat.S_IWOTH))
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
                if shared:
                    raise Error(
                        f"{path}: {step} is a link in a directory where anybody can write; "
                        "choose another name"
                    )
                owner = os.stat(step, dir_fd=folder, follow_symlinks=False).st_uid
                if os.geteuid() == 0 and owner not in _ours(environ):
                    raise Error(f"{path}: {step} is a link of somebody else; choose another name")
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                steps.extend(target.rstrip("/").split("/")[::-1])
                if not target.startswith("/"):
                    continue
                step = "/"
            elif not steps:
                return folder, step, shared
            inner = os.open(step, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))  # it ends with "."
    except BaseException:
        os.close(folder)
        raise
