# SPDX-License-Identifier: MIT
"""Everything else is in pyproject.toml, which has no word for these three."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithGuard(build_py):
    """packet-hunter.pth lies beside the packages: site(7) reads it there (nlproto/guard.py)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # build.sh puts it into .venv
            self.copy_file("python/packet-hunter.pth", str(Path(self.build_lib)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        more = [] if self.editable_mode else [str(Path(self.build_lib, "packet-hunter.pth"))]
        return super().get_outputs(include_bytecode) + more


setup(
    cmdclass={"build_py": BuildWithGuard},
    cffi_modules=["python/build_wire.py:builder", "python/build_host.py:builder"],
    scripts=[
        "python/scripts/packet-hunter",
        "python/scripts/packet-hunterd",
        "python/scripts/packet-hunter-export",
        "python/scripts/packet-hunter-collect",
        "python/scripts/packet-hunter-otlp",
    ],
)
