# SPDX-License-Identifier: MIT
"""Where records come from: the module, or AF_PACKET without it."""
