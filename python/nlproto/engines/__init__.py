# SPDX-License-Identifier: MIT
"""Engines: sources of records."""
