# SPDX-License-Identifier: MIT
"""BPF objects, by libbpf.so.1 and cffi's ABI mode. So they need neither a compiler nor a wheel."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from nlproto.errors import Error

__all__ = [
    *("NETFILTER", "NoBpf", "Object", "Program", "Ring"),
    *("enum_names", "has_target", "link_netfilter", "possible_cpus", "root_cgroup"),
]

_LIBRARY = "libbpf.so.1"
_BTF_KIND_ENUM, _BTF_KIND_TYPEDEF, _BTF_KIND_FUNC = 6, 8, 12
_INFO_BYTES = 256  # struct bpf_prog_info; fields that the kernel does not know stay 0
_PACKET_BYTES = 64  # the smallest size that every kernel takes
_BUSY = 1 << 31  # BPF_RINGBUF_BUSY_BIT
_MISSES_AT, _VERIFIED_AT = 208, 216

_ffi = FFI()
_ffi.cdef("""
struct bpf_object; struct bpf_program; struct bpf_map; struct bpf_link; struct btf;
struct bpf_test_run_opts {
    size_t sz;
    const void *data_in; void *data_out; uint32_t data_size_in, data_size_out;
    const void *ctx_in; void *ctx_out; uint32_t ctx_size_in, ctx_size_out;
    uint32_t retval; int repeat; uint32_t duration, flags, cpu, batch_size;
};
void *libbpf_set_print(void *print);
struct bpf_object *bpf_object__open_file(const char *path, const void *opts);
int bpf_object__load(struct bpf_object *obj);
void bpf_object__close(struct bpf_object *obj);
struct bpf_program *bpf_object__next_program(
    const struct bpf_object *obj, struct bpf_program *prog);
const char *bpf_program__name(const struct bpf_program *prog);
const char *bpf_program__section_name(const struct bpf_program *prog);
int bpf_program__set_type(struct bpf_program *prog, uint32_t type);
int bpf_program__set_expected_attach_type(struct bpf_program *prog, uint32_t type);
int bpf_program__set_autoload(struct bpf_program *prog, bool autoload);
int bpf_program__set_log_buf(struct bpf_program *prog, char *log_buf, size_t log_size);
struct bpf_link *bpf_program__attach(const struct bpf_program *prog);
struct bpf_link *bpf_program__attach_cgroup(const struct bpf_program *prog, int cgroup_fd);
int bpf_program__fd(const struct bpf_program *prog);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *obj, const char *name);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
int bpf_map__fd(const struct bpf_map *map);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_lookup_batch(int fd, void *in_batch, void *out_batch, void *keys, void *values,
    uint32_t *count, const void *opts);
int bpf_link__fd(const struct bpf_link *link);
int bpf_link__destroy(struct bpf_link *link);
int bpf_iter_create(int link_fd);
int bpf_obj_get_info_by_fd(int fd, void *info, uint32_t *len);
int bpf_prog_test_run_opts(int prog_fd, struct bpf_test_run_opts *opts);
struct btf *btf__load_vmlinux_btf(void);
int32_t btf__find_by_name_kind(const struct btf *btf, const char *name, uint32_t kind);
struct btf_type { uint32_t name_off, info, size; };
struct btf_enum { uint32_t name_off; int32_t val; };
const struct btf_type *btf__type_by_id(const struct btf *btf, uint32_t id);
const char *btf__name_by_offset(const struct btf *btf, uint32_t offset);
void btf__free(struct btf *btf);
""")


# linux/mount.h; these numbers are the same on all architectures
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 6
NETFILTER = "netfilter"
"""Section of programs that a link of Netfilter calls (Linux 6.4)."""
# linux/bpf.h from 6.4 on; libbpf links to Netfilter from 1.3 on, Debian 12 has 1.1
_SYS_BPF = {"x86_64": 321, "aarch64": 280}
_LINK_CREATE, _PROG_TYPE_NETFILTER, _ATTACH_NETFILTER = 28, 32, 45
_LAST = (1 << 31) - 2  # the lowest priority but one; Netfilter keeps the lowest for itself


class NoBpf(Error):
    """BPF cannot be used here. The message says in one line why, and what to do."""


def _open_library() -> Any:
    try:
        library: Any = _ffi.dlopen(_LIBRARY)
    except OSError:
        raise NoBpf(f"{_LIBRARY} is missing: install libbpf1") from None
    library.libbpf_set_print(_ffi.NULL)  # libbpf's messages are for authors of programs
    return library


def has_target(sections: Iterable[str]) -> set[str]:
    """Return which of these sections' functions or tracepoints the running kernel has.

    Raises NoBpf without BTF.
    """
    library = _open_library()
    with _described(library) as btf:
        return {
            section
            for section in sections
            if library.btf__find_by_name_kind(btf, *_described_as(section)) > 0
        }


def enum_names(enum: str) -> dict[int, str]:
    """Return the names of the running kernel's enum by value; {} if it has none. Raises NoBpf."""
    library = _open_library()
    with _described(library) as btf:
        number = library.btf__find_by_name_kind(btf, enum.encode(), _BTF_KIND_ENUM)
        if number <= 0:
            return {}
        described = library.btf__type_by_id(btf, number)
        members = _ffi.cast("struct btf_enum *", described + 1)
        return {
            members[i].val: _text(library.btf__name_by_offset(btf, members[i].name_off))
            for i in range(described.info & 0xFFFF)
        }


