# SPDX-License-Identifier: MIT
"""The wire between kernel and programs, and its clocks."""
