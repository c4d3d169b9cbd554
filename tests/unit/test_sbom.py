# SPDX-License-Identifier: MIT
"""The bill of materials: complete, and the same each time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def made(epoch: str = "1700000000") -> str:
    return subprocess.run(
        [sys.executable, ROOT / "debian/sbom.py"],
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="module", name="bill")
def _bill() -> Any:
    return json.loads(made())


def test_it_is_cyclonedx_of_this_version_and_the_same_each_time(bill: Any) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert bill["metadata"]["component"]["version"] == (ROOT / "VERSION").read_text().strip()
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    assert made() == made()


def test_every_library_that_a_user_may_need_is_in_it(bill: Any) -> None:
    names = {one["name"] for one in bill["components"] if one["type"] == "library"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in ("parquet", "metrics", "top", "fleet", "compressed"):
        wanted += extras[extra]
    assert {re.split(r"[^\w.-]", one)[0].lower() for one in wanted} <= names
    # an extra that is new here is either for users or for developers
    assert set(extras) == {
        *("parquet", "metrics", "top", "fleet", "compressed", "all", "test", "dev", "fuzz")
    }


def test_what_is_shipped_with_it_has_its_version_and_hashes(bill: Any) -> None:
    pinned: list[tuple[str, str, list[str]]] = []
    for name in ("vendor.txt", "wheels.txt"):
        for word in (ROOT / "debian" / name).read_text().split():
            if "==" in word:
                pinned.append((*word.split("=="), []))  # type: ignore[arg-type]
            elif word.startswith("--hash=sha256:"):
                pinned[-1][2].append(word.removeprefix("--hash=sha256:"))
    found = [
        (one["name"], one["version"], [each["content"] for each in one["hashes"]])
        for one in bill["components"]
        if one["type"] == "library" and "hashes" in one
    ]
    assert {"nkeys", "duckdb"} < {name for name, _, _ in pinned} and found == pinned


def test_files_have_their_hashes_and_all_of_git_are_there(bill: Any) -> None:
    files = {
        one["name"]: one["hashes"][0]["content"]
        for one in bill["components"]
        if one["type"] == "file"
    }
    for name, digest in files.items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == digest
    known = subprocess.run(["git", "ls-files", "python", "kmod", "bpf"], cwd=ROOT, text=True,
                           capture_output=True).stdout.split()  # fmt: skip
    shipped = {one for one in known if one.endswith((".py", ".c", ".h", ".pth"))}
    assert shipped <= set(files) and "shared_proto.h" in files


def test_references_lead_somewhere(bill: Any) -> None:
    references = {one["bom-ref"] for one in bill["components"] if "bom-ref" in one}
    references.add(bill["metadata"]["component"]["bom-ref"])
    for one in bill["dependencies"]:
        assert {one["ref"], *one.get("dependsOn", ())} <= references
