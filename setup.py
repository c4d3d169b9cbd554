# SPDX-License-Identifier: MIT
"""Everything else is in pyproject.toml, which has no word for these two."""

from setuptools import setup

setup(
    cffi_modules=["python/build_wire.py:builder", "python/build_host.py:builder"],
    scripts=["python/scripts/packet-hunter", "python/scripts/packet-hunterd"],
)
