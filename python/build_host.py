# SPDX-License-Identifier: MIT
"""Builds nlproto._host: AF_PACKET rings, sock_diag and descriptor tables, read in bulk."""

from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "python" / "nlproto" / "native"

builder = FFI()
# Records are filled by pointer only; their layout stays in nlproto._wire.
builder.cdef("struct sniffer_record { ...; };\n" + (SOURCES / "host.h").read_text())
builder.set_source(
    "nlproto._host",
    '#include <stdint.h>\n#include "shared_proto.h"\n#include "host.h"',
    sources=["python/nlproto/native/host.c"],
    include_dirs=[str(ROOT), str(SOURCES)],
    depends=[str(ROOT / "shared_proto.h"), str(SOURCES / "host.h")],
)
