# SPDX-License-Identifier: MIT
"""python -m vmtest.sparse: builds the module for Debian's 6.1 under sparse; no line may remain."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from .build import BuildFailed, copy_sources, make
from .kernels import KERNELS, Unavailable, cache_directory, unpack

ROOT = Path(__file__).parents[3]


def main() -> int:
    """Prints what sparse and the compiler say of our own files; 0 if that is nothing."""
    try:
        kernel = unpack(KERNELS["6.1"], cache_directory())
        with tempfile.TemporaryDirectory(prefix="packet-hunter-sparse.") as scratch:
            copy_sources(ROOT, Path(scratch))
            log = make(kernel, Path(scratch) / "kmod", ["C=2", "modules"])
    except (Unavailable, BuildFailed) as error:
        print(error, file=sys.stderr)
        return 1
    complaints = re.findall(r"^.*/kmod/\S+:\d+:.*(?:warning|error):.*$", log, re.MULTILINE)
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
