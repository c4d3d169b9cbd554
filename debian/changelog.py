# SPDX-License-Identifier: MIT
"""Prints debian/changelog for the version in VERSION: what changed is told in CHANGELOG.md."""
from __future__ import annotations

import os
import sys
import time
from email.utils import formatdate
from pathlib import Path

ENTRY = """\
packet-hunter ({version}) unstable; urgency=medium

  * {text}

 -- {maintainer}  {date}
"""


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    control = (root / "debian" / "control").read_text()
    maintainer = control.partition("Maintainer: ")[2].partition("\n")[0]
    moment = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    version = (root / "VERSION").read_text().strip()
    text = f"Version {version}; its changes are in CHANGELOG.md."
    date = formatdate(moment)
    sys.stdout.write(ENTRY.format(version=version, text=text, maintainer=maintainer, date=date))


if __name__ == "__main__":
    main()
