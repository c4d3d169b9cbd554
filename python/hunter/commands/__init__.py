# SPDX-License-Identifier: MIT
"""The subcommands, one module each, and their helpers."""
