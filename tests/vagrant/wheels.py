# SPDX-License-Identifier: MIT
"""Prints what a checkout installs by pip, one requirement a line: wheels.py pyproject.toml"""

import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], build: list[str]) -> list[str]:
    """Build requirements, dependencies and every extra; not the project itself."""
    extras = project.get("optional-dependencies", {}).values()
    wanted = {*build, *project["dependencies"], *(name for extra in extras for name in extra)}
    return sorted(name for name in wanted if not name.startswith(f"{project['name']}["))


if __name__ == "__main__":
    document = tomllib.loads(Path(sys.argv[1]).read_text())
    print("\n".join(requirements(document["project"], document["build-system"]["requires"])))
