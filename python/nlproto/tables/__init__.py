# SPDX-License-Identifier: MIT
"""Tables of what is remembered: flows, processes, owners of ports."""
