# SPDX-License-Identifier: MIT
"""The daemon: records, keeps and serves what an engine captures."""
