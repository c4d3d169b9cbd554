# SPDX-License-Identifier: MIT
"""The filter language."""
