# SPDX-License-Identifier: MIT
"""From an engine to its subscribers: counted, named, in order of time."""
