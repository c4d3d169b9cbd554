# SPDX-License-Identifier: MIT
"""From an engine to its subscribers: records are counted, named, and put in order of time."""
