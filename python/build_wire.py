# SPDX-License-Identifier: MIT
"""Builds nlproto._wire from shared_proto.h, the one definition of the wire.

The header itself, preprocessed with -DSNIFFER_CDEF, is the cdef text, and the same header is
compiled into the extension: a layout that the two read differently does not build.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "shared_proto.h"

# cffi's parser does not know the compiler built-ins that the real <linux/types.h> leads to.
KERNEL_TYPES = """
typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
"""


def preprocess(*options: str) -> str:
    """Return shared_proto.h as the preprocessor leaves it, over stubbed kernel types."""
    with tempfile.TemporaryDirectory() as stubs:
        types = Path(stubs, "linux", "types.h")
        types.parent.mkdir()
        types.write_text(KERNEL_TYPES)
        command = [*shlex.split(os.environ.get("CC", "cc")), "-E", "-P", "-nostdinc"]
        command += ["-I", stubs, "-DSNIFFER_CDEF", *options, str(HEADER)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def string_constants() -> str:
    """Return a cdef line for each string macro: macros do not survive preprocessing."""
    names = re.findall(r'^#define (SNIFFER_\w+) "', preprocess("-dM"), re.MULTILINE)
    return "".join(f"static char *const {name};\n" for name in sorted(names))


builder = FFI()
builder.cdef(preprocess() + string_constants())
builder.set_source(
    "nlproto._wire",
    '#include "shared_proto.h"',
    # the object must not tell where it was built, nor depend on it
    extra_compile_args=[f"-ffile-prefix-map={ROOT}=."],
    include_dirs=[str(ROOT)],
    depends=[str(HEADER)],
)

if __name__ == "__main__":
    builder.compile(tmpdir=str(ROOT / "python"), verbose=True)
