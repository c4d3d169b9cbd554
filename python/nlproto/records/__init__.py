# SPDX-License-Identifier: MIT
"""What is on the wire between kernel and programs, and its clocks."""
