# SPDX-License-Identifier: MIT
"""Records for people."""
