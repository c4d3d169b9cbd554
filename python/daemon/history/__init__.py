# SPDX-License-Identifier: MIT
"""Flows and processes of the past, in memory and in a file."""
