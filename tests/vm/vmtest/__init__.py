# SPDX-License-Identifier: MIT
"""Runs the tests of tests/vm on real kernels, in virtual machines that share the host's files.

    kernels   which kernels there are; downloads and unpacks one into the cache
    build     builds the module against one of them, with that suite's own compiler
    guest     boots one and talks to it
    remote    pytest on the host: each VM test is run in the guest and reported here
    worker    pytest in the guest: runs the tests it is told to
    kernlog   which lines of the kernel log mean a bug

`python -m vmtest --help` does each step by hand.
"""
