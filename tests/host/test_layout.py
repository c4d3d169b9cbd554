# SPDX-License-Identifier: MIT
"""shared_proto.h as the kernel's compiler lays it out in the module, and as cffi does for Python.

Kbuild compiles, with the module's own flags, an object whose only content are the numbers.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nlproto.records.wire import ffi

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "vm"))

from vmtest.build import copy_sources, make  # noqa: E402
from vmtest.kernels import KERNELS, cache_directory, unpack  # noqa: E402

STRUCTS = [name for name in ffi.list_types()[1] if name.startswith("sniffer_")]


def expressions() -> list[str]:
    """C expressions: each struct's size, then each field's offset and size."""
    lines = []
    for name in STRUCTS:
        lines.append(f"sizeof(struct {name})")
        for field, _ in ffi.typeof(f"struct {name}").fields:
            lines.append(f"offsetof(struct {name}, {field})")
            lines.append(f"sizeof_field(struct {name}, {field})")
    return lines


def as_cffi_sees_it() -> list[int]:

    numbers = []
    for name in STRUCTS:
        numbers.append(ffi.sizeof(f"struct {name}"))
        for _, field in ffi.typeof(f"struct {name}").fields:
            numbers += [field.offset, ffi.sizeof(field.type)]
    return numbers


@pytest.fixture(scope="module")
def as_the_module_sees_it(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    tree = tmp_path_factory.mktemp("layout")
    copy_sources(ROOT, tree)
    entries = ",\n\t".join(expressions())
    (tree / "kmod" / "layout.c").write_text(
        "#include <linux/kernel.h>\n#include <linux/stddef.h>\n"
        '#include "shared_proto.h"\n\n'
        f'const u32 layout[] __section(".wire_layout") = {{\n\t{entries}\n}};\n'
    )
    if os.environ.get("PACKET_HUNTER_KERNEL") == "own":
        build = f"/lib/modules/{os.uname().release}/build"
        subprocess.run(
            ["make", "-C", build, f"M={tree / 'kmod'}", "layout.o"], check=True, capture_output=True
        )
    else:
        make(unpack(KERNELS["6.1"], cache_directory()), tree / "kmod", ["layout.o"])
    subprocess.run(
        ["objcopy", "-O", "binary", "-j", ".wire_layout", "kmod/layout.o", "layout.bin"],
        check=True,
        cwd=tree,
    )
    data = (tree / "layout.bin").read_bytes()
    return list(struct.unpack(f"={len(data) // 4}I", data))


def test_every_struct_of_the_wire_is_compared() -> None:
    assert len(STRUCTS) >= 9
    assert "sniffer_record" in STRUCTS


def test_module_and_cffi_agree_on_every_size_and_offset(as_the_module_sees_it: list[int]) -> None:
    wanted = as_cffi_sees_it()
    assert len(as_the_module_sees_it) == len(wanted) > 200
    differing = [
        f"{what}: {kernel} in the module, {python} in Python"
        for what, kernel, python in zip(expressions(), as_the_module_sees_it, wanted, strict=True)
        if kernel != python
    ]
    assert not differing