@contextlib.contextmanager
def _described(library: Any) -> Iterator[Any]:
    """Return what the kernel says of its types."""
    btf = library.btf__load_vmlinux_btf()
    if btf == _ffi.NULL:
        raise NoBpf("this kernel does not describe itself (no CONFIG_DEBUG_INFO_BTF)")
    try:
        yield btf
    finally:
        library.btf__free(btf)


@contextlib.contextmanager
def root_cgroup() -> Iterator[int]:
    """Return a descriptor of cgroup v2's root, mounted or not. Raises NoBpf when there is none."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    where = next((words[1] for words in mounts if words[2] == "cgroup2"), None)
    root = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) if where else _mount_cgroup()
    try:
        yield root
    finally:
        os.close(root)


def _mount_cgroup() -> int:
    """Mount cgroup v2 where nobody sees it: only this descriptor has the mount."""
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_SYS_FSOPEN, b"cgroup2", _CLOEXEC)
    if context < 0:
        why = os.strerror(ctypes.get_errno())
        raise NoBpf(f"cgroup v2 is not mounted ({why}): mount -t cgroup2 none /sys/fs/cgroup")
    try:
        libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        root: int = libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    if root < 0:
        raise NoBpf("cgroup v2 cannot be mounted: mount -t cgroup2 none /sys/fs/cgroup")
    return root


def _described_as(section: str) -> tuple[bytes, int]:
    """Return name and BTF kind of what a program of this section attaches to."""
    kind, _, target = section.partition("/")
    if kind == NETFILTER:
        return b"bpf_nf_link_attach", _BTF_KIND_FUNC
    if kind == "tp_btf":
        return f"btf_trace_{target}".encode(), _BTF_KIND_TYPEDEF
    return target.encode(), _BTF_KIND_FUNC


def link_netfilter(program: int, family: int, hook: int) -> int:
    """Attach a program (a descriptor) as the last one of a hook of this thread's network namespace.

    Returns the link's descriptor, raises OSError.
    """
    word = struct.Struct("=4I2IiI")
    attributes = word.pack(program, 0, _ATTACH_NETFILTER, 0, family, hook, _LAST, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYS_BPF[os.uname().machine]
    link: int = libc.syscall(number, _LINK_CREATE, attributes, len(attributes))
    if link < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), NETFILTER)
    os.set_inheritable(link, False)
    return link


class Program:
    """One program of an Object. `section` says where it attaches ("fentry/tcp_v4_rcv")."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle
        self.name = _text(library.bpf_program__name(handle))
        self.section = _text(library.bpf_program__section_name(handle))
        self._log: Any = None
        if self.section == NETFILTER:
            library.bpf_program__set_type(handle, _PROG_TYPE_NETFILTER)
            library.bpf_program__set_expected_attach_type(handle, _ATTACH_NETFILTER)

    def choose(self, wanted: bool) -> None:
        """Choose whether its object loads it."""
        self._library.bpf_program__set_autoload(self._handle, wanted)

    def keep_log(self, size: int = 1 << 24) -> None:
        """Keep the verifier's messages about it, for log()."""
        self._log = _ffi.new("char[]", size)
        self._library.bpf_program__set_log_buf(self._handle, self._log, size)

    def log(self) -> str:
        """Return what keep_log() kept, "" without it."""
        return "" if self._log is None else _text(self._log)

    @property
    def fd(self) -> int:
        """Descriptor of the loaded program."""
        return int(self._library.bpf_program__fd(self._handle))

    def attach(self) -> Any:
        """Attach it; return a link. Raises OSError."""
        return self._linked(self._library.bpf_program__attach(self._handle))

    def attach_cgroup(self, directory: int) -> Any:
        """Attach it to the cgroup of this descriptor; return a link. Raises OSError."""
        return self._linked(self._library.bpf_program__attach_cgroup(self._handle, directory))

    def _linked(self, link: Any) -> Any:
        if link == _ffi.NULL:
            raise OSError(_ffi.errno, os.strerror(_ffi.errno), self.name)
        return link

    def run(self) -> int:
        """Run a "tc" program on a packet of zeros; return its result. Raises OSError."""
        size = _ffi.sizeof("struct bpf_test_run_opts")
        data = _ffi.new("char[]", _PACKET_BYTES)
        opts: Any = _ffi.new(
            "struct bpf_test_run_opts *",
            {"sz": size, "data_in": data, "data_size_in": _PACKET_BYTES, "repeat": 1},
        )
        _check(self._library.bpf_prog_test_run_opts(self.fd, opts), self.name)
        return int(opts.retval)

    def figures(self) -> tuple[int, int]:
        """Return how often the kernel skipped it, and how many instructions the verifier saw."""
        raw, size = _ffi.new("char[]", _INFO_BYTES), _ffi.new("uint32_t *", _INFO_BYTES)
        if self._library.bpf_obj_get_info_by_fd(self.fd, raw, size):
            return 0, 0
        info = bytes(_ffi.buffer(raw))
        misses = int.from_bytes(info[_MISSES_AT : _MISSES_AT + 8], "little")
        return misses, int.from_bytes(info[_VERIFIED_AT : _VERIFIED_AT + 4], "little")


