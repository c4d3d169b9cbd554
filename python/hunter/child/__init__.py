# SPDX-License-Identifier: MIT
"""The command behind `--` and its descendants."""
