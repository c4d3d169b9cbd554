# SPDX-License-Identifier: MIT
"""How a program of this project runs: its descriptors, threads and time."""
