# SPDX-License-Identifier: MIT
"""The daemon's machine: configuration, log, peers."""
