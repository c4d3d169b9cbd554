# SPDX-License-Identifier: MIT
"""The rooms stay rooms: their size, and which way imports run."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from nlproto import errors
from waiting import stand_in

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "python"
PROGRAMS = ("nlproto", "daemon", "hunter", "fleet")
MOST_MODULES = 12
MOST_LINES = 500

Graph = Mapping[str, Iterable[str]]


def files() -> dict[str, Path]:
    """Each module's file by its name; a package has the name of its folder."""
    found = {}
    for program in PROGRAMS:
        for path in sorted((PYTHON / program).rglob("*.py")):
            parts = path.relative_to(PYTHON).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = files()


def imported(name: str) -> Iterator[str]:
    """Modules of ours that `name` imports, wherever in the file, for type checkers too."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            origin = node.module or ""
            for one in node.names:
                inner = f"{origin}.{one.name}"
                if inner in MODULES or origin in MODULES:
                    yield inner if inner in MODULES else origin


IMPORTS = {name: sorted(set(imported(name)) - {name}) for name in MODULES}


def folder(name: str) -> str:
    return ".".join(MODULES[name].relative_to(PYTHON).parent.parts)


def circle(graph: Graph) -> list[str]:
    """One way that comes back to where it began, empty if there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node in done:
            return []
        for following in graph.get(node, ()):
            if found := walk(following, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := walk(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_module_imports_itself_over_others() -> None:
    assert circle(IMPORTS) == []


def test_no_folder_imports_itself_over_others() -> None:
    folders: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        mine = folders.setdefault(folder(name), set())
        mine |= {folder(other) for other in others} - {folder(name)}
    assert circle({name: sorted(others) for name, others in folders.items()}) == []


def test_hunter_and_daemon_know_the_library_only() -> None:
    programs = {
        (name.partition(".")[0], other.partition(".")[0])
        for name, others in IMPORTS.items()
        for other in others
    }
    assert {(one, other) for one, other in programs if one != other} <= {
        ("daemon", "nlproto"),
        ("hunter", "nlproto"),
        ("fleet", "nlproto"),
        ("hunter", "fleet"),
    }
    # without the extra, and without its 300 MB of libraries, all other commands work
    assert {
        name
        for name, others in IMPORTS.items()
        if name.startswith("hunter") and any(other.startswith("fleet") for other in others)
    } <= {"hunter.fleet.fleet"}


@pytest.mark.parametrize("name", sorted({folder(name) for name in MODULES}))
def test_a_folder_can_be_taken_in_at_a_glance(name: str) -> None:
    inside = [path for path in MODULES.values() if path.parent == PYTHON / name.replace(".", "/")]
    assert sum(path.name != "__init__.py" for path in inside) <= MOST_MODULES


@pytest.mark.parametrize("name", sorted({folder(name) for name in MODULES}))
def test_a_folder_says_what_is_in_it(name: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text()))


def known_files() -> list[str]:
    """What git has, from the root."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_a_type_has_a_name_of_its_own() -> None:
    """One name, one meaning, in all programs. So does a name that a type is given."""
    places: dict[str, dict[str, str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, {})[name] = name
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                alias, meaning = node.targets[0].id, ast.unparse(node.value)
                if re.match("[A-Z][A-Za-z]*[a-z]", alias) and "TypeVar" not in meaning:
                    places.setdefault(alias, {})[meaning] = name
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_is_longer_than_one_concern() -> None:
    """In all of the tree: also C, tests and what measures."""
    lines = {
        name: len((ROOT / name).read_text().splitlines())
        for name in known_files()
        if name.endswith((".py", ".c", ".h", ".sh")) and (ROOT / name).is_file()
    }
    assert len(lines) > 300
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_no_header_of_the_module_includes_itself_over_others() -> None:
    kmod = {path.name: path for path in (ROOT / "kmod").glob("*.[ch]")}
    includes = {
        name: [one for one in re.findall(r'#include "(\S+)"', path.read_text()) if one in kmod]
        for name, path in kmod.items()
    }
    assert circle(includes) == []


def public(body: Iterable[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions, classes and their methods that others may use."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def test_every_public_name_of_the_library_says_what_it_is() -> None:
    """nlproto is for scripts of others."""
    silent = [
        f"{name}:{node.lineno} {node.name}"
        for name, path in MODULES.items()
        if name.partition(".")[0] == "nlproto"
        for node in public(ast.parse(path.read_text()).body)
        if not ast.get_docstring(node)
    ]
    assert silent == []


def raised(node: ast.FunctionDef) -> set[str]:
    """Exceptions of ours that the body itself raises."""
    calls = (one.exc for one in ast.walk(node) if isinstance(one, ast.Raise))
    names = {ast.unparse(one.func) for one in calls if isinstance(one, ast.Call)}
    return {name for name in names if hasattr(errors, name)}


def test_every_public_name_of_the_library_says_what_it_raises() -> None:
    """A class may say it for all its methods."""
    silent = []
    for name, path in MODULES.items():
        if name.partition(".")[0] != "nlproto":
            continue
        tree = ast.parse(path.read_text())
        holders: list[ast.Module | ast.ClassDef] = [tree]
        holders += [one for one in tree.body if isinstance(one, ast.ClassDef)]
        for holder in holders:
            for node in holder.body:
                if not isinstance(node, ast.FunctionDef) or not raised(node):
                    continue
                if node.name.startswith("_") and node.name != "__init__":
                    continue
                told = f"{ast.get_docstring(node)} {ast.get_docstring(stand_in(holder))}"
                if "Raises" not in told:
                    silent.append(f"{name}:{node.lineno} {node.name} {sorted(raised(node))}")
    assert silent == []


LIBRARY = {name: path for name, path in MODULES.items() if name.partition(".")[0] == "nlproto"}


def offered(tree: ast.Module) -> set[str]:
    """The names in `__all__`, however it is put together."""
    found = (one for one in tree.body if isinstance(one, ast.Assign))
    lists = [one.value for one in found if ast.unparse(one.targets[0]) == "__all__"]
    texts = (
        one.value for value in lists for one in ast.walk(value) if isinstance(one, ast.Constant)
    )
    return {text for text in texts if isinstance(text, str)}


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_every_public_constant_of_the_library_says_what_it_is() -> None:
    """A layout needs no words: the C structure has them."""
    silent = []
    for name, path in LIBRARY.items():
        tree = ast.parse(path.read_text())
        public_names = offered(tree)
        for node, following in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            layout = ast.unparse(node.value).startswith("dtype_of(")
            if ast.unparse(target) in public_names and not layout and not is_text(following):
                silent.append(f"{name}:{node.lineno} {ast.unparse(target)}")
    assert silent == []


def test_every_public_array_of_the_library_says_what_is_in_it() -> None:
    """By its type, its shape, or the structure in shared_proto.h. A class may say it for all."""
    words = re.compile(r"shape|dtype|array|u?int\d|bool|column|mask|[A-Z]{3,}|See [A-Z]")
    silent = []
    for name, path in LIBRARY.items():
        tree = ast.parse(path.read_text())
        holders: list[ast.Module | ast.ClassDef] = [tree]
        holders += [one for one in public(tree.body) if isinstance(one, ast.ClassDef)]
        for holder in holders:
            for node in public(one for one in holder.body if isinstance(one, ast.FunctionDef)):
                assert isinstance(node, ast.FunctionDef)
                arguments = (*node.args.args, *node.args.kwonlyargs)
                types = [one.annotation for one in arguments] + [node.returns]
                if not any("ndarray" in ast.unparse(one) for one in types if one is not None):
                    continue
                about = holder if isinstance(holder, ast.ClassDef) else node
                told = f"{ast.get_docstring(node)} {ast.get_docstring(about)}"
                if not words.search(told):
                    silent.append(f"{name}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)
