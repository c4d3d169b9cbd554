# SPDX-License-Identifier: MIT
"""Fair shares of users: turns, quotas, CPU time."""
