# SPDX-License-Identifier: MIT
"""Prints what is shipped and what it needs, as CycloneDX 1.5 JSON (make sbom).

Versions of libraries are those that pyproject.toml allows: which one runs, the system decides. What
is compiled in (vendor.txt) or shipped (wheels.txt) has its version and hashes. The same tree gives
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
import tomllib
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {"python": (".py", ".c", ".h", ".pth"), "kmod": (".c", ".h"), "bpf": (".c", ".h")}
SYSTEM = {
    "libbpf": ("LGPL-2.1-only OR BSD-2-Clause", "loads the programs of engine ebpf"),
    "glibc": ("LGPL-2.1-or-later", ""),
}
"""Libraries that the system's linker finds."""


def _requirement(text: str) -> tuple[str, str]:
    """(name, what else it says) of a requirement (PEP 508)."""
    found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(.*)", text)
    if found is None:
        raise SystemExit(f"sbom: {text!r} is no requirement")
    return found[1].lower(), found[2]


def _libraries(project: dict[str, Any]) -> dict[str, dict[str, Any]]:
    wanted = [(text, "required", "") for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        if extra not in ("all", "test", "dev", "fuzz"):  # the others are not for its users
            wanted += [(text, "optional", extra) for text in texts]
    found: dict[str, dict[str, Any]] = {}
    for text, scope, extra in wanted:
        name, rest = _requirement(text)
        purl = f"pkg:pypi/{name}"
        one = found.setdefault(
            purl,
            {"type": "library", "bom-ref": purl, "name": name, "purl": purl, "scope": scope}
            | {"properties": [{"name": "packet-hunter:requirement", "value": rest or "any"}]},
        )
        if extra:
            one["properties"].append({"name": "packet-hunter:extra", "value": extra})
    return found


def _vendored() -> dict[str, dict[str, Any]]:
    found = {}
    for file, scope, how in (
        ("vendor.txt", "required", "compiled into the Debian packages"),
        ("wheels.txt", "optional", "in packet-hunter-fleet as its makers built it; a hash a file"),
    ):
        text = (ROOT / "debian" / file).read_text().replace("\\\n", "")
        for name, version, hashes in re.findall(
            r"^([\w.-]+)==(\S+)((?:\s+--hash=\S+)+)$", text, re.M
        ):
            purl = f"pkg:pypi/{name}@{version}"
            digests = re.findall(r"sha256:([0-9a-f]{64})", hashes)
            found[purl] = {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                "purl": purl,
                "scope": scope,
                "description": how,
                "hashes": [{"alg": "SHA-256", "content": one} for one in digests],
            }
    return found


def _files() -> list[dict[str, Any]]:
    paths = [ROOT / "shared_proto.h"]
    for folder, endings in SHIPPED.items():
        paths += [one for one in (ROOT / folder).rglob("*") if one.suffix in endings]
    made = re.compile(r"/(_host|_wire)\.c$|\.mod\.c$|/build/|\.egg-info/")
    kept = sorted(one for one in paths if one.is_file() and not made.search(str(one)))
    return [
        {
            "type": "file",
            "name": str(one.relative_to(ROOT)),
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(one.read_bytes()).hexdigest()}],
        }
        for one in kept
    ]


def bill(epoch: int) -> dict[str, Any]:
    """The bill of materials of this tree, made at `epoch` (Unix time)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = (ROOT / "VERSION").read_text().strip()
    own = f"pkg:generic/packet-hunter@{version}"
    libraries = _libraries(project) | _vendored()
    system = {
        f"pkg:generic/{name}": {
            "type": "library",
            "bom-ref": f"pkg:generic/{name}",
            "name": name,
            "licenses": [{"expression": licence}],
            "description": why or "the C library",
        }
        for name, (licence, why) in SYSTEM.items()
    }
    components = [*libraries.values(), *system.values(), *_files()]
    digest = hashlib.sha256(json.dumps(components, sort_keys=True).encode()).digest()
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}",
        "version": 1,
        "metadata": {
            "timestamp": made,
            "component": {
                "type": "application",
                "bom-ref": own,
                "name": "packet-hunter",
                "version": version,
                "description": project["description"],
                "licenses": [{"expression": "MIT AND GPL-2.0-only"}],
            },
        },
        "components": components,
        "dependencies": [
            {"ref": own, "dependsOn": sorted([*libraries, *system])},
            *({"ref": name} for name in sorted([*libraries, *system])),
        ],
    }


if __name__ == "__main__":
    made = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    json.dump(bill(made), sys.stdout, indent=1, ensure_ascii=False)
    print()