class Object:
    """A compiled object. Open it, choose its programs, load it; close() ends all of it."""

    def __init__(self, path: Path) -> None:
        self._library = _open_library()
        self._links: dict[str, Any] = {}
        self._handle = self._library.bpf_object__open_file(os.fsencode(path), _ffi.NULL)
        if self._handle == _ffi.NULL:
            why = os.strerror(_ffi.errno)
            raise NoBpf(f"{path} cannot be opened ({why}): install packet-hunter again")
        self.programs: dict[str, Program] = {}
        handle = _ffi.NULL
        while (handle := self._next(handle)) != _ffi.NULL:
            program = Program(self._library, handle)
            self.programs[program.name] = program

    def _next(self, handle: Any) -> Any:
        return self._library.bpf_object__next_program(self._handle, handle)

    def set_entries(self, map_name: str, entries: int) -> None:
        """Set how many entries a map can hold. Before load()."""
        _check(self._library.bpf_map__set_max_entries(self._map(map_name), entries), map_name)

    def load(self) -> None:
        """Load the chosen programs. Raises OSError if the kernel refuses one."""
        _check(self._library.bpf_object__load(self._handle), "load")

    def _map(self, name: str) -> Any:
        return self._library.bpf_object__find_map_by_name(self._handle, name.encode())

    def map_fd(self, name: str) -> int:
        """Return a map's descriptor. The object closes it."""
        return int(self._library.bpf_map__fd(self._map(name)))

    def lookup(self, map_name: str, key: bytes, size: int) -> bytes | None:
        """Return the value, `size` bytes, that a map has for this key."""
        value = _ffi.new("char[]", size)
        if self._library.bpf_map_lookup_elem(self.map_fd(map_name), key, value):
            return None
        return bytes(_ffi.buffer(value))

    def update(self, map_name: str, key: bytes, value: bytes) -> None:
        """Put a value into a map. Raises OSError."""
        fd = self.map_fd(map_name)
        _check(self._library.bpf_map_update_elem(fd, key, value, 0), map_name)

    def items(self, map_name: str, entry: np.dtype, most: int) -> np.ndarray:
        """Return a hash's entries, at most `most`: dtype `entry`, which has fields key and value.

        Raises OSError.
        """
        keys = np.zeros(most, entry["key"])
        values = np.zeros(most, entry["value"])
        place, count = _ffi.new("char[]", 16), _ffi.new("uint32_t *", most)
        result = self._library.bpf_map_lookup_batch(
            self.map_fd(map_name),
            _ffi.NULL,
            place,
            _ffi.cast("void *", keys.ctypes.data),
            _ffi.cast("void *", values.ctypes.data),
            count,
            _ffi.NULL,
        )
        if result != -errno.ENOENT:  # that is how a complete answer ends
            _check(result, map_name)
        found = np.zeros(count[0], entry)
        found["key"], found["value"] = keys[: count[0]], values[: count[0]]
        return found

    def delete(self, map_name: str, key: bytes) -> None:
        """Remove a key from a map. Raises OSError if it is not there."""
        _check(self._library.bpf_map_delete_elem(self.map_fd(map_name), key), map_name)

    def attach(self, name: str, cgroup: int | None = None) -> None:
        """Attach a program until close(). Raises OSError."""
        program = self.programs[name]
        link = program.attach() if cgroup is None else program.attach_cgroup(cgroup)
        self._links[name] = link

    def iterate(self, name: str) -> None:
        """Run an iterator's program once, over everything. Raises OSError."""
        link = self.programs[name].attach()
        try:
            fd = self._library.bpf_iter_create(self._library.bpf_link__fd(link))
            _check(fd, name)
            with contextlib.closing(os.fdopen(fd, "rb", buffering=0)) as walk:
                while walk.read(4096):
                    pass
        finally:
            self._library.bpf_link__destroy(link)

    def detach(self, name: str) -> None:
        """End a program's link if it has one."""
        link = self._links.pop(name, None)
        if link is not None:
            self._library.bpf_link__destroy(link)

    def close(self) -> None:
        """Unload programs and maps."""
        for name in list(self._links):
            self.detach(name)
        if self._handle != _ffi.NULL:
            self._library.bpf_object__close(self._handle)
            self._handle = _ffi.NULL


