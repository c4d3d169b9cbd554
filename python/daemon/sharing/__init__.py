# SPDX-License-Identifier: MIT
"""Who gets how much: turns, quotas, time of the processor."""
