# SPDX-License-Identifier: MIT
"""A page for the browser that shows what the daemon sees now, and asks its history."""
