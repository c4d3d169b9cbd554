# SPDX-License-Identifier: MIT
"""Tests with a thousand sockets, where a login allows 1024 open files."""

import resource

FILES = 8192

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if soft != resource.RLIM_INFINITY and soft < FILES:
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
