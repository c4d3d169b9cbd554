# SPDX-License-Identifier: MIT
"""The daemon: names, keeps and serves what an engine captures."""
