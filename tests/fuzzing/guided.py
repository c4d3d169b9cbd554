# SPDX-License-Identifier: MIT
"""One target under atheris: guided.py NAME [libFuzzer's options and corpus folders]."""

import sys

import atheris

with atheris.instrument_imports(include=["nlproto", "hunter", "daemon", "fleet", "targets"]):
    import targets

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, lambda data: targets.run(name, data))
    atheris.Fuzz()
