# SPDX-License-Identifier: MIT
"""A name in a directory that is held open, so that renames do not matter.

After the directory is open, nothing here uses its path. So no link and no rename in a directory
that others may write leads root elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from nlproto.running.closing import Closing
from nlproto.running.surroundings import is_loose

__all__ = ["HeldDirectory"]


class HeldDirectory(Closing):
    """`name` in the open directory `fd`; a context manager.

    The directory of `path` must exist. Of `own` the last component is created, with `mode`. Raises
    OSError.
    """

    def __init__(self, path: str, own: str, mode: int) -> None:
        folder, self.name = os.path.split(path)
        if not self.name:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            self.fd = os.open(folder or ".", flags)
        except FileNotFoundError:
            if folder != own:
                raise FileNotFoundError(
                    errno.ENOENT, f"there is no directory {folder}; make it first"
                ) from None
            parent = os.open(os.path.dirname(own), flags)
            try:
                name = os.path.basename(own)
                os.mkdir(name, 0o700, dir_fd=parent)
                self.fd = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent)
                os.fchmod(self.fd, mode)
            finally:
                os.close(parent)

    def close(self) -> None:
        """Close the directory. A second call does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    @property
    def path(self) -> str:
        """A path for calls that take no descriptor, valid while the directory is open."""
        return f"/proc/self/fd/{self.fd}/{self.name}"

    @property
    def loose(self) -> bool:
        """Return whether others can replace files in the directory."""
        return is_loose(self.fd)

    def stat(self, suffix: str = "") -> os.stat_result | None:
        """Return the status of the name, of a link itself; None: it does not exist."""
        try:
            return os.stat(self.name + suffix, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_file(self, mode: int, suffix: str = "") -> int:
        """Open or create a regular file of ours for reading and writing, with `mode`."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.name + suffix, flags, 0o600, dir_fd=self.fd)
        try:
            found = self._check(fd)
            if stat.S_IMODE(found.st_mode) != mode:
                os.fchmod(fd, mode)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def open_old(self, suffix: str) -> int:
        """Open an existing regular file of ours for reading."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.name + suffix, flags, dir_fd=self.fd)
        try:
            self._check(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check(self, fd: int) -> os.stat_result:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        owners = {0, os.geteuid(), os.fstat(self.fd).st_uid}
        if found.st_uid not in owners or found.st_nlink > 1:
            raise OSError(errno.EPERM, "it has a foreign owner or a second name")
        return found

    def remove(self, suffix: str) -> None:
        """Remove the name. It is no error if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name + suffix, dir_fd=self.fd)

    def move(self, old: str, new: str) -> None:
        """Rename from one suffix to another."""
        names = self.name + old, self.name + new
        os.rename(*names, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def rename(self, new: str, suffix: str = "") -> None:
        os.rename(self.name + suffix, new + suffix, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, only: os.stat_result | None = None) -> None:
        """Remove the name; with `only`, only if it is that file. No error if it does not exist."""
        found = self.stat()
        if found is not None and (only is None or os.path.samestat(found, only)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=self.fd)

    def bind(self, listener: socket.socket, mode: int) -> os.stat_result | None:
        """Bind a UNIX socket here. Returns its file, which has `mode` from the beginning."""
        # unix_bind_bsd() gives the file the mode of the socket, without the umask's bits
        os.fchmod(listener.fileno(), mode)
        before = os.umask(0)
        try:
            listener.bind(self.path)
        finally:
            os.umask(before)
        return self.stat()
