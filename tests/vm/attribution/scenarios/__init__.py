# SPDX-License-Identifier: MIT
"""Scenarios by theme. A docstring's first line says what must be true."""
