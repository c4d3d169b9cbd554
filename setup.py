# SPDX-License-Identifier: MIT
"""Everything else is in pyproject.toml, which has no word for these."""

import gzip
import os
import tarfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

os.umask(0o022)  # archives have the modes of files: not those of whoever builds


class BuildWithGuard(build_py):
    """packet-hunter.pth lies beside the packages: site(7) reads it there (nlproto/guard.py)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # build.sh puts it into .venv
            self.copy_file("python/packet-hunter.pth", str(Path(self.build_lib)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        more = [] if self.editable_mode else [str(Path(self.build_lib, "packet-hunter.pth"))]
        return super().get_outputs(include_bytecode) + more


class SameSdist(sdist):
    """With SOURCE_DATE_EPOCH the archive is the same wherever and whenever it is made."""

    def make_archive(self, base_name: Any, format: str, *args: Any, **options: Any) -> str:
        made: str = super().make_archive(base_name, format, *args, **options)
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch and format == "gztar":
            _level(Path(made), int(epoch))
        return made


def _level(path: Path, time: int) -> None:
    """Nothing of a machine, its users and its clock stays in the archive."""
    new = path.with_name(path.name + ".new")
    with (
        tarfile.open(path) as old,
        open(new, "wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as target,
    ):
        for member in sorted(old.getmembers(), key=lambda one: one.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size, plain.mtime = member.type, member.size, time
            plain.linkname = member.linkname
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            target.addfile(plain, old.extractfile(member) if member.isreg() else None)
    new.replace(path)


setup(
    cmdclass={"build_py": BuildWithGuard, "sdist": SameSdist},
    cffi_modules=["python/build_wire.py:builder", "python/build_host.py:builder"],
    scripts=[
        "python/scripts/packet-hunter",
        "python/scripts/packet-hunterd",
        "python/scripts/packet-hunter-export",
        "python/scripts/packet-hunter-collect",
        "python/scripts/packet-hunter-otlp",
    ],
)
