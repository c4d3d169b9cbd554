# SPDX-License-Identifier: MIT
"""Writing packets to files."""
