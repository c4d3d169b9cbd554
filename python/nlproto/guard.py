# SPDX-License-Identifier: MIT
"""Keeps root's Python from importing what others wrote.

`python -m` searches the current directory before the standard library.

packet-hunter.pth calls at_start() while the interpreter starts, before it searches the current
directory. Later would be too late: what `-m` itself imports (importlib, contextlib) could come from
there. If that file is not installed, the first lines of the programs call
leave_current_directory().
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder, all_suffixes

__all__ = [
    "at_start",
    "leave_current_directory",
    "leave_no_cut_modules",
    "others_can_write",
    "started_module",
]

_PROGRAMS = {
    "daemon": "packet-hunterd",
    "hunter": "packet-hunter",
    "fleet": "packet-hunter",
    "fleet.export": "packet-hunter-export",
    "fleet.collect": "packet-hunter-collect",
    "fleet.otlp": "packet-hunter-otlp",
    "nlproto": "packet-hunter",
}
_MAX_LINKS = 40  # MAXSYMLINKS of the kernel (include/linux/namei.h)


def at_start() -> None:
    """Exit if -m started one of our modules as root, and others can write where it imports."""
    name = started_module(sys.orig_argv)
    if name is not None:
        program = _PROGRAMS.get(name) or _PROGRAMS.get(name.partition(".")[0])
        if program is not None:
            _refuse_unsafe_path(program)
            leave_no_cut_modules()


def leave_no_cut_modules() -> None:
    """Write no modules to Python's cache where files may not grow (ulimit -f).

    Python does not check these writes. A cut module would end each later run.
    """
    import resource  # not before the check: it may be anybody's

    if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        sys.dont_write_bytecode = True


def leave_current_directory(program: str, current: str) -> None:
    """Check as at_start() does, and import nothing from `current`, unless our packages are in it.

    The caller took `current` from the head of sys.path, and appended the directory of our packages.
    What is imported later comes from elsewhere, whatever others put into `current`.
    """
    if current == sys.path.pop():
        sys.path.insert(0, current)
    _refuse_unsafe_path(program)


def started_module(argv: Sequence[str]) -> str | None:
    """Return MODULE of "python -m MODULE", by the interpreter's own rules for options."""
    words = iter(argv[1:])
    for word in words:
        if word == "--check-hash-based-pycs":
            next(words, None)
        elif not word.startswith("-") or word == "-":
            return None
        elif not word.startswith("--"):
            for at, letter in enumerate(word[1:], 2):
                if letter in "cmWX":
                    value = word[at:] or next(words, None)
                    if letter in "cm":
                        return value if letter == "m" else None
                    break
    return None


def _refuse_unsafe_path(program: str) -> None:
    """Exit with 1 if root would import from a place that others can write, and say which one.

    The interpreter's own directories are not checked: code from there has run already.
    """
    if os.geteuid() != 0 or sys.flags.isolated:
        return
    places = [entry for entry in sys.path if not entry.startswith(_own_directories())]
    if not sys.flags.safe_path:
        places.insert(0, ".")
    for place in places:
        found = others_can_write(place, os.environ)
        if found is not None:
            line = (
                f"{program}: others can write {found!r}, where Python looks for modules; "
                f"change to another directory, or run {program}\n"
            )
            os.write(2, line.encode("utf-8", "backslashreplace"))
            os._exit(1)  # SystemExit while the interpreter starts would be a fatal error


def _own_directories() -> tuple[str, ...]:
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    prefixes |= {os.path.join(prefix, "local") for prefix in prefixes}
    return tuple(os.path.join(prefix, "lib", "") for prefix in prefixes)


def others_can_write(path: str, environment: Mapping[str, str]) -> str | None:
    """Return a place where a user other than root or the user behind sudo could change imports.

    This is `path` itself, a directory or link on the way to it. Or it is a module or package in
    it, at any depth. A directory that others can write counts as a package if it has the name of
    one: its owner may add the `__init__`. None: there is none.
    """
    users = {0, *_number(environment.get("SUDO_UID"))}
    groups = {0, *_number(environment.get("SUDO_GID"))}
    try:
        waiting = [os.path.abspath(path)]
    except FileNotFoundError:  # the current directory was removed: nothing can be found there
        return None
    seen = set()
    while waiting:
        place = waiting.pop()
        try:
            way = list(_way(place))
        except FileNotFoundError:  # it is gone
            continue
        except OSError:  # a file system that answers not even root
            return place
        for here, status, last in way:
            if _is_theirs(status, users, groups, sticky_is_safe=not last):
                return here
        real = os.path.realpath(place)
        if real not in seen:
            seen.add(real)
            waiting += _importable(place)
    return None


def _is_theirs(
    status: os.stat_result, users: set[int], groups: set[int], sticky_is_safe: bool
) -> bool:
    if status.st_uid not in users:
        return True
    if stat.S_ISLNK(status.st_mode):
        return False
    group_writes = status.st_mode & stat.S_IWGRP and status.st_gid not in groups
    loose = bool(status.st_mode & stat.S_IWOTH or group_writes)
    return loose and not (sticky_is_safe and status.st_mode & stat.S_ISVTX)


def _importable(place: str) -> list[str]:
    """Return the modules and packages in `place`, and the directories that could become one."""
    try:
        with os.scandir(place) as entries:
            found = list(entries)
    except OSError:  # it is a file, or not there
        return []
    endings = (*all_suffixes(), ".pth")
    return [
        entry.path
        for entry in found
        if entry.name.endswith(endings)
        or entry.name == "__pycache__"
        or any(os.path.lexists(f"{entry.path}/__init__{ending}") for ending in endings)
        or (entry.name.isidentifier() and _names_a_package(entry.name) and entry.is_dir())
    ]


def _names_a_package(name: str) -> bool:
    if name in sys.stdlib_module_names or name in _PROGRAMS:
        return True
    try:
        return PathFinder.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _way(path: str) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Yield each directory and link on the way to `path`, and whether it is the end.

    If `path` does not exist, its last existing directory is the end: somebody could create the
    rest.
    """
    steps = os.path.abspath(path).split("/")[::-1]
    here = "/"
    links = 0
    while True:
        while steps and steps[-1] in ("", "."):
            steps.pop()
        status = os.lstat(here)
        try:
            following = os.lstat(os.path.join(here, steps[-1])) if steps else None
        except OSError:
            yield here, status, True
            return
        yield here, status, not steps
        if following is None:
            return
        step = os.path.join(here, steps.pop())
        if not stat.S_ISLNK(following.st_mode):
            here = os.path.normpath(step)
            continue
        yield step, following, False
        links += 1
        if links > _MAX_LINKS:
            return
        target = os.readlink(step)
        steps.extend(target.split("/")[::-1])
        if target.startswith("/"):
            here = "/"


def _number(text: str | None) -> list[int]:
    return [int(text)] if text is not None and text.isascii() and text.isdigit() else []
