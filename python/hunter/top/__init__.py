# SPDX-License-Identifier: MIT
"""hunter top (Textual)."""
