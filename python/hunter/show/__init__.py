# SPDX-License-Identifier: MIT
"""Records as text."""
