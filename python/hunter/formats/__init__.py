# SPDX-License-Identifier: MIT
"""Captures that are read: formats, rows, whatever brings their bytes."""
