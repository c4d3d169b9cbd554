# SPDX-License-Identifier: MIT
"""Builds nlproto._host: what is read in bulk (rings, sock_diag, descriptors) and summed up."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "python" / "nlproto" / "native"

builder = FFI()
# Records are filled by pointer only; their layout stays in nlproto._wire.
NAMES = ("ring", "diag", "host", "patient", "accept", "memory", "flows", "table")
HEADERS = ("host.h", "accounting.h")
builder.cdef(
    "struct sniffer_record { ...; };\n"
    + "\n".join((SOURCES / name).read_text() for name in HEADERS)
)
builder.set_source(
    "nlproto._host",
    '#include <stdint.h>\n#include "shared_proto.h"\n#include "host.h"\n#include "accounting.h"',
    sources=[f"python/nlproto/native/{name}.c" for name in NAMES],
    # the object must not tell where it was built, nor depend on it
    extra_compile_args=[f"-ffile-prefix-map={ROOT}=."],
    include_dirs=[str(ROOT), str(SOURCES)],
    depends=[str(ROOT / "shared_proto.h"), *(str(SOURCES / name) for name in HEADERS)],
)