class Ring:
    """A BPF ring buffer whose entries all have one dtype. One thread reads it."""

    def __init__(self, fd: int, size: int, dtype: np.dtype) -> None:
        page, shared = mmap.PAGESIZE, mmap.MAP_SHARED
        consumer = mmap.mmap(fd, page, shared, mmap.PROT_READ | mmap.PROT_WRITE)
        # the ring is mapped twice in a row, so no entry is split
        self._data = mmap.mmap(fd, page + 2 * size, shared, mmap.PROT_READ, offset=page)
        self._size = size
        self._consumed = np.frombuffer(consumer, "u8", 1)
        self._produced = np.frombuffer(self._data, "u8", 1)
        self._entry = np.dtype(
            {
                "names": ["length", "it"],
                "formats": ["u4", dtype],
                "offsets": [0, 8],
                "itemsize": 8 + dtype.itemsize,
            }
        )

    def take(self) -> np.ndarray:
        """Take out the complete entries, copied, in order: its dtype, shape (n,)."""
        consumed = int(self._consumed[0])
        count = (int(self._produced[0]) - consumed) // self._entry.itemsize
        at = mmap.PAGESIZE + (consumed & (self._size - 1))
        entries: np.ndarray = np.ndarray((count,), self._entry, self._data, at)
        busy = np.flatnonzero(entries["length"] & _BUSY)
        if len(busy):
            count = int(busy[0])
        found: np.ndarray = entries["it"][:count].copy()
        self._consumed[0] = consumed + count * self._entry.itemsize
        return found


def possible_cpus() -> int:
    """Return how many processors this kernel may ever have."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split("-")[-1]
    return int(last.split(",")[-1]) + 1


def _text(pointer: Any) -> str:
    raw: Any = _ffi.string(pointer)
    return bytes(raw).decode("utf-8", "replace")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = -result if result != -1 else (_ffi.errno or errno.EPERM)
        raise OSError(number, os.strerror(number), what)
