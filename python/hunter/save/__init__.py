# SPDX-License-Identifier: MIT
"""Packets into files."""
