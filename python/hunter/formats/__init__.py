# SPDX-License-Identifier: MIT
"""Captures that are read: formats, rows, wherever their bytes come from."""
