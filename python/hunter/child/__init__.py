# SPDX-License-Identifier: MIT
"""The command after `--`, and its descendants."""
