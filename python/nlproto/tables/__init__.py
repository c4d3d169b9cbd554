# SPDX-License-Identifier: MIT
"""What is remembered: flows, processes, who owns which port."""
