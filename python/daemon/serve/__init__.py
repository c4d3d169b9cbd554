# SPDX-License-Identifier: MIT
"""What clients receive: connections, answers, streams."""
