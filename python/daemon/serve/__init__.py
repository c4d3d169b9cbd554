# SPDX-License-Identifier: MIT
"""What clients get: connections, answers, streams."""
